"""Peak signal-to-noise ratio, 10 log10(1 / MSE) in dB for values in [0, 1]; higher is closer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffaccel.eval.metrics.samples import as_pairs

PSNR_CAP = 100.0
"""What an identical sample counts as in a mean, in dB. Rounding to 8 bit alone gives 59, float32 noise about 140."""


def psnr(samples: Any, reference: Any) -> Tensor:
    """PSNR of each sample; a video is one sample, its error taken over all frames at once.

    Args:
        samples, reference: of the same shape, see `as_samples`.

    Returns:
        float64 ``[N]`` in dB; infinite where a sample is identical. In a mean it counts as `PSNR_CAP`.

    Raises:
        ValueError: not samples, or of different shapes.
    """
    a, b = as_pairs(samples, reference)
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return -10 * error.log10()

"""Structural similarity (Wang et al., IEEE TIP 13(4), 2004; 11 x 11 Gaussian window, sigma 1.5); 1 is identical."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffaccel.eval.metrics.samples import as_pairs

_WINDOW = 11
_BORDER = _WINDOW // 2


def ssim(samples: Any, reference: Any) -> Tensor:
    """SSIM of each sample; of a video, the mean over its frames.

    Args:
        samples, reference: of the same shape, at least 11 x 11 pixels, see `as_samples`.

    Returns:
        float64 ``[N]``, at most 1 (up to rounding).

    Raises:
        ValueError: not samples, of different shapes, or too small.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = as_pairs(samples, reference)
    if min(a.shape[-2:]) < _WINDOW:
        raise ValueError(f"SSIM needs at least {_WINDOW} x {_WINDOW} pixels, got {a.shape[-2]} x {a.shape[-1]}")

    def frame_ssim(f: Tensor, g: Tensor) -> float:
        _, similarity = structural_similarity_index_measure(f[None], g[None], data_range=1.0, return_full_image=True)
        # Where the window sticks out torchmetrics reflects the picture. The paper and scikit-image do not count that.
        return float(similarity[..., _BORDER:-_BORDER, _BORDER:-_BORDER].mean())

    # One frame at a time: torchmetrics makes five filtered copies of what it gets. Float32 is off by up to 3e-4 in flat
    # regions of different brightness, by about 2e-6 elsewhere; float64 takes 20 times as long on the CPU.
    values = [[frame_ssim(f, g) for f, g in zip(x, y, strict=True)] for x, y in zip(a, b, strict=True)]
    return torch.tensor(values, dtype=torch.float64).mean(1)

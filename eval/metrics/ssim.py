"""Structural similarity (Wang et al., IEEE TIP 13(4), 2004; 11 x 11 Gaussian window, sigma 1.5); 1 is identical."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffaccel.eval.metrics.samples import as_pairs

_WINDOW = 11


def ssim(samples: Any, reference: Any) -> Tensor:
    """SSIM of each sample; of a video, the mean over its frames.

    Args:
        samples, reference: of the same shape, at least 11 x 11 pixels, see `as_samples`.

    Returns:
        float64 ``[N]``, at most 1.

    Raises:
        ValueError: not samples, of different shapes, or too small.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = as_pairs(samples, reference)
    if min(a.shape[-2:]) < _WINDOW:
        raise ValueError(f"SSIM needs at least {_WINDOW} x {_WINDOW} pixels, got {a.shape[-2]} x {a.shape[-1]}")
    # One video at a time: torchmetrics makes five filtered copies of what it is given.
    values = [
        structural_similarity_index_measure(x.double(), y.double(), data_range=1.0, reduction="none").mean()
        for x, y in zip(a, b, strict=True)
    ]
    return torch.stack(values)

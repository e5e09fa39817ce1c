"""Cosine similarity of latents; 1 is the same direction, higher is closer.

Blind to a change of scale, which the decoder is not: read it beside PSNR.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


def latent_cosine(latents: Tensor, reference: Tensor) -> Tensor:
    """Cosine between each sample's latents and its reference's, all elements taken as one vector.

    Args:
        latents, reference: ``[N, ...]`` of the same shape, any float dtype.

    Returns:
        float64 ``[N]`` in [-1, 1].

    Raises:
        ValueError: of different shapes, empty, not finite, or all zeros, which have no direction.
    """
    if latents.shape != reference.shape or latents.ndim < 2 or not latents.numel():
        shapes = f"{list(latents.shape)} and {list(reference.shape)}"
        raise ValueError(f"need latents and reference [N, ...] of one shape, got {shapes}")
    a, b = (x.detach().cpu().double().flatten(1) for x in (latents, reference))
    for name, x in (("latents", a), ("reference", b)):
        if not torch.isfinite(x).all():
            raise ValueError(f"{name}: a sample holds NaN or infinity")
        if not x.any(1).all():
            raise ValueError(f"{name}: a sample is all zeros and has no direction")
    return cosine_similarity(a, b, dim=1, eps=0)

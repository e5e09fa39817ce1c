"""CMMD (arXiv:2401.09603): squared maximum mean discrepancy of CLIP embeddings, Gaussian kernel; lower is closer.

    1000 (E k(x, x') + E k(y, y') - 2 E k(x, y)),    k(x, y) = exp(-|x - y|^2 / (2 sigma^2)),  sigma = 10

Unlike a Frechet distance it takes no distribution as normal and needs no more samples than dimensions. The paper's
numbers are for OpenAI's ViT-L/14 at 336 pixels; numbers of other networks compare only with each other.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from diffaccel.eval.metrics.features import as_features

SIGMA = 10.0
SCALE = 1000.0
_ROWS = 1024  # of the kernel matrix at once: 30 000 samples would need 7 GB


def cmmd(samples: Any, reference: Any, *, unbiased: bool = False) -> float:
    """CMMD of two sets of embeddings.

    Args:
        samples, reference: ``[N, D]`` and ``[M, D]``; each row is scaled to length 1, as in the paper's code.
        unbiased: whether to leave out the pairs of a sample with itself. As in the paper's code they count, which makes
            the value too high by up to 10 / N + 10 / M. Without them sets of different sizes compare, and equal
            distributions give values around 0, also below.

    Raises:
        ValueError: not features, of different D, a row of zeros, or unbiased with one sample.
    """
    x, y = _unit(samples, "samples"), _unit(reference, "reference")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"samples have {x.shape[1]} features, the reference {y.shape[1]}")
    within = [_mean_kernel(x, x), _mean_kernel(y, y)]
    if unbiased:
        if min(len(x), len(y)) < 2:
            raise ValueError("the unbiased CMMD needs at least 2 samples on either side")
        within = [(len(z) * mean - 1) / (len(z) - 1) for z, mean in zip((x, y), within, strict=True)]  # k(x, x) = 1
    return SCALE * (sum(within) - 2 * _mean_kernel(x, y))


def _unit(features: Any, name: str) -> np.ndarray:
    array = as_features(features, name)
    norms = np.linalg.norm(array, axis=1, keepdims=True)
    if not norms.all():
        raise ValueError(f"{name}: an embedding is all zeros")
    return array / norms


def _mean_kernel(x: np.ndarray, y: np.ndarray) -> float:
    """E k(x, y) over all pairs of rows of length 1, where |x - y|^2 = 2 - 2 x y."""
    total = sum(np.exp((x[i : i + _ROWS] @ y.T - 1) / SIGMA**2).sum() for i in range(0, len(x), _ROWS))
    return float(total) / (len(x) * len(y))

"""Frechet distance of two sets of features taken as normal distributions (FID when the features are Inception's);
lower is closer.

    d = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))        arXiv:1706.08500, eq. 6

The estimate is too high by about c / n for n samples, with another c for every model (arXiv:1911.07023). Compare only
distances of equally many samples, or `frechet_infinity`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from diffaccel.eval.metrics.features import as_features

POINTS = 15
"""Sample counts through which `frechet_infinity` lays its line, as in the paper's code."""


class Frechet(NamedTuple):
    """A distance, which means nothing without the numbers of samples behind it.

    Attributes:
        value: the distance, at least 0 but for `frechet_infinity`, whose line may end a little below.
        samples, reference: how many of each.
    """

    value: float
    samples: int
    reference: int


class Normal(NamedTuple):
    """Features taken as a normal distribution."""

    mean: np.ndarray  # [D]
    covariance: np.ndarray  # [D, D]


def frechet(samples: Any, reference: Any) -> Frechet:
    """The distance between two sets of features.

    Args:
        samples, reference: ``[N, D]`` and ``[M, D]``, both N and M larger than D; computed in float64.

    Raises:
        ValueError: not features, of different D, or too few: the covariance of n <= D samples is singular, and the
            distance then says more about n than about the samples.
    """
    a, b = _checked(samples, "samples"), _checked(reference, "reference")
    return Frechet(distance(fit(a), fit(b)), len(a), len(b))


def frechet_infinity(samples: Any, reference: Any, seed: int = 0) -> Frechet:
    """The distance that infinitely many samples would have: the end of a line in 1 / n through random subsets of them
    (arXiv:1911.07023, sec. 4). The reference is used whole; what its own size adds stays in the number.

    Args:
        samples: ``[N, D]`` with N at least 4 D; smaller subsets than 2 D leave the line.
        reference: ``[M, D]`` with M larger than D.
        seed: of the subsets' own generator.

    Raises:
        ValueError: not features, of different D, or too few.
    """
    a, b = _checked(samples, "samples", 4), _checked(reference, "reference")
    rng, target = np.random.default_rng(seed), fit(b)
    counts = np.linspace(max(2 * a.shape[1], len(a) // 10), len(a), POINTS).astype(int)
    distances = [distance(fit(rng.permutation(a)[:n]), target) for n in counts]
    _, end = np.polyfit(1 / counts, distances, 1)
    return Frechet(float(end), len(a), len(b))


def _checked(features: Any, name: str, least: int = 1) -> np.ndarray:
    array = as_features(features, name)
    n, d = array.shape
    if n <= d or n < least * d:
        needed = max(d + 1, least * d)
        raise ValueError(
            f"{n} {name} are too few for {d} features: need {needed}. Take more samples, features of fewer dimensions, "
            f"or CMMD, which needs no covariance"
        )
    return array


def fit(features: np.ndarray) -> Normal:
    """Of float64 features ``[N, D]``, however few."""
    return Normal(features.mean(0), np.atleast_2d(np.cov(features, rowvar=False)))


def distance(a: Normal, b: Normal) -> float:
    """The distance of two distributions.

    By eigenvalues of symmetric matrices only: S1 S2 has the eigenvalues of R S2 R with R the root of S1. They are
    real and not negative but for rounding, where a general matrix root may turn out complex.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"samples have {a.mean.size} features, the reference {b.mean.size}")
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ b.covariance @ root).clip(0)).sum()
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared
    return max(0.0, float(np.square(a.mean - b.mean).sum() + spread))

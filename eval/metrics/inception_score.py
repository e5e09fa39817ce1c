"""Inception score (arXiv:1606.03498): exp of the mean KL divergence between each sample's class probabilities and
their mean; from 1 to the number of classes, higher is better. It sees no reference and no prompt."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from diffaccel.eval.metrics.features import as_features


class InceptionScore(NamedTuple):
    """Mean over the splits, their standard deviation, and the number of samples behind it."""

    mean: float
    deviation: float
    samples: int


def inception_score(probabilities: Any, splits: int = 10, seed: int = 2020) -> InceptionScore:
    """Inception score of class probabilities.

    Args:
        probabilities: ``[N, classes]``, rows that sum to 1.
        splits: parts that are scored apart, after shuffling; the score grows with the size of a part, so compare equal
            numbers only.
        seed: of the shuffling, which is torch-fidelity's.

    Raises:
        ValueError: not probabilities, or fewer samples than splits.
    """
    p = as_features(probabilities, "probabilities")
    if p.min() < 0 or not np.allclose(p.sum(1), 1, atol=1e-3):
        raise ValueError("expected probabilities in [0, 1] whose rows sum to 1; take the softmax of logits")
    if not 1 <= splits <= len(p):
        raise ValueError(f"splits must lie in [1, {len(p)}], the number of samples, got {splits}")
    p = p[np.random.RandomState(seed).permutation(len(p))]
    edges = [i * len(p) // splits for i in range(splits + 1)]
    scores = [_score(p[start:end]) for start, end in pairwise(edges)]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)), len(p))


def _score(p: np.ndarray) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        divergence = np.where(p > 0, p * np.log(p / p.mean(0)), 0.0)  # 0 log 0 is 0
    return float(np.exp(divergence.sum(1).mean()))

"""How sure a number is: bootstrap intervals over prompts, Wilson's interval of a share, and "no worse by more than X".

Prompts are what is drawn at random, so prompts are what is resampled: several seeds of one prompt count as one
observation, their mean. Intervals are percentile intervals of the mean (Efron and Tibshirani 1993, ch. 13), with the
percentiles moved outward for small numbers of prompts (the expanded percentiles of arXiv:1411.5279). Simulated, 95 %
cover 94 % for 16 and for 64 normal values, 93 % for exponential ones; a one-sided bound covers 94 % and, on the side of
the long tail of exponential values, 91 %. Below 6 prompts no resampling reaches 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

_BLOCK = 2**20  # values drawn at once: 2000 resamples of 30 000 prompts would need a gigabyte


class Interval(NamedTuple):
    """A number with the two-sided interval around it.

    Attributes:
        value: the estimate.
        low, high: bounds; infinite where one prompt says nothing about the spread.
        n: prompts (or trials) behind it.
    """

    value: float
    low: float
    high: float
    n: int


class NoWorse(NamedTuple):
    """The verdict of `no_worse`.

    Attributes:
        holds: whether the bound is within the margin.
        drop: by how much the samples are worse, in the mean; negative where they are better.
        bound: with the confidence asked for, they are worse by no more than this.
        margin: what was allowed.
        n: prompts behind it.
    """

    holds: bool
    drop: float
    bound: float
    margin: float
    n: int


def mean_interval(
    values: Any, prompts: Sequence[Hashable] | None = None, level: float = 0.95, resamples: int = 2000
) -> Interval:
    """The mean over prompts and its bootstrap interval.

    Args:
        values: ``[N]``, one per sample, finite.
        prompts: ``[N]``, to which prompt each sample belongs; None for one sample a prompt.
        level: share of repetitions in which the interval should hold the true mean, in (0, 1); higher = wider.
        resamples: bootstrap samples; more = steadier bounds.

    Raises:
        ValueError: no values, not finite, or different numbers of values and prompts.
    """
    means = _per_prompt(values, prompts)
    low, high = _bounds(means, ((1 - level) / 2, (1 + level) / 2), resamples)
    return Interval(float(means.mean()), low, high, means.size)


def difference_interval(
    samples: Any,
    reference: Any,
    prompts: Sequence[Hashable] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
) -> Interval:
    """The mean of ``samples - reference`` over prompts; value i of both has the same prompt and seed, see
    `mean_interval`. What makes a prompt hard for both cancels, so this is far narrower than two intervals side by side.

    Raises:
        ValueError: as `mean_interval`, or different numbers of values.
    """
    return mean_interval(_differences(samples, reference), prompts, level, resamples)


def no_worse(
    samples: Any,
    reference: Any,
    margin: float,
    prompts: Sequence[Hashable] | None = None,
    *,
    higher_is_better: bool = True,
    level: float = 0.95,
    resamples: int = 2000,
) -> NoWorse:
    """Whether ``samples`` are worse than ``reference`` by no more than ``margin``: the one-sided paired bootstrap bound
    of the mean drop lies within it. One prompt proves nothing: its bound is infinite.

    Args:
        samples, reference: ``[N]``, value i of both has the same prompt and seed.
        margin: allowed mean drop in the metric's unit, at least 0; larger = easier to hold.
        prompts: ``[N]``, to which prompt each sample belongs; None for one sample a prompt.
        higher_is_better: of the metric.
        level: confidence of the bound; higher = harder to hold.
        resamples: bootstrap samples; more = steadier bounds.

    Raises:
        ValueError: as `difference_interval`, or the margin is negative or not finite.
    """
    if not (math.isfinite(margin) and margin >= 0):
        raise ValueError(f"the margin is how much worse is allowed, at least 0; got {margin}")
    drops = _differences(reference, samples) if higher_is_better else _differences(samples, reference)
    means = _per_prompt(drops, prompts)
    _, bound = _bounds(means, (0.5, level), resamples)
    return NoWorse(bound <= margin, float(means.mean()), bound, float(margin), means.size)


def wilson(right: int, count: int, level: float = 0.95) -> Interval:
    """The interval of a share by Wilson's score (JASA 22, 1927), for independent trials; within [0, 1], and sensible at
    0 and 1 too. For several seeds of each prompt, which are not independent, take `mean_interval`.

    Raises:
        ValueError: no trials, or not 0 <= right <= count.
    """
    if count < 1 or not 0 <= right <= count:
        raise ValueError(f"need 0 <= right <= count and count >= 1, got right={right}, count={count}")
    z, share = float(stats.norm.ppf((1 + level) / 2)), right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half), count)


def _finite(values: Any) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"expected a list of one value per sample, got shape {list(array.shape)}")
    if not np.isfinite(array).all():
        first = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"value {first} of {array.size} is {array[first]}: cap what is infinite, drop what failed")
    return array


def _differences(a: Any, b: Any) -> np.ndarray:
    a, b = _finite(a), _finite(b)
    if a.shape != b.shape:
        raise ValueError(f"pairs need equally many values of both, got {a.size} and {b.size}")
    return a - b


def _per_prompt(values: Any, prompts: Sequence[Hashable] | None) -> np.ndarray:
    """The mean of each prompt's samples, prompts in the order in which they come first."""
    array = _finite(values)
    if prompts is None:
        return array
    if len(prompts) != array.size:
        raise ValueError(f"{array.size} values but {len(prompts)} prompts: need the prompt of each value")
    groups: dict[Hashable, list[float]] = {}
    for value, prompt in zip(array.tolist(), prompts, strict=True):
        groups.setdefault(prompt, []).append(value)
    return np.array([math.fsum(group) / len(group) for group in groups.values()])


def _bounds(means: np.ndarray, shares: tuple[float, float], resamples: int) -> tuple[float, float]:
    """Expanded percentiles of the bootstrapped mean. The bootstrap has its own generator: same values, same bounds."""
    if not 0 < shares[0] < shares[1] < 1:
        raise ValueError("level must lie in (0, 1), of a one-sided bound in (0.5, 1)")
    if means.size == 1:
        return -math.inf, math.inf
    n, rng = means.size, np.random.default_rng(0)
    rows = max(1, _BLOCK // n)
    drawn = [
        means[rng.integers(n, size=(min(rows, resamples - start), n))].mean(1) for start in range(0, resamples, rows)
    ]
    expanded = stats.norm.cdf(math.sqrt(n / (n - 1)) * stats.t.ppf(shares, n - 1))
    low, high = np.quantile(np.concatenate(drawn), expanded)
    return float(low), float(high)

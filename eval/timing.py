"""Timing that can be trusted on a machine whose speed drifts: callables take turns, ratios come with an interval."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from rich.progress import track


@dataclass(frozen=True)
class Timing:
    """All samples of one callable, in seconds and in the order they were taken."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))


@dataclass(frozen=True)
class Spread:
    """Samples of one duration (or energy) in short; the samples themselves stand in the records.

    Attributes:
        median, p90: of the samples, the 90th percentile being what one in ten exceeds.
        samples: how many.
    """

    median: float
    p90: float
    samples: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(float(np.median(values)), float(np.quantile(values, 0.9)), len(values))


@dataclass(frozen=True)
class Ratio:
    """How many times faster, with a 95 % interval.

    Attributes:
        value: median of the baseline over median of the other; above 1 the other is faster.
        low, high: bounds of the interval; equal to ``value`` where there is one sample only.
        samples: number of pairs behind it.
    """

    value: float
    low: float
    high: float
    samples: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def interleave(
    callables: Mapping[str, Callable[[], Any]], repeats: int = 10, warmup: int = 1, *, progress: bool = False
) -> dict[str, Timing]:
    """Time several callables in turns; round i holds one sample of each, so slow spells hit all alike.

    The order is reversed in every second round, so that none always runs in the wake of the same other.

    Args:
        callables: by name; their results are dropped.
        repeats: rounds that count, >= 1.
        warmup: rounds before, >= 0.
        progress: whether to show a bar.

    Raises:
        ValueError: nothing to time, or bad counts.
    """
    if not callables or repeats < 1 or warmup < 0:
        raise ValueError(f"need callables, repeats >= 1 and warmup >= 0, got {list(callables)}, {repeats}, {warmup}")
    seconds: dict[str, list[float]] = {name: [] for name in callables}
    for index in track(range(warmup + repeats), description="timing", disable=not progress, transient=True):
        order = list(callables) if index % 2 == 0 else list(callables)[::-1]
        for name in order:
            took = seconds_of(callables[name])
            if index >= warmup:
                seconds[name].append(took)
    return {name: Timing(tuple(samples)) for name, samples in seconds.items()}


def seconds_of(call: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call, the accelerator's queue drained before and after."""
    synchronise()
    started = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - started


def synchronise() -> None:
    """Wait for the accelerator where one is in use; starts none."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def speedup(baseline: Sequence[float], other: Sequence[float], resamples: int = 2000) -> Ratio:
    """Ratio of medians of paired samples, with a bootstrap over the pairs (Efron and Tibshirani 1993, ch. 13).

    Sample i of both comes from the same round (or the same prompt), and stays paired when resampled: what slows both
    then cancels. The bootstrap has its own generator: the same samples give the same interval.

    Raises:
        ValueError: no samples, different numbers of them, or not positive.
    """
    a, b = np.asarray(baseline, np.float64), np.asarray(other, np.float64)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise ValueError(f"need equally many samples of both, got {a.size} and {b.size}")
    if not (a > 0).all() or not (b > 0).all():
        raise ValueError("seconds must be positive")
    value = float(np.median(a) / np.median(b))
    if a.size == 1:
        return Ratio(value, value, value, 1)
    picks = np.random.default_rng(0).integers(a.size, size=(resamples, a.size))
    ratios = np.median(a[picks], axis=1) / np.median(b[picks], axis=1)
    low, high = (float(q) for q in np.quantile(ratios, (0.025, 0.975)))
    return Ratio(value, min(low, value), max(high, value), a.size)


def nearest(target: float, candidates: Mapping[int, float]) -> int:
    """The key whose value is nearest to ``target`` as a ratio, the smaller key on a tie.

    Raises:
        ValueError: no candidates.
    """
    if not candidates:
        raise ValueError("no candidates to choose from")
    return min(candidates, key=lambda k: (abs(math.log(candidates[k] / target)), k))

"""What trying a choice showed: its time, its bytes and its scores, and whether they keep to a budget for certain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from diffaccel.eval.measures import MEASURES, score
from diffaccel.tuning.budget import Budget, Limit

_WORST_TENTH = 1.755  # standard deviations between the mean of a normal distribution and that of its worst tenth


@dataclass(frozen=True)
class Outcome:
    """Of one choice.

    Args:
        items: numbers of the prompts (with a seed each) that it ran on.
        prompts: to which prompt each item belongs.
        scores: by measure, one value an item.
        originals: of the reference, likewise, for measures that judge a sample by itself.
        cost: time of the denoising loop over the reference's, median of the items.
        share: bytes of the denoisers' weights over the reference's.
        report: the acceleration's own, of the last item.
    """

    items: tuple[int, ...]
    prompts: tuple[int, ...]
    scores: Mapping[str, Sequence[float]]
    originals: Mapping[str, Sequence[float]]
    cost: float
    share: float
    report: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def estimate(self, limit: Limit) -> float:
        """The number that ``limit`` speaks of."""
        if limit.statistic == "gain":
            return 1 / self.cost
        if limit.statistic == "share":
            return self.share
        measure, values = self._of(limit)
        if limit.statistic == "worst":
            return _worst(values, higher_is_better=limit.least)
        if limit.statistic == "drop":
            found = score(MEASURES[measure], values, self.prompts, self.originals[measure])
            assert found.drop is not None
            return found.drop.value
        return float(np.mean(values))

    def bound(self, limit: Limit) -> float:
        """What that number surely keeps to, at 95 % confidence over prompts."""
        if limit.statistic in ("gain", "share"):
            return self.estimate(limit)
        measure, values = self._of(limit)
        if limit.statistic == "worst":
            return worst_bound(values, self.prompts, higher_is_better=limit.least)
        if limit.statistic == "drop":
            found = score(MEASURES[measure], values, self.prompts, self.originals[measure])
            assert found.drop_bound is not None
            return found.drop_bound
        return score(MEASURES[measure], values, self.prompts).bound

    def keeps(self, budget: Budget, *, surely: bool = True) -> bool:
        """Whether all limits hold, surely or as far as the estimates go."""
        return all(limit.holds((self.bound if surely else self.estimate)(limit)) for limit in budget.limits)

    def hopeless(self, budget: Budget, within: float) -> bool:
        """Whether the estimates miss a limit on quality by more than this factor of what may be lost."""
        return any(limit.loss(self.estimate(limit)) > within * limit.loss(limit.bound) for limit in budget.of_quality)

    def _of(self, limit: Limit) -> tuple[str, list[float]]:
        """The measure's own name and its values; of the perceptual distances the one that was measured."""
        names = ("shapes_perceptual", "lpips") if limit.measure == "perceptual" else (limit.measure,)
        name = next(n for n in names if n in self.scores)
        cap = MEASURES[name].cap
        return name, [min(v, cap) for v in self.scores[name]]


def _worst(values: Sequence[float], *, higher_is_better: bool) -> float:
    ordered = sorted(values, reverse=not higher_is_better)[: math.ceil(len(values) / 10)]
    return math.fsum(ordered) / len(ordered)


def worst_bound(values: Sequence[float], prompts: Sequence[int], *, higher_is_better: bool = True) -> float:
    """What the mean of the worst tenth of further prompts surely keeps to.

    A few prompts do not contain a worst tenth. Taken as normal (decibels nearly are), its mean lies 1.755 standard
    deviations from the mean: this is the one-sided tolerance bound for that point (noncentral t), at 90 % confidence.
    Never better than the worst that was seen.
    """
    array = np.asarray(values, np.float64)
    count = len(set(prompts))
    if count < 2:
        return -math.inf if higher_is_better else math.inf
    factor = float(stats.nct.ppf(0.9, count - 1, _WORST_TENTH * math.sqrt(count))) / math.sqrt(count)
    away = factor * float(array.std(ddof=1))
    seen = _worst(values, higher_is_better=higher_is_better)
    mean = float(array.mean())
    return min(mean - away, seen) if higher_is_better else max(mean + away, seen)

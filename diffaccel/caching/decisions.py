"""How a section decides on one denoiser: the policy of each branch in a new run, with what was calibrated for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diffaccel.caching.lags import Lags
from diffaccel.caching.policies import Change, EasyCache, Interval, MagCache, Moved, Policy, SeaCache, Static
from diffaccel.caching.ratios import Ratios
from diffaccel.caching.schedule import Chosen, Scheduler
from diffaccel.caching.section import StepCache
from diffaccel.caching.trajectory import Trajectories
from diffaccel.clock import Call, Clock
from diffaccel.forecast import Slope


class Decisions:
    """Of one denoiser.

    Args:
        ratios: MagCache's, by branch; may be empty. lags: SmoothCache's, by kind of module; likewise.
        known: calibrated trajectories, if there are any. others: those of the pipeline's other denoisers.
        noise: timestep -> share of noise in the latents.
    """

    def __init__(
        self,
        section: StepCache,
        clock: Clock,
        noise: Callable[[float], float],
        ratios: Mapping[str, Ratios],
        known: Trajectories | None,
        others: Sequence[Trajectories] = (),
        lags: Mapping[str, Lags] | None = None,
    ) -> None:
        self._section, self._clock, self._noise = section, clock, noise
        self._ratios, self._known, self._others, self._lags = ratios, known, others, lags or {}
        self._scheduler = Scheduler(section, known) if section.policy == "schedule" and known is not None else None
        self.chosen: Chosen | None = None
        """The schedule of the last run, where the policy makes one."""

    def most(self, group: str) -> int:
        """The most skips in a row of a group."""
        every = self._section.intervals().get(group)
        return self._section.max_skips if every is None else every - 1

    def policy(self, call: Call, group: str) -> tuple[Policy, str | None]:
        """The policy of a group in the call's branch in a new run, and what a user should know about it."""
        section = self._section
        if section.policy == "easy":
            return EasyCache(section.threshold), None
        if section.policy == "sea":
            return SeaCache(section.threshold, self._noise), None
        if section.policy == "first-block":
            return Change(section.threshold), None
        if section.policy == "modulated":
            return Moved(section.threshold), None
        if section.policy == "smooth":
            return self._smooth(call, group)
        if section.policy == "interval":
            return Interval(), None
        if section.policy == "schedule":
            return self._static(call)
        return self._mag(call.branch)

    def slope(self, branch: str) -> Slope | None:
        """How a branch's outputs go on, where the forecast needs that."""
        if self._section.forecast != "fitted" or self._known is None:
            return None
        return self._known.branch(branch).slope_at

    def _mag(self, branch: str) -> tuple[Policy, str | None]:
        ratios, threshold = self._ratios, self._section.threshold
        if branch in ratios:
            return MagCache(threshold, ratios[branch]), None
        if not ratios:
            return MagCache(threshold, None), "no ratios were calibrated for this denoiser: nothing is skipped"
        used, others = next(iter(ratios.items()))
        return MagCache(threshold, others), f"no ratios were calibrated for branch {branch}; those of {used} are used"

    def _static(self, call: Call) -> tuple[Policy, str | None]:
        if self._scheduler is None or self._known is None:
            return Static(range(1 << 30)), "this denoiser was not calibrated: nothing is skipped"
        if call.steps is None:
            return Static(range(1 << 30)), "the number of steps is unknown: nothing is skipped"
        timesteps = self._timesteps(call.steps, self._known.schedule)
        end = next((i for i in range(call.step + 1, call.steps) if self._foreign(timesteps[i])), call.steps)
        self.chosen = self._scheduler.choose(timesteps, call.step, end)
        return Static(frozenset(self.chosen.computed)), None

    def _smooth(self, call: Call, group: str) -> tuple[Policy, str | None]:
        lags, s = self._lags.get(group), self._section
        if lags is None or call.steps is None:
            why = "the number of steps is unknown" if lags else f"modules of the kind {group!r} were not calibrated"
            return Static(range(1 << 30)), f"{why}: none is skipped"
        timesteps, begin, steps = self._timesteps(call.steps, lags.timesteps), call.step, call.steps
        computed = lags.schedule(
            timesteps[begin:], s.threshold, s.max_skips, lambda step: s.is_protected(begin + step, steps)
        )
        return Static({begin + step for step in computed}), None

    def _timesteps(self, steps: int, measured: Sequence[float]) -> list[float]:
        """The schedule; where only its length is known (a loop of the user's), the calibrated one spread over it."""
        known = [t for t in self._clock.schedule if t is not None]
        if len(known) == steps:
            return known
        return np.interp(np.linspace(0, 1, steps), np.linspace(0, 1, len(measured)), measured).tolist()

    def _foreign(self, timestep: float) -> bool:
        """Whether another denoiser makes this step: it was calibrated nearer to it."""

        def distance(known: Trajectories) -> float:
            return min(abs(timestep - t) for branch in known.branches.values() for t in branch.timesteps)

        assert self._known is not None
        return any(distance(other) < distance(self._known) for other in self._others)


def noise_level(pipeline: Any) -> Callable[[float], float]:
    """Timestep -> share of noise in the latents, in [0, 1]: a flow's timestep itself, else by the noise schedule."""

    def level(timestep: float) -> float:
        scheduler = getattr(pipeline, "scheduler", None)
        config = getattr(scheduler, "config", None) or {}
        last = config.get("num_train_timesteps") or 1000
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if alphas is None or config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
            return timestep / last
        kept = float(alphas[min(max(round(timestep), 0), len(alphas) - 1)])
        return (1 - kept) ** 0.5 / ((1 - kept) ** 0.5 + kept**0.5)

    return level

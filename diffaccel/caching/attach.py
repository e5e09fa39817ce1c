"""Step caching on the denoiser's root: one decision per step, one memory per branch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffaccel.caching.forecast import Forecast
from diffaccel.caching.policies import EasyCache
from diffaccel.caching.section import StepCache
from diffaccel.caching.tensors import latent_tensors
from diffaccel.clock import Call
from diffaccel.errors import PlanError
from diffaccel.report import TechniqueReport
from diffaccel.root import Compute
from diffaccel.technique import Context


def resolve(sections: Sequence[StepCache], context: Context) -> StepCache:
    """The one section.

    Raises:
        PlanError: another cache is already enabled on a denoiser.
    """
    (section,) = sections
    for denoiser in context.denoisers:
        if getattr(denoiser.module, "is_cache_enabled", False):
            raise PlanError(
                f"{denoiser.component} already has one of diffusers' caches enabled; call "
                f"pipe.{denoiser.component}.disable_cache() first, or leave caching out of the plan"
            )
    return section


def attach(section: StepCache, context: Context) -> AttachedCache:
    """Put a cache on every denoiser's root."""
    caches = []
    for denoiser in context.denoisers:
        cache = CachedRoot(section)
        wrappers = context.root(denoiser).wrappers
        context.undo.callback(wrappers.remove, cache)
        wrappers.append(cache)
        caches.append(cache)
    return AttachedCache(section, caches)


class CachedRoot:
    """Runs around every call of one denoiser."""

    def __init__(self, section: StepCache) -> None:
        self._section = section
        self.computed = self.reused = 0
        self._begin(-1)

    def _begin(self, run: int) -> None:
        self._run = run
        self._branches: dict[str, Forecast] = {}
        self._policy = EasyCache(self._section.threshold)
        self._step: int | None = None
        self._skip = False
        self._skips = 0
        self.computed_steps: list[int] = []

    def __call__(self, call: Call, arguments: Mapping[str, Any], compute: Compute) -> Any:
        if call.run != self._run:
            self._begin(call.run)
        inputs = latent_tensors(arguments)
        branch = self._branches.setdefault(call.branch, Forecast(self._section.forecast))
        leads = call.step != self._step
        at = call.timestep if call.timestep is not None else float(call.step)
        if leads:
            self._step = call.step
            self._leader = call.branch
            self._policy.seen(inputs)
            self._skip = self._decide(call, branch, inputs)
            self._skips = self._skips + 1 if self._skip else 0
        if self._skip and branch.ready and branch.fits(inputs):
            self.reused += 1
            return branch(inputs, at)
        try:
            output = compute()
        except BaseException:
            self._begin(-1)
            raise
        self.computed += 1
        branch.record(inputs, output, at)
        if leads:
            self._policy.computed(branch.outputs)
            self.computed_steps.append(call.step)
        return output

    def _decide(self, call: Call, branch: Forecast, inputs: list[Any]) -> bool:
        s = self._section
        if not branch.ready or not branch.fits(inputs) or self._skips >= s.max_skips:
            return False
        if call.steps is not None:
            if call.steps < s.min_steps or call.step < math.ceil(s.protect_first * call.steps):
                return False
            if call.step >= call.steps - s.protect_last:
                return False
        elif call.progress < s.protect_first:
            return False
        return self._policy.skip(inputs)


class AttachedCache:
    """Step caching at work."""

    def __init__(self, section: StepCache, caches: list[CachedRoot]) -> None:
        self._section = section
        self._caches = caches

    def report(self) -> TechniqueReport:
        s = self._section
        return TechniqueReport(
            "caching",
            f"{s.policy} cache, threshold {s.threshold:g}, {s.forecast} forecast",
            sites=len(self._caches),
            facts={
                "computed": sum(c.computed for c in self._caches),
                "reused": sum(c.reused for c in self._caches),
                "steps_computed": [c.computed_steps for c in self._caches],
            },
        )

    def bake(self) -> None:
        """Nothing is kept for undoing."""

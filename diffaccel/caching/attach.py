"""Step caching on the denoiser's root: one decision per step, one memory per branch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from diffaccel.caching.forecast import Forecast
from diffaccel.caching.policies import EasyCache, MagCache, Policy
from diffaccel.caching.ratios import Ratios, ratios_of
from diffaccel.caching.section import StepCache
from diffaccel.caching.tensors import latent_tensors
from diffaccel.clock import Call
from diffaccel.errors import PlanError
from diffaccel.report import TechniqueReport
from diffaccel.root import Compute
from diffaccel.technique import Context


@dataclass(frozen=True)
class Resolved:
    """The section and, for MagCache, the ratios by component and branch."""

    section: StepCache
    ratios: Mapping[str, Mapping[str, Ratios]]


def resolve(sections: Sequence[StepCache], context: Context) -> Resolved:
    """Check that nothing else caches steps and that what the policy needs is there.

    Raises:
        PlanError: another cache is on a denoiser, or MagCache has no calibrated ratios.
    """
    (section,) = sections
    for denoiser in context.denoisers:
        other = _other_cache(denoiser.module)
        if other:
            raise PlanError(
                f"{denoiser.component} already has a cache of diffusers ({other}), and two caches would skip twice; "
                f"take it off (pipe.{denoiser.component}.disable_cache()) or leave caching out of the plan"
            )
    ratios = {d.component: ratios_of(context.artefacts, d.component) for d in context.denoisers}
    if section.policy == "mag" and not any(ratios.values()):
        raise PlanError(
            "StepCache(policy='mag') needs calibrated magnitude ratios, which this plan has none of for "
            f"{', '.join(ratios)}; get them by plan = diffaccel.calibrate(pipe, plan, prompts=['one is enough'])"
        )
    return Resolved(section, ratios)


def attach(resolved: Resolved, context: Context) -> AttachedCache:
    """Put a cache on every denoiser's root."""
    caches = {}
    for denoiser in context.denoisers:
        cache = CachedRoot(resolved.section, resolved.ratios[denoiser.component])
        wrappers = context.root(denoiser).wrappers
        context.undo.callback(wrappers.remove, cache)
        wrappers.append(cache)
        caches[denoiser.component] = cache
    return AttachedCache(resolved.section, caches)


class CachedRoot:
    """Runs around every call of one denoiser.

    The call that comes first in a step decides for the step; the other branches follow where they can. A denoiser's
    first call in a run is always computed, also where it takes over in the middle of a trajectory (Wan 2.2).
    """

    def __init__(self, section: StepCache, ratios: Mapping[str, Ratios]) -> None:
        self._section = section
        self._ratios = ratios
        self._notes: dict[str, None] = {}  # a set in order
        self._idle: str | None = None  # why the last run was left alone
        self.computed = self.reused = 0
        self.computed_steps: list[int] = []
        self._begin(None)

    @property
    def notes(self) -> list[str]:
        """What a user should know; why a run was left alone holds for the last run, as ``computed_steps`` does."""
        return [*self._notes, *([self._idle] if self._idle else [])]

    def _begin(self, run: int | None) -> None:
        self._run = run
        self._step = -1
        self._skip = False
        self._skips = 0
        self._memories: dict[str, Forecast] = {}
        self._policies: dict[str, Policy] = {}

    def __call__(self, call: Call, arguments: Mapping[str, Any], compute: Compute) -> Any:
        if call.run != self._run or call.step < self._step:
            self._begin(call.run)
            self.computed_steps = []
            self._idle = None
        latents = latent_tensors(arguments)
        if reason := self._never(call, latents):
            self._idle = reason
            return self._computed(call, compute)
        copies = self._section.policy == "easy" or self._section.forecast == "residual"
        inputs = [x.detach().clone() for x in latents] if copies else latents
        at = call.timestep if call.timestep is not None else float(call.step)
        memory = self._memories.get(call.branch)
        if memory is None or not memory.fits(inputs):  # new, or another size in the middle of a run
            memory = self._memories[call.branch] = Forecast(self._section.forecast)
            self._policies.pop(call.branch, None)
        policy = None
        if call.step != self._step:
            self._step = call.step
            policy = self._policies.setdefault(call.branch, self._policy(call.branch))
            policy.look(inputs, at)
            self._skip = not memory.empty and self._free(call) and policy.skip()
            self._skips = self._skips + 1 if self._skip else 0
        if self._skip and not memory.empty:
            self.reused += 1
            return memory(inputs, at)
        output = self._computed(call, compute)
        if not memory.record(inputs, output, at):
            self._notes["the denoiser's output holds no floating tensor: nothing is cached"] = None
        elif policy is not None:
            policy.learn(memory.outputs)
        return output

    def _computed(self, call: Call, compute: Compute) -> Any:
        try:
            output = compute()
        except BaseException:
            self._begin(None)
            raise
        self.computed += 1
        if self.computed_steps[-1:] != [call.step]:
            self.computed_steps.append(call.step)
        return output

    def _never(self, call: Call, latents: list[Tensor]) -> str | None:
        """Why no call of this run can be skipped, or None."""
        if not latents:
            return "no argument of the denoiser holds floating latents: nothing is cached"
        if call.steps is not None and call.steps < self._section.min_steps:
            return f"a schedule of {call.steps} steps was left alone (min_steps is {self._section.min_steps})"
        if call.steps is None and call.timestep is None:
            return (
                "where the loop stands is unknown: call accel.clock.start(steps) before and advance() after each step"
            )
        return None

    def _free(self, call: Call) -> bool:
        """Whether the plan lets this step be skipped."""
        s = self._section
        if self._skips >= s.max_skips:
            return False
        if call.steps is None:
            return call.progress >= s.protect_first
        return math.ceil(s.protect_first * call.steps) <= call.step < call.steps - s.protect_last

    def _policy(self, branch: str) -> Policy:
        if self._section.policy == "easy":
            return EasyCache(self._section.threshold)
        ratios = self._ratios.get(branch)
        if ratios is None and self._ratios:
            used, ratios = next(iter(self._ratios.items()))
            self._notes[f"no ratios were calibrated for branch {branch}; those of {used} are used"] = None
        elif ratios is None:
            self._notes["no ratios were calibrated for this denoiser: nothing is skipped"] = None
        return MagCache(self._section.threshold, ratios)


class AttachedCache:
    """Step caching at work."""

    def __init__(self, section: StepCache, caches: Mapping[str, CachedRoot]) -> None:
        self._section = section
        self._caches = caches

    def report(self) -> TechniqueReport:
        s = self._section
        several = len(self._caches) > 1
        return TechniqueReport(
            "caching",
            f"policy {s.policy}, threshold {s.threshold:g}, forecast {s.forecast}",
            sites=len(self._caches),
            facts={
                "policy": s.policy,
                "computed": sum(c.computed for c in self._caches.values()),
                "reused": sum(c.reused for c in self._caches.values()),
                "steps_computed": {name: c.computed_steps for name, c in self._caches.items()},  # of the last run
            },
            notes=[f"{name}: {n}" if several else n for name, c in self._caches.items() for n in c.notes],
        )

    def bake(self) -> None:
        """Nothing is kept for undoing."""


def _other_cache(module: nn.Module) -> str | None:
    """Name of the cache of diffusers that is on this network, if any."""
    config = getattr(module, "_cache_config", None)
    if getattr(module, "is_cache_enabled", False) is True:
        return type(config).__name__
    for part in module.modules():
        for hook in getattr(part.__dict__.get("_diffusers_hook"), "hooks", {}).values():
            source = type(hook).__module__.rpartition(".")[2]
            if type(hook).__module__.startswith("diffusers.") and ("cache" in source or "broadcast" in source):
                return type(hook).__name__
    return None

"""Puts step caching on every denoiser, and takes it off again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from diffaccel.caching.policies import Change, EasyCache, Interval, MagCache, Policy, SeaCache
from diffaccel.caching.ratios import Ratios, ratios_of
from diffaccel.caching.root import CachedRoot
from diffaccel.caching.section import StepCache
from diffaccel.caching.stack import Stack
from diffaccel.errors import PlanError
from diffaccel.report import TechniqueReport
from diffaccel.technique import Context


@dataclass(frozen=True)
class Resolved:
    """The section and, for MagCache, the ratios by component and branch."""

    section: StepCache
    ratios: Mapping[str, Mapping[str, Ratios]]


def resolve(sections: Sequence[StepCache], context: Context) -> Resolved:
    """Check that nothing else caches steps and that what the policy needs is there.

    Raises:
        PlanError: another cache is on a denoiser, MagCache has no calibrated ratios, or no block would ever be skipped.
    """
    (section,) = sections
    for denoiser in context.denoisers:
        other = _other_cache(denoiser.module)
        if other:
            raise PlanError(
                f"{denoiser.component} already has a cache of diffusers ({other}), and two caches would skip twice; "
                f"take it off (pipe.{denoiser.component}.disable_cache()) or leave caching out of the plan"
            )
        if denoiser.blocks and section.front + section.back >= len(denoiser.blocks):
            raise PlanError(
                f"StepCache.front={section.front} and back={section.back} leave none of the {len(denoiser.blocks)} "
                f"blocks of {denoiser.component} to skip"
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
    section, caches = resolved.section, {}
    for denoiser in context.denoisers:
        stack = None
        if section.granularity == "stack":
            stack = Stack(denoiser, section.front, section.back, section.forecast)
            stack.install(context)
        policy = partial(_policy, section, resolved.ratios[denoiser.component], noise_level(context.pipeline))
        cache = CachedRoot(section, policy, stack)
        wrappers = context.root(denoiser).wrappers
        context.undo.callback(wrappers.remove, cache)
        wrappers.append(cache)
        caches[denoiser.component] = cache
    return AttachedCache(section, caches)


def _policy(
    section: StepCache, ratios: Mapping[str, Ratios], noise: Callable[[float], float], branch: str
) -> tuple[Policy, str | None]:
    """The policy of a branch in a new run, and what a user should know about it."""
    if section.policy == "easy":
        return EasyCache(section.threshold), None
    if section.policy == "sea":
        return SeaCache(section.threshold, noise), None
    if section.policy == "first-block":
        return Change(section.threshold), None
    if section.policy == "interval":
        return Interval(), None
    if branch in ratios:
        return MagCache(section.threshold, ratios[branch]), None
    if not ratios:
        return MagCache(section.threshold, None), "no ratios were calibrated for this denoiser: nothing is skipped"
    used, others = next(iter(ratios.items()))
    return MagCache(
        section.threshold, others
    ), f"no ratios were calibrated for branch {branch}; those of {used} are used"


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
            f"policy {s.policy}, threshold {s.threshold:g}, forecast {s.forecast}"
            + (
                f", in the block stack ({s.front} blocks before it, {s.back} behind)"
                if s.granularity == "stack"
                else ""
            ),
            sites=len(self._caches),
            facts={
                "policy": s.policy,
                "computed": sum(c.computed for c in self._caches.values()),
                "reused": sum(c.reused for c in self._caches.values()),
                "cache_bytes": sum(c.nbytes for c in self._caches.values()),
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

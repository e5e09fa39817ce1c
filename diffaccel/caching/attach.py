"""Puts step caching on every denoiser, and takes it off again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from diffaccel.caching.allowance import Allowance
from diffaccel.caching.decisions import Decisions, noise_level
from diffaccel.caching.deep import Deep
from diffaccel.caching.lags import Lags, lags_of
from diffaccel.caching.memory import Part
from diffaccel.caching.modules import chosen
from diffaccel.caching.ratios import Ratios, ratios_of
from diffaccel.caching.root import CachedRoot
from diffaccel.caching.section import StepCache
from diffaccel.caching.sites import Sites, group_of
from diffaccel.caching.stack import Stack
from diffaccel.caching.trajectory import Trajectories, trajectories_of
from diffaccel.denoiser import Denoiser, Site
from diffaccel.errors import PlanError
from diffaccel.report import TechniqueReport
from diffaccel.technique import Context
from diffaccel.timeline import Timeline


@dataclass(frozen=True)
class Resolved:
    """The section and what was calibrated, by component: MagCache's ratios by branch, trajectories, SmoothCache's
    errors by kind of module."""

    section: StepCache
    ratios: Mapping[str, Mapping[str, Ratios]]
    trajectories: Mapping[str, Trajectories]
    lags: Mapping[str, Mapping[str, Lags]]
    sites: Mapping[str, Sequence[Site]]


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
        if section.granularity == "stack" and denoiser.blocks and section.front + section.back >= len(denoiser.blocks):
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
    found = {d.component: trajectories_of(context.artefacts, d.component) for d in context.denoisers}
    trajectories = {component: known for component, known in found.items() if known is not None}
    if section.needs_calibration and section.policy not in ("mag", "smooth") and not trajectories:
        raise PlanError(
            f"StepCache(policy={section.policy!r}, forecast={section.forecast!r}) needs calibrated trajectories, which "
            "this plan has none of; get them by plan = diffaccel.calibrate(pipe, plan, prompts=['two or three'])"
        )
    lags = {d.component: lags_of(context.artefacts, d.component) for d in context.denoisers}
    if section.policy == "smooth" and not any(lags.values()):
        raise PlanError(
            "StepCache(policy='smooth') needs the calibrated errors of modules, which this plan has none of; get them "
            "by plan = diffaccel.calibrate(pipe, plan, prompts=['two or three'])"
        )
    sites = chosen(context.denoisers, section.sites) if section.granularity == "sites" else {}
    resolved = Resolved(section, ratios, trajectories, lags, sites)
    for denoiser in context.denoisers:
        _part(denoiser, resolved)  # some refuse a denoiser by its structure
    return resolved


def attach(resolved: Resolved, context: Context) -> AttachedCache:
    """Put a cache on every denoiser's root."""
    section, caches = resolved.section, {}
    allowance = Allowance(section.memory)
    for denoiser in context.denoisers:
        part = _part(denoiser, resolved)
        if part is not None:
            part.install(context)
        known, name = resolved.trajectories, denoiser.component
        decisions = Decisions(
            section,
            context.clock,
            noise_level(context.pipeline),
            resolved.ratios[name],
            known.get(name),
            [other for component, other in known.items() if component != name],
            resolved.lags[name],
        )
        cache = CachedRoot(section, decisions, part, allowance)
        wrappers = context.root(denoiser).wrappers
        context.undo.callback(wrappers.remove, cache)
        wrappers.append(cache)
        caches[denoiser.component] = cache
    return AttachedCache(section, caches, allowance)


def _part(denoiser: Denoiser, resolved: Resolved) -> Part | None:
    """What is skipped in place of whole calls."""
    section = resolved.section
    if section.granularity == "stack":
        modulated = section.policy == "modulated"
        return Stack(denoiser, section.front, section.back, section.forecast, modulated=modulated)
    if section.granularity == "deep":
        return Deep(denoiser, section.back, section.forecast)
    if section.granularity == "sites":
        sites = resolved.sites.get(denoiser.component, ())
        rules = section.intervals()
        apart = section.policy in ("interval", "smooth")
        groups = [group_of(site, rules) if apart else "" for site in sites]
        return Sites(sites, groups, section.forecast)
    return None


class AttachedCache:
    """Step caching at work."""

    def __init__(self, section: StepCache, caches: Mapping[str, CachedRoot], allowance: Allowance) -> None:
        self._section = section
        self._allowance = allowance
        self._caches = caches

    def report(self) -> TechniqueReport:
        s = self._section
        several = len(self._caches) > 1
        refused = []
        if self._allowance.refused:
            refused = [
                f"memory={self._allowance.limit} bytes left no room for {self._allowance.refused} more: what those "
                "would have held is computed on every step"
            ]
        expected = {name: c.expected_psnr for name, c in self._caches.items() if c.expected_psnr is not None}
        return TechniqueReport(
            "caching",
            f"policy {s.policy}, {_budget(s)}, forecast {s.forecast}" + _where(s),
            sites=len(self._caches),
            facts={
                "policy": s.policy,
                "computed": sum(c.computed for c in self._caches.values()),
                "reused": sum(c.reused for c in self._caches.values()),
                "cache_bytes": sum(c.nbytes for c in self._caches.values()),
                "steps_computed": {name: _computed(c.timeline) for name, c in self._caches.items()},  # of the last run
                "timeline": {name: c.timeline.to_dict() for name, c in self._caches.items()},
                **(
                    {}
                    if s.granularity == "root" and s.memory is None
                    else {"cache_bytes_granted": self._allowance.taken}
                ),
                **({"expected_psnr": expected} if expected else {}),
            },
            notes=[f"{name}: {n}" if several else n for name, c in self._caches.items() for n in c.notes] + refused,
        )

    def bake(self) -> None:
        """Nothing is kept for undoing."""


def _budget(section: StepCache) -> str:
    if section.psnr is not None:
        return f"{section.psnr:g} dB"
    return f"{section.share:.0%} of the steps" if section.share is not None else f"threshold {section.threshold:g}"


def _where(section: StepCache) -> str:
    if section.granularity == "stack":
        return f", in the block stack ({section.front} blocks before it, {section.back} behind)"
    if section.granularity == "deep":
        return f", below the last {section.back} up layers"
    return f", of the modules {section.sites!r}" if section.granularity == "sites" else ""


def _computed(timeline: Timeline) -> list[int] | dict[str, list[int]]:
    """Steps that were computed: in any branch; by group of modules where there are several."""
    found: dict[str, set[int]] = {}
    for row, steps in timeline.computed().items():
        found.setdefault(row.partition(" ")[2], set()).update(steps)
    by_group = {group: sorted(steps) for group, steps in found.items()}
    return by_group.get("", []) if set(by_group) <= {""} else by_group


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

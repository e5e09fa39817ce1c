"""`accelerate`: puts a plan on a live pipeline, and takes it off again to the bit."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

import diffaccel.attention.attach
import diffaccel.caching.attach
import diffaccel.exact.attach
import diffaccel.guidance.attach
import diffaccel.pruning.attach
import diffaccel.quantization.attach
import diffaccel.tokens.attach
from diffaccel.clock import Clock
from diffaccel.denoiser import find_denoisers, find_encoders
from diffaccel.errors import PlanError, did_you_mean
from diffaccel.key import check_key
from diffaccel.plan import TECHNIQUES, Plan
from diffaccel.presets import PRESETS, preset_plan
from diffaccel.report import Report
from diffaccel.technique import Attached, Context, Technique

_MODULES: dict[str, Technique] = {
    "pruning": diffaccel.pruning.attach,
    "quantization": diffaccel.quantization.attach,
    "attention": diffaccel.attention.attach,
    "tokens": diffaccel.tokens.attach,
    "exact": diffaccel.exact.attach,
    "caching": diffaccel.caching.attach,
    "guidance": diffaccel.guidance.attach,
}
_MARK = "_diffaccel"
ORIGINALS = ("cpu", "disk", "device")


class _Mark:
    """On an accelerated denoiser. A copy's hooks would run the original's weights, so there is none."""

    def __reduce__(self) -> Any:
        raise PlanError(
            "an accelerated model cannot be copied or pickled: the hooks of the copy would run this model; call "
            "remove() on the acceleration first, or copy by save_pretrained and from_pretrained"
        )


def accelerate(
    model: Any, plan: str | os.PathLike[str] | Plan = "balanced", *, originals: str = "cpu", profile: bool = False
) -> Accelerated:
    """Apply a plan to a live pipeline or a bare denoiser.

    Args:
        model: a diffusers pipeline (classic or modular) or a denoiser module.
        plan: a preset's name (``lossless``, ``balanced``, ``fast``), a `Plan`, or the path of a saved plan (a text that
            contains a path separator).
        originals: where replaced weights wait for `Accelerated.remove`: ``cpu``, ``disk`` (a temporary folder; frees
            their memory) or ``device``.
        profile: also measure the seconds of each denoiser call.

    Returns:
        A handle with ``report()``, ``remove()``, ``bake()`` and ``clock``; also a context manager.

    Raises:
        PlanError: the plan does not fit this model, or the model is already accelerated. Nothing was changed.
        ModelError: no denoiser in ``model``.
    """
    if originals not in ORIGINALS:
        raise PlanError(f"originals={originals!r}{did_you_mean(str(originals), ORIGINALS)}")
    denoisers = find_denoisers(model)
    for denoiser in denoisers:
        if _MARK in denoiser.module.__dict__:
            raise PlanError(
                f"{denoiser.component} is already accelerated; call remove() on its handle first (after bake() with "
                "caching or attention in the plan: load the model again)"
            )
    resolved_plan, notes = _plan_for(plan, model)
    if resolved_plan.key is not None:
        notes = [*notes, *check_key(resolved_plan.key, denoisers)]
    pipeline = None if isinstance(model, nn.Module) else model
    context = Context(
        denoisers,
        Clock(pipeline),
        resolved_plan.artefacts,
        originals=originals,
        profile=profile,
        pipeline=pipeline,
        encoders=find_encoders(model),
    )
    with ExitStack() as on_failure:  # unwinds unless everything attached
        on_failure.enter_context(context.undo)
        attached, resolved = [], {}
        if cut := resolved_plan.sections("pruning"):  # first, so that the others are resolved on what is left
            pruning = _MODULES["pruning"]
            attached.append(pruning.attach(pruning.resolve(cut, context), context))
            context.denoisers = denoisers = find_denoisers(model)
        for technique in TECHNIQUES:
            if technique != "pruning" and (sections := resolved_plan.sections(technique)):
                try:
                    resolved[technique] = _MODULES[technique].resolve(sections, context)
                except PlanError as refusal:
                    if plan not in PRESETS:
                        raise
                    resolved_plan = resolved_plan.without(technique)
                    notes = [*notes, f"{technique} left out: {refusal}"]
        for denoiser in denoisers:
            object.__setattr__(denoiser.module, _MARK, _Mark())
            context.undo.callback(denoiser.module.__dict__.pop, _MARK, None)
        if profile:
            for denoiser in denoisers:
                context.root(denoiser)
        attached += [_MODULES[technique].attach(sites, context) for technique, sites in resolved.items()]
        notes = [*notes, *diffaccel.quantization.attach.follow_policies(context)]
        on_failure.pop_all()
    return Accelerated(resolved_plan, context, attached, notes)


class Accelerated:
    """A live acceleration. Leaving its ``with`` block, or `remove`, restores the model to the bit.

    Attributes:
        plan: what was applied (for a preset: what it came to on this model and device).
        clock: where the denoising loop stands; drive it by hand for a bare denoiser in a loop of your own.
    """

    def __init__(self, plan: Plan, context: Context, attached: list[Attached], notes: list[str]) -> None:
        self.plan = plan
        self.clock = context.clock
        self._context = context
        self._attached = attached
        self._notes = notes
        self._state = "attached"

    def report(self) -> Report:
        """What happened so far: per technique its sites, counts, bytes and fallbacks."""
        roots = self._context.roots
        return Report(
            plan=self.plan.name or "custom",
            denoisers={d.component: type(d.module).__name__ for d in self._context.denoisers},
            calls={
                d.component: roots[d.component].calls if d.component in roots else 0 for d in self._context.denoisers
            },
            techniques=[a.report() for a in self._attached],
            notes=list(self._notes),
            seconds={c: list(r.seconds) for c, r in roots.items() if r.seconds is not None},
        )

    def remove(self) -> None:
        """Restore the model to the bit. A second call does nothing.

        Raises:
            PlanError: after `bake`, which freed what this needs.
        """
        if self._state == "baked":
            raise PlanError("remove() after bake(): the originals were freed; load the model again")
        if self._state == "attached":
            self._state = "removed"
            self._context.undo.close()

    def bake(self) -> None:
        """Make the acceleration permanent and free the originals. ``save_pretrained`` then saves the compressed form.

        Raises:
            PlanError: after `remove`.
        """
        if self._state == "removed":
            raise PlanError("bake() after remove(): nothing is attached; call accelerate() again")
        if self._state == "attached":
            self._state = "baked"
            for attached in self._attached:
                attached.bake()
            self._context.undo.pop_all()
            if not self._context.roots:  # no hooks: a plain model with other weights, which may be accelerated further
                for denoiser in self._context.denoisers:
                    denoiser.module.__dict__.pop(_MARK, None)

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, *error: object) -> None:
        if self._state == "attached":
            self.remove()

    def __repr__(self) -> str:
        return f"<Accelerated {self.plan.name or 'custom plan'}, {self._state}>"


def _plan_for(plan: str | os.PathLike[str] | Plan, model: Any) -> tuple[Plan, list[str]]:
    """The plan itself, and what a preset left out."""
    if isinstance(plan, Plan):
        return plan, []
    if isinstance(plan, os.PathLike):
        return Plan.load(plan), []
    if not isinstance(plan, str):
        raise PlanError(f"plan must be a preset name, a Plan or a path, got {plan!r:.200}")
    if "/" in plan or os.sep in plan:
        return Plan.load(Path(plan).expanduser()), []
    if plan not in PRESETS:
        raise PlanError(f"no preset {plan!r}{did_you_mean(plan, PRESETS)} (or ./{plan} for a saved plan's folder)")
    return preset_plan(plan, find_denoisers(model))

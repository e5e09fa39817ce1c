"""Leaves the unconditional branch of guidance out on some steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffaccel.clock import Call
from diffaccel.forecast import Forecast
from diffaccel.guidance import halves
from diffaccel.guidance.frequency import mixed
from diffaccel.guidance.section import GuidanceReuse
from diffaccel.latents import latent_tensors, output_like, output_tensors
from diffaccel.plan import in_steps
from diffaccel.report import TechniqueReport
from diffaccel.root import Compute
from diffaccel.technique import Context
from diffaccel.timeline import Timeline


def resolve(sections: Sequence[GuidanceReuse], context: Context) -> GuidanceReuse:
    """There is one section, for all denoisers."""
    (section,) = sections
    return section


def attach(section: GuidanceReuse, context: Context) -> AttachedGuidance:
    """Put it around every denoiser's call, innermost: a step cache then sees whole outputs, always of one size."""
    reused = {}
    for denoiser in context.denoisers:
        wrapper = ReusedGuidance(section)
        wrappers = context.root(denoiser).wrappers
        context.undo.callback(wrappers.remove, wrapper)
        wrappers.insert(0, wrapper)
        reused[denoiser.component] = wrapper
    return AttachedGuidance(section, reused)


class ReusedGuidance:
    """Runs around the calls of one denoiser.

    With two calls per step, the conditional one first, the second is left out. With one call of both halves, known by
    latents that are there twice, the first half is cut from the batch (the unconditional one in nearly all pipelines;
    where it is the other, so is the sign of the difference). That this gives the second half of the output is tried
    once for each size; a denoiser that mixes samples is left alone.
    """

    def __init__(self, section: GuidanceReuse) -> None:
        self._section = section
        # By shapes of the latents: how the arguments of half a batch are made, None where no way works.
        self._cuts: dict[tuple[torch.Size, ...], halves.Cut | None] = {}
        self.computed = self.reused = 0
        self.notes: dict[str, None] = {}
        self.timeline = Timeline()
        self._begin(None)

    def _begin(self, run: int | None) -> None:
        self._run, self._step = run, -1
        self._joint: bool | None = None  # whether calls hold both halves; not known yet
        kept = "hold" if self._section.forecast in ("zero", "frequency") else self._section.forecast
        self._difference = Forecast(kept)
        self._rate: float | None = None  # share of the conditional output by which the difference changes a step
        self._agreed = False
        self._learnt = -1  # step at which the branch was computed last
        self._since = 0  # steps since the branch was computed
        self._cond: tuple[int, list[Tensor]] | None = None  # step and output of the last conditional call
        self._template: Any = None
        self._shapes: list[torch.Size] = []  # of the last output, and whether it was a list
        self._listed = False

    def __call__(self, call: Call, arguments: Mapping[str, Any], compute: Compute) -> Any:
        if call.run != self._run or call.step < self._step:
            self._begin(call.run)
            self.timeline = Timeline()
        first, self._step = self._step < 0, call.step
        try:
            if call.branch == "uncond":
                return self._second(call, compute)
            latents = latent_tensors(arguments)
            if self._joint is None and not first:  # at the first step a batch of two may have the same noise
                self._joint = halves.are_equal(latents, self._shapes, self._listed)
            if self._joint:
                return self._batched(call, arguments, tuple(x.shape for x in latents), compute)
            output = compute()
            outputs = output_tensors(output)
            self._shapes, self._listed = [v.shape for v in outputs], halves.list_of(output) is not None
            self._cond = call.step, [v.detach().clone() for v in outputs]
            return output
        except BaseException:
            self._begin(None)
            raise

    def _second(self, call: Call, compute: Compute) -> Any:
        """The unconditional call of a step."""
        if self._cond is None or self._cond[0] != call.step:
            self.notes["the unconditional call comes first, so there is nothing to tell it from: computed"] = None
            return compute()
        cond = self._cond[1]
        if self._may_leave_out(call) and self._template is not None:
            self._count(call, reused=True)
            return output_like(self._template, self._without(cond, call))
        output = compute()
        self._template = output
        self._learn(cond, output_tensors(output), call)
        return output

    def _batched(
        self, call: Call, arguments: Mapping[str, Any], shapes: tuple[torch.Size, ...], compute: Compute
    ) -> Any:
        """One call of both halves."""
        cut = self._cuts.get(shapes)
        if cut is not None and self._may_leave_out(call):
            output = compute(cut)
            second = output_tensors(output)
            self._count(call, reused=True)
            return halves.joined(output, self._without(second, call), second)
        output = compute()
        if shapes not in self._cuts and in_steps(call.progress, self._section.steps):
            cut = self._cuts[shapes] = halves.cut_that_works(arguments, compute, output)
            if cut is None:
                self.notes["half a batch does not give half the output: nothing is left out"] = None
            if cut is not None and self._may_leave_out(call):  # as later runs will, which need not try
                _, second = halves.split(output)
                self._count(call, reused=True)
                return halves.with_first(output, self._without(second, call))
        if cut is not None or shapes not in self._cuts:
            first, second = halves.split(output)
            self._learn(second, first, call)
        return output

    def _may_leave_out(self, call: Call) -> bool:
        if not in_steps(call.progress, self._section.steps):
            return False
        if self._section.forecast == "zero":
            return True
        if self._difference.empty:
            return False
        if self._agreed:
            return True
        if self._since >= self._section.every - 1:
            return False
        change = self._section.change
        return change is None or (self._rate is not None and self._rate * (self._since + 1) <= change)

    def _without(self, cond: list[Tensor], call: Call) -> list[Tensor]:
        """The unconditional output: the conditional one less the forecast difference."""
        if self._section.forecast == "zero":
            return [v.clone() for v in cond]
        differences = output_tensors(self._difference([], _time(call)))
        if self._section.forecast == "frequency":
            differences = [mixed(d, call.progress) for d in differences]
        return [(v.float() - d).to(v.dtype) for v, d in zip(cond, differences, strict=True)]

    def _learn(self, cond: list[Tensor], uncond: list[Tensor], call: Call) -> None:
        self._count(call, reused=False)
        if self._section.forecast != "zero":
            difference = [a.float() - b.float() for a, b in zip(cond, uncond, strict=True)]
            if self._section.change is not None and not self._difference.empty:
                moved = sum(
                    float((d - e).abs().mean()) for d, e in zip(difference, self._difference.outputs, strict=True)
                )
                size = sum(float(v.float().abs().mean()) for v in cond)
                self._rate = moved / max(size, 1e-12) / max(call.step - self._learnt, 1)
            self._learnt = call.step
            self._difference.record([], difference, _time(call))
            if self._section.agree is not None and in_steps(call.progress, self._section.steps):
                self._agreed = _similarity(cond, uncond) >= self._section.agree

    def _count(self, call: Call, *, reused: bool) -> None:
        held = "reused" if self._section.forecast in ("hold", "zero") else "forecast"
        self.timeline.note(call.step, "without prompt", held if reused else "computed", call.steps)
        self._since = self._since + 1 if reused else 0
        self.reused += reused
        self.computed += not reused


def _similarity(a: list[Tensor], b: list[Tensor]) -> float:
    """The least cosine similarity of two samples at the same place."""
    pairs = [(x.float().flatten(1), y.float().flatten(1)) for x, y in zip(a, b, strict=True)]
    return min(float(torch.nn.functional.cosine_similarity(x, y).min()) for x, y in pairs)


def _time(call: Call) -> float:
    return call.timestep if call.timestep is not None else float(call.step)


class AttachedGuidance:
    """Guidance reuse at work; see `diffaccel.technique.Attached`."""

    def __init__(self, section: GuidanceReuse, reused: Mapping[str, ReusedGuidance]) -> None:
        self._section, self._reused = section, reused

    def report(self) -> TechniqueReport:
        s = self._section
        parts = self._reused.items()
        several = len(self._reused) > 1
        notes = [f"{name}: {note}" if several else note for name, r in parts for note in r.notes]
        if not any(r.computed or r.reused or r.notes for _, r in parts):
            notes.append("no unconditional branch was seen: there is no guidance, or its scale leaves it out")
        return TechniqueReport(
            "guidance",
            f"every {s.every} steps, forecast {s.forecast}, for progress {s.steps[0]:g} to {s.steps[1]:g}"
            + (f", while it changes by at most {s.change:g}" if s.change is not None else "")
            + (f", until both agree to {s.agree:g}" if s.agree is not None else ""),
            sites=len(self._reused),
            facts={
                "uncond_computed": sum(r.computed for _, r in parts),
                "uncond_reused": sum(r.reused for _, r in parts),
                "timeline": {name: rows for name, r in parts if (rows := r.timeline.to_dict())},
            },
            notes=notes,
        )

    def bake(self) -> None:
        """Nothing is kept for undoing."""

"""`learn_rounding`: rounds weights so that the network's blocks give what they gave, not each weight by itself.

Block by block (BRECQ, arXiv:2102.05426): inputs and outputs of one block are captured from denoiser calls along the
true trajectory; then its weights' rounding (see `rounding`) is learnt so that the output stays, with the inputs of the
untouched network. Calls that were not learnt from decide whether the result is kept: where they come out worse than
with rounding to nearest, that stays. Takes a block's activations of a few calls, and a few hundred of its forward and
backward passes: for models that fit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from diffaccel.clock import Call
from diffaccel.denoiser import Site, select
from diffaccel.errors import PlanError
from diffaccel.key import plan_key
from diffaccel.plan import Artefacts, Plan, in_steps
from diffaccel.quantization.block_samples import Sample, capture
from diffaccel.quantization.calibrate import Checkpoint
from diffaccel.quantization.channels import PREFIX, channels_of
from diffaccel.quantization.eligible import form_at, parameter_users, why_not
from diffaccel.quantization.prepare import Learnable, learnable, learnt_key
from diffaccel.quantization.replay import Recorded, Recorder, at_work
from diffaccel.quantization.rounding import Rounding, annealed
from diffaccel.quantization.section import Quantize
from diffaccel.technique import Context

_CALLS_PER_PROMPT = 4
_KEPT_BACK = 4  # every how manieth call decides whether what was learnt is kept
_RATE, _RATE_OF_GAINS = 5e-2, 2e-3
_UNDECIDED = 5.0  # how much undecided codes count beside the error of rounding to nearest


@dataclass(frozen=True)
class _Unit:
    """What is learnt together: sites of one section in one block, by the name of their weight within it."""

    component: str
    name: str
    module: nn.Module
    section: Quantize
    sites: Mapping[str, Site]

    def starts(self, artefacts: Artefacts) -> dict[str, Learnable]:
        """Their weights, by the same names.

        Raises:
            PlanError: one was not calibrated, or is not finite.
        """
        return {name: _learnable(site, self.section, artefacts) for name, site in self.sites.items()}


def learn_rounding(
    pipe: Any,
    plan: Plan | Quantize,
    *,
    prompts: str | Mapping[str, Any] | Iterable[str | Mapping[str, Any]],
    iterations: int = 300,
    folder: str | os.PathLike[str] | None = None,
    **call: Any,
) -> Plan:
    """Learn the rounding that ``Quantize(rounding="learnt")`` sections of ``plan`` ask for.

    Args:
        pipe: a diffusers pipeline that is not accelerated.
        plan: calibrated, where its sections need that.
        prompts: texts, or arguments of a call each; eight or more. Four denoiser calls of each are learnt from.
        iterations: of every block; more = closer, in proportion slower.
        folder: where every block's result is kept as it is found; with the same arguments, a run that was cut off goes
            on from there.
        **call: further arguments of every call, such as ``num_inference_steps``.

    Returns:
        The plan with the rounded weights as artefacts, and the key of this model.

    Raises:
        PlanError: no section wants it, no prompts, a plan that is not calibrated, a folder with something else, or
            weights that are not finite.
    """
    plan = Plan(quantization=(plan,)) if isinstance(plan, Quantize) else plan
    sections = [s for s in plan.quantization if isinstance(s, Quantize) and s.rounding == "learnt"]
    given = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
    requests = [{**call, **(p if isinstance(p, Mapping) else {"prompt": p})} for p in given]
    if not sections:
        raise PlanError("nothing in this plan has rounding to learn; Quantize(rounding='learnt') does")
    if not requests or iterations < 1:
        raise PlanError(f"learn_rounding needs prompts and iterations >= 1, got {len(requests)} and {iterations}")
    with at_work(pipe, artefacts=plan.artefacts) as context:
        units = _units(sections, context)
        key = plan_key(context.denoisers)
        settings = [key, [s.to_dict() for s in sections], requests, iterations]
        checkpoint = Checkpoint(Path(folder) / "rounding", settings) if folder is not None else None
        done, found = checkpoint.load() if checkpoint else (0, {})
        calls = _record(pipe, context, requests) if done < len(units) else []
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("", total=len(units) * iterations, completed=done * iterations)
            for i, unit in enumerate(units[done:], done + 1):
                progress.update(task, description=f"learning {unit.name}", completed=(i - 1) * iterations)
                inside = [
                    c for c in calls if c.component == unit.component and in_steps(c.progress, unit.section.steps)
                ]
                samples = capture(unit.module, inside, context)
                found |= _learn(unit, samples, plan.artefacts, iterations, lambda: progress.advance(task))
                if checkpoint:
                    checkpoint.save(i, found)
    return replace(plan, artefacts=Artefacts({**plan.artefacts, **found}), key=key)


def _units(sections: Sequence[Quantize], context: Context) -> list[_Unit]:
    """Blocks with sites of a section, in the order of execution; sites outside any block by themselves."""
    users, units = parameter_users(context.denoisers), []
    for section in sections:
        sites = [s for s in select(context.denoisers, section.sites, "layers") if why_not(s.module, users) is None]
        for site in (sites := [s for s in sites if form_at(section, s).conditioning.learnt]):
            _learnable(site, section, context.artefacts)  # raises before any time is spent
        for denoiser in context.denoisers:
            own = [s for s in sites if s.component == denoiser.component]
            loose = [(s.name, s.module) for s in own if not any(_within(s.name, name) for name, _ in denoiser.blocks)]
            for name, module in (*denoiser.blocks, *loose):
                inside = {f"{s.name}.weight"[len(name) + 1 :]: s for s in own if _within(s.name, name)}
                if inside:
                    full = f"{denoiser.component}.{name}"
                    units.append(_Unit(denoiser.component, full, module, section, inside))
    if not units:
        raise PlanError("the sections with rounding to learn match no linear that can be quantized")
    return units


def _within(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")


def _learnable(site: Site, section: Quantize, artefacts: Artefacts) -> Learnable:
    channels = channels_of(artefacts, site)
    if section.balance is not None and (channels is None or not channels.measured):
        raise PlanError(
            f"learn_rounding: this plan balances {site.full_name}, but was not calibrated; get it by "
            "plan = diffaccel.calibrate(pipe, plan, prompts=[...]) first"
        )
    weight = site.module._parameters["weight"]
    assert weight is not None
    if not bool(weight.isfinite().all()):
        raise PlanError(f"{site.full_name} holds weights that are not finite; exclude it by '!{site.full_name}'")
    return learnable(weight, section.steps, form_at(section, site), channels)


def _record(pipe: Any, context: Context, requests: Sequence[Mapping[str, Any]]) -> list[Recorded]:
    """A few denoiser calls of each request, spread over its steps."""

    def wanted(call: Call) -> bool:
        assert call.steps is not None
        marks = {round((i + 0.5) / _CALLS_PER_PROMPT * (call.steps - 1)) for i in range(_CALLS_PER_PROMPT)}
        return call.step in marks

    recorder = Recorder(context, wanted)
    try:
        for request in requests:
            pipe(**{**request, "output_type": "latent"})
    finally:
        recorder.remove()
    if not recorder.calls:
        raise PlanError(f"{type(pipe).__name__} never called its denoiser; check the call's arguments")
    return recorder.calls


def _learn(
    unit: _Unit, samples: Sequence[Sample], artefacts: Artefacts, iterations: int, advance: Callable[[], None]
) -> dict[str, Tensor]:
    """A unit's stored tensors by artefact name: learnt, or rounded to nearest where that is no worse."""
    starts = unit.starts(artefacts)
    roundings = {name: Rounding(start.weight, start.tensors, start.run) for name, start in starts.items()}
    kept_back = samples[_KEPT_BACK - 1 :: _KEPT_BACK] or samples
    seen = [s for i, s in enumerate(samples) if i % _KEPT_BACK != _KEPT_BACK - 1] or samples
    stored = {name: start.tensors for name, start in starts.items()}
    if samples:
        nearest = {name: r.nearest() for name, r in roundings.items()}
        _optimise(unit.module, roundings, seen, _error(unit.module, seen, nearest), iterations, advance)
        with torch.no_grad():
            learnt = {name: r.weight(hard=True) for name, r in roundings.items()}
        if _error(unit.module, kept_back, learnt) < _error(unit.module, kept_back, nearest):
            stored = {name: r.tensors() for name, r in roundings.items()}
    found: dict[str, Tensor] = {}
    for name, site in unit.sites.items():
        prefix = f"{PREFIX}.{site.full_name}.learnt.{learnt_key(form_at(unit.section, site))}"
        found |= {f"{prefix}.{key}": tensor.cpu().contiguous() for key, tensor in stored[name].items()}
    return found


@torch.no_grad()
def _error(module: nn.Module, samples: Sequence[Sample], weights: Mapping[str, Tensor]) -> float:
    return sum(float(sample.error(module, weights)) for sample in samples) / len(samples)


@torch.enable_grad()
def _optimise(
    module: nn.Module,
    roundings: Mapping[str, Rounding],
    samples: Sequence[Sample],
    of_nearest: float,
    iterations: int,
    advance: Callable[[], None],
) -> None:
    """Adam on one sample at a time; errors count relative to ``of_nearest``, that of rounding to nearest."""
    generator = torch.Generator().manual_seed(0)  # its own: the user's noise stays as it is
    values, gains = [r.v for r in roundings.values()], [r.gain for r in roundings.values()]
    optimizer = torch.optim.Adam([{"params": values, "lr": _RATE}, {"params": gains, "lr": _RATE_OF_GAINS}])
    total = sum(r.v.numel() for r in roundings.values())
    for i in range(iterations):
        sample = samples[int(torch.randint(len(samples), (), generator=generator))]
        weight, beta = annealed(i / iterations)
        loss = sample.error(module, {name: r.weight() for name, r in roundings.items()}) / max(of_nearest, 1e-30)
        for r in roundings.values() if weight else ():
            loss = loss + _UNDECIDED * weight * r.undecided(beta) * r.v.numel() / total
        gradients = torch.autograd.grad(loss, values + gains)  # not of the block's own parameters
        for parameter, gradient in zip(values + gains, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        advance()

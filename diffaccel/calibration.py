"""`calibrate`: measures what a plan's techniques need to know about a model, and gives the plan with it."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from diffaccel.attach import accelerate
from diffaccel.attention.calibrate import calibrate_section
from diffaccel.attention.section import BlockSparse
from diffaccel.caching import calibrate as caching
from diffaccel.caching.ratios import Recorder
from diffaccel.caching.section import StepCache
from diffaccel.clock import Call
from diffaccel.denoiser import find_denoisers
from diffaccel.errors import PlanError
from diffaccel.key import plan_key
from diffaccel.plan import Artefacts, Plan, Section
from diffaccel.quantization.calibrate import Checkpoint, recorders_of
from diffaccel.quantization.channels import ChannelRecorder
from diffaccel.quantization.section import Quantize
from diffaccel.root import Compute
from diffaccel.technique import Context


def calibrate(
    pipe: Any,
    plan: Plan | Section,
    *,
    prompts: str | Mapping[str, Any] | Iterable[Any],
    folder: str | os.PathLike[str] | None = None,
    **call: Any,
) -> Plan:
    """Run the pipeline on a few prompts and give the plan with what was measured.

    Quantized linears whose channels are balanced or whose text is protected need to know their inputs along the
    unaccelerated trajectory: some tens of prompts. Caches are calibrated with the rest of the plan attached, so that
    the numbers belong to the network that will run: MagCache on one prompt; a schedule of steps on two to four, each
    of which takes about twelve runs. Use the scheduler and step count that will be used (other step
    counts are derived from them).

    Args:
        pipe: a diffusers pipeline that is not accelerated.
        plan: a `Plan`, or a section alone, such as ``StepCache(policy="mag")`` or ``Quantize(balance=0.5)``.
        prompts: prompts, or for pipelines that take no text the arguments of a call each, such as
            ``[{"class_labels": [3]}]``.
        folder: where the measurement of channels is kept as it grows, one call at a time; with the same arguments, one
            that was cut off goes on from there.
        **call: further arguments of every call, such as ``num_inference_steps``.

    Returns:
        The plan with artefacts and the key of this model.

    Raises:
        PlanError: nothing in the plan needs calibration, no prompts, no pipeline, one that is already accelerated, or a
            folder with another calibration.
        ModelError: no denoiser in ``pipe``.
    """
    plan = _as_plan(plan)
    cached = isinstance(plan.caching, StepCache) and plan.caching.needs_calibration
    quantized = [s for s in plan.quantization if isinstance(s, Quantize) and s.needs_calibration]
    sparse = any(isinstance(s, BlockSparse) and s.needs_calibration for s in plan.attention)
    if not cached and not quantized and not sparse:
        raise PlanError(
            "nothing in this plan needs calibration; StepCache with policy='mag', policy='schedule' or "
            "forecast='fitted' does, Quantize with balance, protect or static activations, "
            "and BlockSparse with reorder or policy='mass'"
        )
    requests = _requests(prompts)
    if isinstance(pipe, nn.Module):
        raise PlanError(f"calibrate runs a pipeline, got the bare denoiser {type(pipe).__name__}; give its pipeline")
    key = plan_key(find_denoisers(pipe))
    found: dict[str, Tensor] = {}
    if quantized:
        settings = [key, [s.to_dict() for s in quantized], requests, call]
        pruned = Plan(pruning=plan.pruning, artefacts=plan.artefacts)  # what is left is what gets quantized
        settings += [{n: t.tolist() for n, t in plan.artefacts.items()}] if plan.pruning else []
        found |= _channels(pipe, pruned, quantized, requests, call, Checkpoint(folder, settings) if folder else None)
        plan = dataclasses.replace(plan, artefacts=Artefacts({**plan.artefacts, **found}))
    if sparse:
        found |= _masks(pipe, plan, requests, call)
        plan = dataclasses.replace(plan, artefacts=Artefacts({**plan.artefacts, **found}))
    if cached:
        assert isinstance(plan.caching, StepCache)
        others = dataclasses.replace(plan, caching=None)
        if plan.caching.policy == "mag":
            found |= _ratios(pipe, others, requests, call)
        if plan.caching.policy == "smooth":
            with _watched(pipe, others, len(requests)) as context:
                runs = [partial(pipe, **{**call, **request}) for request in requests]
                found |= caching.measure_lags(context, plan.caching, runs)
        if plan.caching.policy == "schedule" or plan.caching.forecast == "fitted":
            found |= _trajectories(pipe, others, plan.caching, requests, call)
    return dataclasses.replace(plan, artefacts=Artefacts({**plan.artefacts, **found}), key=key)


def _channels(
    pipe: Any,
    pruned: Plan,
    sections: Sequence[Quantize],
    requests: Sequence[Mapping[str, Any]],
    call: Mapping[str, Any],
    checkpoint: Checkpoint | None,
) -> dict[str, Tensor]:
    """What quantized linears need to know, measured on the unaccelerated pipeline, or on one that is only pruned."""
    done, state = checkpoint.load() if checkpoint else (0, {})
    with _watched(pipe, pruned, len(requests) - done) as context, ExitStack() as hooks:
        recorders = recorders_of(sections, context.denoisers, context.encoders)
        for recorder in recorders.values():
            hooks.callback(recorder.remove)
            recorder.merge(state)
        for denoiser in context.denoisers:
            if denoiser.component in recorders:
                context.root(denoiser).listeners.append(recorders[denoiser.component].follow)
        for i, request in enumerate(requests[done:], done + 1):
            pipe(**{**call, **request})
            if checkpoint:
                checkpoint.save(i, {n: t for r in recorders.values() for n, t in r.state().items()})
    return _found(pipe, recorders.values())


def _masks(pipe: Any, plan: Plan, requests: Sequence[Mapping[str, Any]], call: Mapping[str, Any]) -> dict[str, Tensor]:
    """Orders and masks of sparse attention, each section on the pipeline with dense attention and every step run."""
    dense = dataclasses.replace(plan, attention=(), caching=None, guidance=None)
    found: dict[str, Tensor] = {}
    for index, section in enumerate(plan.attention):
        if isinstance(section, BlockSparse) and section.needs_calibration:
            with _watched(pipe, dense, len(requests) + 1) as context:

                def run(some: Sequence[Mapping[str, Any]]) -> None:
                    for request in some:
                        pipe(**{**call, **request})

                found |= calibrate_section(index, section, context, partial(run, requests[:1]), partial(run, requests))
    return found


def _ratios(
    pipe: Any, others: Plan, requests: Sequence[Mapping[str, Any]], call: Mapping[str, Any]
) -> dict[str, Tensor]:
    """MagCache's ratios of the network that ``others`` make of the pipeline."""
    with _watched(pipe, others, len(requests)) as context:
        recorders = []
        for denoiser in context.denoisers:
            recorders.append(Recorder(denoiser))
            context.root(denoiser).wrappers.append(recorders[-1])
        for request in requests:
            pipe(**{**call, **request})
    return _found(pipe, recorders)


def _trajectories(
    pipe: Any, others: Plan, section: StepCache, requests: Sequence[Mapping[str, Any]], call: Mapping[str, Any]
) -> dict[str, Tensor]:
    """What static schedules need, of the network that ``others`` make of the pipeline."""
    takes = inspect.signature(pipe.__call__).parameters

    def runner(index: int, request: Mapping[str, Any]) -> caching.Run:
        arguments = {**call, **request}
        if "output_type" in takes:
            arguments.setdefault("output_type", "np")  # floats, not yet rounded to 256 levels
        given = arguments.get("generator")
        states = [(g, g.get_state()) for g in (given if isinstance(given, list) else [given]) if g is not None]

        def run() -> Tensor:
            for generator, state in states:
                generator.set_state(state)
            if not states and "generator" in takes:
                arguments["generator"] = torch.Generator("cpu").manual_seed(index)
            return caching.result_of(pipe(**arguments))

        return run

    with _watched(pipe, others, len(requests) * caching.LENGTH) as context:
        found = caching.measure(context, section, [runner(i, request) for i, request in enumerate(requests)])
    if not found:
        raise PlanError(
            f"{type(pipe).__name__} never called its denoiser while calibrating; check the call's arguments"
        )
    return found


def _found(pipe: Any, recorders: Iterable[Recorder | ChannelRecorder]) -> dict[str, Tensor]:
    artefacts = {name: tensor for recorder in recorders for name, tensor in recorder.artefacts()}
    if not artefacts:
        raise PlanError(
            f"{type(pipe).__name__} never called its denoiser while calibrating; check the call's arguments"
        )
    return artefacts


@contextmanager
def _watched(pipe: Any, plan: Plan, runs: int) -> Iterator[Context]:
    """The pipeline with ``plan`` and a progress bar of its steps over ``runs`` calls; gives what hooks go on.

    Hooks on a root go with the acceleration.
    """
    with accelerate(pipe, plan) as accel, Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("calibrating", total=None)

        def show(now: Call, arguments: Mapping[str, Any], compute: Compute) -> None:
            progress.update(task, total=runs * (now.steps or 1), advance=1 if now.first_in_step else 0)

        for denoiser in accel._context.denoisers:
            accel._context.root(denoiser).listeners.append(show)
        with _quiet(pipe):
            yield accel._context


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """The pipeline's own progress bar off; ours stands for all prompts."""
    own = pipe.__dict__.get("_progress_bar_config")
    pipe._progress_bar_config = {**(own or {}), "disable": True}
    try:
        yield
    finally:
        pipe.__dict__.pop("_progress_bar_config")
        if own is not None:
            pipe._progress_bar_config = own


def _as_plan(plan: Plan | Section) -> Plan:
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, Section):
        if isinstance(plan, Quantize):
            return Plan(quantization=(plan,))
        if isinstance(plan, BlockSparse):
            return Plan(attention=(plan,))
        return Plan(caching=plan) if isinstance(plan, StepCache) else Plan()
    raise PlanError(f"calibrate needs a Plan or a section such as StepCache(policy='mag'), got {type(plan).__name__}")


def _requests(prompts: Any) -> list[dict[str, Any]]:
    single = isinstance(prompts, str | Mapping)
    items = [prompts] if single else list(prompts) if isinstance(prompts, Iterable) else []
    if not items or not all(isinstance(item, str | Mapping) for item in items):
        raise PlanError(f"calibrate needs prompts: one text or more (or the arguments of a call each), got {prompts!r}")
    return [dict(item) if isinstance(item, Mapping) else {"prompt": item} for item in items]

"""`calibrate`: measures what a plan's techniques need to know about a model, and gives the plan with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import Progress
from torch import nn

from diffaccel.attach import accelerate
from diffaccel.caching.ratios import Recorder
from diffaccel.caching.section import StepCache
from diffaccel.clock import Call
from diffaccel.denoiser import find_denoisers
from diffaccel.errors import PlanError
from diffaccel.key import plan_key
from diffaccel.plan import Artefacts, Plan, Section
from diffaccel.root import Compute


def calibrate(
    pipe: Any, plan: Plan | Section, *, prompts: str | Mapping[str, Any] | Iterable[Any], **call: Any
) -> Plan:
    """Run the pipeline on a few prompts and give the plan with what was measured.

    The rest of the plan is attached while measuring, so that the numbers belong to the network that will run. MagCache
    needs one prompt; use the scheduler and step count that will be used (other step counts are derived from them).

    Args:
        pipe: a diffusers pipeline that is not accelerated.
        plan: a `Plan`, or a section alone, such as ``StepCache(policy="mag")``.
        prompts: prompts, or for pipelines that take no text the arguments of a call each, such as
            ``[{"class_labels": [3]}]``.
        **call: further arguments of every call, such as ``num_inference_steps``.

    Returns:
        The plan with artefacts and the key of this model.

    Raises:
        PlanError: nothing in the plan needs calibration, no prompts, no pipeline, or one that is already accelerated.
        ModelError: no denoiser in ``pipe``.
    """
    plan = _as_plan(plan)
    if not (isinstance(plan.caching, StepCache) and plan.caching.policy == "mag"):
        raise PlanError('nothing in this plan needs calibration; StepCache(policy="mag") does')
    requests = _requests(prompts)
    if isinstance(pipe, nn.Module):
        raise PlanError(f"calibrate runs a pipeline, got the bare denoiser {type(pipe).__name__}; give its pipeline")
    key = plan_key(find_denoisers(pipe))
    others = dataclasses.replace(plan, caching=None)
    with accelerate(pipe, others) as accel, Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("calibrating", total=None)

        def show(now: Call, arguments: Mapping[str, Any], compute: Compute) -> None:
            progress.update(task, total=len(requests) * (now.steps or 1), advance=1 if now.first_in_step else 0)

        recorders = []
        for denoiser in accel._context.denoisers:
            root = accel._context.root(denoiser)  # goes with the acceleration, and with it what is put there
            recorders.append(Recorder(denoiser))
            root.wrappers.append(recorders[-1])
            root.listeners.append(show)
        with _quiet(pipe):
            for request in requests:
                pipe(**{**call, **request})
    artefacts = {name: tensor for recorder in recorders for name, tensor in recorder.artefacts()}
    if not artefacts:
        raise PlanError(
            f"{type(pipe).__name__} never called its denoiser while calibrating; check the call's arguments"
        )
    return dataclasses.replace(plan, artefacts=Artefacts({**plan.artefacts, **artefacts}), key=key)


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
        return Plan(caching=plan) if isinstance(plan, StepCache) else Plan()
    raise PlanError(f"calibrate needs a Plan or a section such as StepCache(policy='mag'), got {type(plan).__name__}")


def _requests(prompts: Any) -> list[dict[str, Any]]:
    single = isinstance(prompts, str | Mapping)
    items = [prompts] if single else list(prompts) if isinstance(prompts, Iterable) else []
    if not items or not all(isinstance(item, str | Mapping) for item in items):
        raise PlanError(f"calibrate needs prompts: one text or more (or the arguments of a call each), got {prompts!r}")
    return [dict(item) if isinstance(item, Mapping) else {"prompt": item} for item in items]

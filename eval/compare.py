"""`compare`: plans against the unaccelerated pipeline and against fewer steps, in speed, fidelity and memory.

All rows take turns prompt by prompt, so that a machine whose speed drifts is unfair to none. The control that every row
has to beat is the same pipeline with fewer steps at the same cost.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from diffaccel.denoiser import find_denoisers
from diffaccel.errors import InputError
from diffaccel.eval.generate import Job, generate, steps_of
from diffaccel.eval.measures import Chosen, measures_of, text_of
from diffaccel.eval.meter import metered
from diffaccel.eval.peers import peers_of
from diffaccel.eval.processes import Processes
from diffaccel.eval.result import Result
from diffaccel.eval.settings import FEWER_STEPS, Request, conditions_of
from diffaccel.eval.store import REFERENCE, Store, digest
from diffaccel.eval.summary import matching_steps, result_of, speedup_of
from diffaccel.inspection.quiet import quiet
from diffaccel.inspection.weights import module_bytes
from diffaccel.pipelines.tasks import makes_video
from diffaccel.plan import Plan

PlanLike = str | os.PathLike[str] | Plan
Apply = Callable[[Any], AbstractContextManager[Any]]
"""Puts any acceleration on a pipeline: called with it, returns what takes it off again on leaving."""


_TRIAL_STEPS = 6  # enough for caches to skip some


@dataclass(frozen=True)
class Variant:
    """One row to be: how the pipeline is changed, and what its calls say instead."""

    name: str
    kind: str
    apply: Apply
    steps: int | None = None


def compare(
    model: Any,
    plans: Mapping[str, PlanLike | Apply] | Sequence[str],
    prompts: Sequence[str | Mapping[str, Any]],
    seeds: Sequence[int] = (0,),
    calls: Mapping[str, Any] | None = None,
    controls: Sequence[str | int] = (FEWER_STEPS,),
    repeats: int = 1,
    *,
    measures: Sequence[str] = (),
    peers: Sequence[str] = (),
    folder: str | os.PathLike[str] | None = None,
    turn: int = 4,
    noise_floor: bool = False,
    progress: bool = True,
) -> Result:
    """Run a pipeline with each plan and without, and measure what each gains and costs.

    Every prompt runs alone (batch 1) with every seed from a CPU generator. A turn is: for each row, attach, two steps
    of warm-up, then ``turn`` prompts. The reference is generated once. Nothing stays on the pipeline, which is checked.
    Processes that ``accelerate launch`` started share the items; each returns the result of all.

    Args:
        model: a diffusers pipeline, or what `diffaccel.pipelines.load` returns (its default arguments then apply).
        plans: by row name: what `diffaccel.accelerate` takes, or a function that gets the pipeline, applies any
            acceleration and returns the context manager that takes it off. A list of presets is short for itself.
        prompts: texts, or arguments of the call by name (such as ``image`` and ``prompt``).
        seeds: of the generators.
        calls: further arguments of every call, such as ``num_inference_steps``.
        controls: ``"fewer steps"`` adds for each plan the step count whose measured loop time is nearest to the plan's;
            numbers add that many steps.
        repeats: how often every item is timed; fidelity is taken from the first.
        measures: names of `diffaccel.eval.measures.MEASURES` to report beside PSNR and SSIM.
        peers: accelerations of others to run beside, see `diffaccel.eval.peers.peers_of`. One that cannot run on this
            pipeline becomes a note with the reason.
        folder: where results go as they come; an interrupted run goes on from there and loses at most the item in
            flight. None: a temporary folder that lives as long as the result.
        turn: prompts per row before the next row's turn. More = less attaching and warming up, drift cancels less.
        noise_floor: add the reference with another thread count: the fidelity of a run that only rounds differently.
        progress: whether to show a bar.

    Raises:
        InputError: a prompt, seed, control or measure that cannot be used, or a folder with another comparison.
        PlanError: a plan does not fit, or the pipeline is already accelerated.
        ModelError: no denoiser in ``model``.
    """
    pipe = getattr(model, "pipe", model)
    plans = dict(plans) if isinstance(plans, Mapping) else {name: name for name in plans}
    calls = {**getattr(model, "defaults", {}), **(calls or {})}
    request = Request(
        pipe, plans, prompts, seeds, calls, controls, repeats, turn, noise_floor, tuple(measures), tuple(peers)
    )
    request.check()
    chosen, offered = measures_of(measures, prompts, video=makes_video(pipe)), peers_of(peers)
    settings, steps = request.settings(), request.steps
    for plan in plans.values():  # one that does not fit is refused now, not after the first prompts
        with _apply(plan)(pipe):
            pass
    processes = Processes.here()
    store = _open(folder, settings, processes)
    jobs = [Job(i, prompt, seed) for i, (prompt, seed) in enumerate(product(prompts, seeds))]
    own = processes.share(jobs)
    variants = [Variant(REFERENCE, "reference", nullcontext, steps)]
    variants += [Variant(name, "plan", _apply(plan), steps) for name, plan in plans.items()]
    variants += [
        Variant(name, "peer", apply, steps)
        for name, apply in offered.items()
        if _can_run(name, apply, pipe, jobs[0], calls, store, processes)
    ]
    variants += [_fewer(n) for n in controls if isinstance(n, int)]
    if noise_floor:
        variants.append(Variant("noise floor", "noise floor", _other_threads, steps))
    with _bar(progress and processes.first) as bar, quiet(pipe):
        runner = _Runner(pipe, calls, store, chosen, bar, total=len(variants) * len(own) * repeats)
        automatic = FEWER_STEPS in controls and steps is not None
        turns = [own[i : i + turn] for i in range(0, len(own), turn)] or [[]]
        rounds = range(repeats)
        for index, these in enumerate(turns):
            runner.take_turn(variants, these, rounds)
            if automatic and index == 0:
                late = _matching(store, variants, plans, "after the first turn", processes)
                runner.take_turn([variants[0], *late], these, [repeats])
                variants += late
        if automatic and (late := _matching(store, variants, plans, "at the end", processes)):
            for these in turns:
                runner.take_turn([variants[0], *late], these, [repeats + 1])
            variants += late
        restored = all(processes.gather(not own or runner.is_restored(own[0])))
    store.reload()
    if not restored:
        warnings.warn("diffaccel: after the comparison the pipeline does not give the reference output", stacklevel=2)
    return result_of(
        store,
        variants,
        [c.measure for c in chosen],
        list(plans) if automatic else [],
        jobs,
        conditions_of(settings),
        restored,
    )


class _Runner:
    """Runs rows on jobs, leaving out what the store already holds."""

    def __init__(
        self,
        pipe: Any,
        calls: Mapping[str, Any],
        store: Store,
        measures: Sequence[Chosen],
        bar: Progress,
        total: int,
    ) -> None:
        self._pipe, self._calls, self._store, self._measures = pipe, calls, store, measures
        self._bar = bar
        self._task = bar.add_task("comparing", total=total)
        self._turns = 0

    def take_turn(self, variants: Sequence[Variant], jobs: Sequence[Job], rounds: Iterable[int]) -> None:
        """Every row on these jobs; the reference first, since the others are scored against it and timed beside it.

        What is timed in the same round is compared: a row that joins late brings the reference with it.
        """
        if len(variants) < 2 and self._turns:
            return
        for number in rounds:
            others = list(variants[1:])
            if self._turns % 2:
                others.reverse()
            self._turns += 1
            for variant in (variants[0], *others):
                self._run(variant, jobs, number)

    def _run(self, variant: Variant, jobs: Sequence[Job], repeat: int) -> None:
        pending = [j for j in jobs if not self._store.records("item", row=variant.name, item=j.index, repeat=repeat)]
        done = len(self._store.records("item"))
        total = max(done + len(pending), self._bar.tasks[0].total or 0)
        self._bar.update(self._task, completed=done, total=total, description=variant.name)
        if not pending:
            return
        calls = dict(self._calls)
        if variant.steps is not None:
            calls["num_inference_steps"] = variant.steps
        started = time.perf_counter()
        with variant.apply(self._pipe) as handle:
            attach_seconds = time.perf_counter() - started
            warm_up = calls if variant.steps is None else {**calls, "num_inference_steps": min(2, variant.steps)}
            generate(self._pipe, pending[0], warm_up)
            weights = sum(module_bytes(denoiser.module) for denoiser in find_denoisers(self._pipe))
            self._store.append(kind="row", row=variant.name, attach_seconds=attach_seconds, model_bytes=weights)
            for job in pending:
                self._measure(variant, job, repeat, calls)
            if hasattr(handle, "report"):
                self._store.append(kind="report", row=variant.name, report=handle.report().to_dict())

    def _measure(self, variant: Variant, job: Job, repeat: int, calls: Mapping[str, Any]) -> None:
        sample, cost = metered(self._pipe, lambda: generate(self._pipe, job, calls))
        facts: dict[str, Any] = {}
        reference = None if variant.kind == "reference" else self._store.load(REFERENCE, job.index)
        if reference is not None:
            if sample.shape != reference.shape:
                raise InputError(f"{variant.name}: output {sample.shape}, reference {reference.shape}: not comparable")
            facts["identical"] = np.array_equal(sample, reference)
        facts["scores"] = {
            m.measure.name: _finite(m.compute(sample, reference if m.measure.fidelity else text_of(job.prompt)))
            for m in self._measures
            if reference is not None or not m.measure.fidelity
        }
        if not self._store.records("item", row=variant.name, item=job.index):
            self._store.save(variant.name, job.index, sample)
        key = {"row": variant.name, "item": job.index, "repeat": repeat, "digest": digest(sample)}
        self._store.append(kind="item", **key, **facts, **cost.__dict__)
        self._bar.advance(self._task)

    def is_restored(self, job: Job) -> bool:
        """Whether the pipeline as it now is gives the reference output to the bit."""
        self._bar.update(self._task, description="checking")
        return np.array_equal(generate(self._pipe, job, self._calls), self._store.load(REFERENCE, job.index))


def _finite(value: float) -> float | None:
    """JSON has no infinity: an identical sample has no dB."""
    return value if math.isfinite(value) else None


def _can_run(
    name: str, apply: Apply, pipe: Any, job: Job, calls: Mapping[str, Any], store: Store, processes: Processes
) -> bool:
    """Whether a peer gets through a short call; if not, a note says why. Found out once, by process 0."""
    if processes.first and not store.records("peer", row=name):
        short = calls if steps_of(pipe, calls) is None else {**calls, "num_inference_steps": _TRIAL_STEPS}
        reason = None
        try:
            with quiet(pipe), apply(pipe):
                generate(pipe, job, short)
        except Exception as error:  # other people's code: anything can come out of it
            reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
            store.append(kind="note", text=f"{name} cannot run here: {reason:.300}")
        store.append(kind="peer", row=name, runs=reason is None)
    return processes.agree(processes.first and store.records("peer", row=name)[0]["runs"])


def _open(folder: str | os.PathLike[str] | None, settings: Mapping[str, Any], processes: Processes) -> Store:
    """Process 0 first; what it refuses, all refuse."""
    processes.require_folder(folder)
    store, refused = None, None
    if processes.first:
        try:
            store = Store(folder, settings)
        except InputError as error:
            refused = str(error)
    if (refused := processes.agree(refused)) is not None:
        raise InputError(refused)
    return store or Store(folder, settings, processes.rank)


def _matching(
    store: Store, variants: Sequence[Variant], plans: Iterable[str], when: str, processes: Processes
) -> list[Variant]:
    """Controls of nearest cost for the plans that have no row yet whose cost is theirs within what timing can tell.

    The choice is kept, so that a resumed run makes the same one. Process 0 makes it for all.
    """
    chosen = store.records("controls", when=when)
    if not chosen and processes.first:
        have = [v for v in variants if v.kind in ("control", "reference")]
        costs = [speedup_of(store, v.name).value for v in have]
        ratios = {plan: speedup_of(store, plan) for plan in plans}
        unmatched = [plan for plan, r in ratios.items() if not any(r.low <= cost <= r.high for cost in costs)]
        wanted = {matching_steps(store, variants, plan) for plan in unmatched} - {v.steps for v in have}
        store.append(kind="controls", when=when, steps=sorted(wanted))
        chosen = store.records("controls", when=when)
    return [_fewer(n) for n in processes.agree(chosen[0]["steps"] if chosen else [])]


def _fewer(steps: int) -> Variant:
    return Variant(f"{steps} step{'s' if steps > 1 else ''}", "control", nullcontext, steps)


def _apply(plan: PlanLike | Apply) -> Apply:
    if callable(plan):
        return plan
    from diffaccel.attach import accelerate

    return lambda pipe: accelerate(pipe, plan)


class _other_threads(AbstractContextManager[None]):
    """One thread more, or one fewer, inside the block: sums are split elsewhere, and nothing else differs."""

    def __init__(self, _: Any) -> None:
        self._threads = torch.get_num_threads()

    def __enter__(self) -> None:
        torch.set_num_threads(self._threads - 1 if self._threads > 1 else 2)

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self._threads)


def _bar(visible: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, transient=True, disable=not visible)

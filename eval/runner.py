"""Runs rows on items, and writes down what each gave and cost."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from diffaccel.denoiser import find_denoisers
from diffaccel.errors import InputError
from diffaccel.eval.feature_store import FeatureStore
from diffaccel.eval.flops import count_flops
from diffaccel.eval.generate import Job, generate
from diffaccel.eval.latents import captured, keep, kept
from diffaccel.eval.measures import Chosen, text_of
from diffaccel.eval.meter import metered
from diffaccel.eval.peer_command import Command, Surroundings
from diffaccel.eval.store import REFERENCE, Store, digest, slug
from diffaccel.eval.variants import Variant
from diffaccel.inspection.weights import module_bytes

_UNKNOWN = {
    "text_seconds": None,
    "decode_seconds": None,
    "step_seconds": (),
    "steps": 0,
    "denoiser_calls": 0,
    "reserved_bytes": None,
    "joules": None,
}
"""Costs of a program that we cannot look into."""


class Runner:
    """Runs rows on jobs, leaving out what the store already holds."""

    def __init__(
        self,
        pipe: Any,
        calls: Mapping[str, Any],
        store: Store,
        measures: Sequence[Chosen],
        features: FeatureStore,
        bar: Progress,
        total: int,
        flops: bool,
        around: Surroundings | None = None,
    ) -> None:
        self._around = around
        self._pipe, self._calls, self._store = pipe, calls, store
        self._measures, self._features, self._flops = measures, features, flops
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
        # On the first item, whoever runs it: the count is then the same for any number of processes.
        counted = [j for j in jobs if j.index == 0 and not self._store.records("flops", row=variant.name)]
        counted = counted if self._flops and not isinstance(variant.apply, Command) else []
        if not pending and not counted:
            return
        calls = dict(self._calls)
        if variant.steps is not None:
            calls["num_inference_steps"] = variant.steps
        warm_up = calls if variant.steps is None else {**calls, "num_inference_steps": min(2, variant.steps)}
        if isinstance(variant.apply, Command):
            self._run_elsewhere(variant, variant.apply, pending, repeat, calls, warm_up)
            return
        started = time.perf_counter()
        with variant.apply(self._pipe) as handle:
            attach_seconds = time.perf_counter() - started
            generate(self._pipe, (pending or counted)[0], warm_up)
            weights = sum(module_bytes(denoiser.module) for denoiser in find_denoisers(self._pipe))
            self._store.append(kind="row", row=variant.name, attach_seconds=attach_seconds, model_bytes=weights)
            for job in counted:
                self._count(variant, job, calls)
            for number, job in enumerate(pending, 1):
                sample, facts = self._measured(variant, job, calls)
                # Before the last item: once all items are there, nobody attaches this row again to ask for a report.
                if number == len(pending) and hasattr(handle, "report"):
                    self._store.append(kind="report", row=variant.name, report=handle.report().to_dict())
                self._keep(variant, job, repeat, sample, facts)

    def _run_elsewhere(
        self,
        variant: Variant,
        command: Command,
        jobs: Sequence[Job],
        repeat: int,
        calls: Mapping[str, Any],
        warm_up: Mapping[str, Any],
    ) -> None:
        """A row that is a program of its own: its samples and what it says that they cost."""
        assert self._around is not None
        folder = self._store.folder / "commands" / slug(variant.name)
        for job, sample, told in command.run(jobs, calls, warm_up, self._around, folder):
            weights, notes = told.pop("model_bytes"), told.pop("notes")
            self._store.append(
                kind="row", row=variant.name, attach_seconds=0.0, model_bytes=weights, notes=[str(n) for n in notes]
            )
            facts = {**_UNKNOWN, **told, **self._scored(variant, job, sample)}
            self._keep(variant, job, repeat, sample, facts)

    def _count(self, variant: Variant, job: Job, calls: Mapping[str, Any]) -> None:
        """Operations of a call of its own, which is not timed."""
        try:
            found = count_flops(self._pipe, lambda: generate(self._pipe, job, calls))
        except Exception as error:  # other people's tensors and operators may not bear being watched
            reason = (str(error).strip() or "no message").splitlines()[0]
            self._store.append(kind="flops", row=variant.name, failed=f"{type(error).__name__}: {reason:.200}")
            return
        operators = dict(sorted(found.by_operator.items()))
        uncounted = sorted(found.uncounted)
        count = {"total": found.total, "denoiser": found.within, "by_operator": operators, "uncounted": uncounted}
        self._store.append(kind="flops", row=variant.name, **count)

    def _measured(self, variant: Variant, job: Job, calls: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """A sample with its costs and scores."""
        wanted = [m for m in self._measures if m.measure.of_latents]
        with captured(self._pipe) if wanted else nullcontext(None) as latents:
            sample, cost = metered(self._pipe, lambda: generate(self._pipe, job, calls))
        facts = {**cost.__dict__, **self._scored(variant, job, sample)}
        if latents is not None and variant.kind == "reference":
            keep(self._store, job.index, latents.array())
        elif latents is not None:
            mine, other = latents.array(), kept(self._store, job.index)
            facts["scores"] |= {m.measure.name: _finite(m.compute(mine, other)) for m in wanted}
        return sample, facts

    def _scored(self, variant: Variant, job: Job, sample: np.ndarray) -> dict[str, Any]:
        """What the measures of samples say, and whether it is the reference's."""
        facts: dict[str, Any] = {}
        reference = None if variant.kind == "reference" else self._store.load(REFERENCE, job.index)
        if reference is not None:
            if sample.shape != reference.shape:
                raise InputError(f"{variant.name}: output {sample.shape}, reference {reference.shape}: not comparable")
            facts["identical"] = np.array_equal(sample, reference)
        facts["scores"] = {
            m.measure.name: _finite(m.compute(sample, reference if m.measure.fidelity else text_of(job.prompt)))
            for m in self._measures
            if not m.measure.of_latents and (reference is not None or not m.measure.fidelity)
        }
        return facts

    def _keep(self, variant: Variant, job: Job, repeat: int, sample: np.ndarray, facts: Mapping[str, Any]) -> None:
        """Write a sample down; it counts once its record is there, which comes last."""
        key: dict[str, Any] = {"row": variant.name, "item": job.index, "repeat": repeat, "digest": digest(sample)}
        if not self._store.records("item", row=variant.name, item=job.index):
            key["files"] = self._store.save(variant.name, job.index, sample)
            self._features.add(variant.name, job.index, sample)
        self._store.append(kind="item", **key, **facts)
        self._bar.advance(self._task)

    def is_restored(self, job: Job) -> bool:
        """Whether the pipeline as it now is gives the reference output to the bit."""
        self._bar.update(self._task, description="checking")
        return np.array_equal(generate(self._pipe, job, self._calls), self._store.load(REFERENCE, job.index))


def _finite(value: float) -> float | None:
    """JSON has no infinity: an identical sample has no dB."""
    return value if math.isfinite(value) else None


def progress_bar(visible: bool) -> Progress:
    """What `Runner` shows its progress on."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, transient=True, disable=not visible)

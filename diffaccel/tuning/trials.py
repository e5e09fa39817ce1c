"""Runs choices on the live pipeline and writes down what each gave: a trial that was made is never made again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from diffaccel.attach import accelerate
from diffaccel.denoiser import find_denoisers
from diffaccel.errors import DiffAccelError, InputError
from diffaccel.eval.generate import Job, generate, steps_of
from diffaccel.eval.measures import Chosen, text_of
from diffaccel.eval.meter import metered
from diffaccel.eval.store import REFERENCE, Store, digest
from diffaccel.inspection.weights import module_bytes
from diffaccel.plan import Plan
from diffaccel.tuning.outcome import Outcome

_PACE_STEPS = 3
"""Of the short run by whose time the machine's speed of the moment is told."""
Told = Callable[[str], None]


class Trials:
    """Everything that was tried in one tuning.

    Args:
        pipe: the pipeline, which is left as it was.
        jobs: all items.
        calls: arguments of every call.
        store: where records go.
        measures: of samples.
        told: hears what is being done.
    """

    def __init__(
        self,
        pipe: Any,
        jobs: Sequence[Job],
        calls: Mapping[str, Any],
        store: Store,
        measures: Sequence[Chosen],
        told: Told = lambda what: None,
    ) -> None:
        self._pipe, self._jobs, self._calls, self._store = pipe, jobs, calls, store
        self._measures, self._told = measures, told
        self._prompts = dict(zip((job.index for job in jobs), prompts_of(jobs), strict=True))
        self._asked: dict[str, set[int]] = {}
        steps = steps_of(pipe, calls)
        self._short = {} if steps is None else {"num_inference_steps": min(_PACE_STEPS, steps)}

    @property
    def seconds(self) -> float:
        """Spent on trials so far, in this sitting and those before."""
        return float(sum(r["spent"] for r in self._store.records("trial")))

    @property
    def elapsed(self) -> float:
        """Seconds of those trials that this sitting has asked for, whichever sitting made them: what a limit of time
        counts, so that one that goes on comes by the same way as one that was not interrupted."""
        spent = 0.0
        for record in self._store.records("trial"):
            asked = self._asked.get(record["row"])
            if "items" not in record or (asked is not None and asked.issuperset(record["items"])):
                spent += record["spent"]
        return spent

    def reference(self, items: Sequence[int]) -> None:
        """Run the untouched pipeline on those of ``items`` that it has not run on."""
        self._asked.setdefault(REFERENCE, set()).update(items)
        missing = [self._jobs[i] for i in items if not self._store.records("item", row=REFERENCE, item=i)]
        if not missing:
            return
        with self._timed(REFERENCE, [job.index for job in missing]):
            for job in missing:
                self._told(f"original, prompt {job.index + 1}")
                pace = self._pace(job)
                self._run(REFERENCE, job, pace)
        if not self._store.records("weights"):
            self._store.append(kind="weights", bytes=self._weights())

    def run(self, name: str, plan: Plan, items: Sequence[int]) -> Outcome | None:
        """The outcome of ``plan`` on ``items``; None where it cannot be put on this pipeline, or its run fails.

        Args:
            name: of the plan, which stands for it in the records.
        """
        if self.why_not(name) is not None:
            return None
        self.reference(items)
        self._asked.setdefault(name, set()).update(items)
        done = {r["item"] for r in self._store.records("item", row=name)}
        missing = [self._jobs[i] for i in items if i not in done]
        if missing:
            self._told(f"{name}, {len(missing)} prompt{'s' if len(missing) > 1 else ''}")
            try:
                with self._timed(name, [job.index for job in missing]):
                    self._try(name, plan, missing)
            except Exception as error:  # what it cannot take is this option's fault, not the tuning's
                reason = str(error) if isinstance(error, DiffAccelError) else f"{type(error).__name__}: {error}"
                self._store.append(kind="refused", row=name, reason=f"{reason:.300}")
                return None
        return self.outcome(name, items)

    def why_not(self, name: str) -> str | None:
        """Why a plan could not be tried."""
        return next((r["reason"] for r in self._store.records("refused", row=name)), None)

    def outcome(self, name: str, items: Sequence[int]) -> Outcome:
        """From the records, of ``items`` that were run."""
        mine, base = self._items(name), self._items(REFERENCE)
        names = [chosen.measure.name for chosen in self._measures]
        relative = [_paced(mine[i]) / _paced(base[i]) for i in items]
        before = self._store.records("weights")[0]["bytes"]
        after = [r["bytes"] for r in self._store.records("put", row=name)]
        reports = self._store.records("report", row=name)
        return Outcome(
            tuple(items),
            tuple(self._prompts[i] for i in items),
            {n: [_number(mine[i]["scores"][n]) for i in items] for n in names},
            {n: [_number(base[i]["scores"][n]) for i in items] for n in names if n in base[items[0]]["scores"]},
            float(np.median(relative)),
            after[-1] / before if after else 1.0,
            reports[-1]["report"] if reports else {},
        )

    def beside(self, name: str, plan: Plan, items: Sequence[int]) -> tuple[list[float], list[float]]:
        """Seconds of the loop of the original and of ``plan``, in turns on the same items: what is claimed of speed."""
        done = {r["item"]: r for r in self._store.records("beside", row=name)}
        for i in (i for i in items if i not in done):
            self._told(f"{name} beside the original, prompt {i + 1}")
            with self._timed(name, [i]):
                original = self._loop_seconds(i)
                with accelerate(self._pipe, plan):
                    generate(self._pipe, self._jobs[i], {**self._calls, **self._short})
                    mine = self._loop_seconds(i)
            self._store.append(kind="beside", row=name, item=i, original=original, seconds=mine)
        found = {r["item"]: r for r in self._store.records("beside", row=name)}
        return [found[i]["original"] for i in items], [found[i]["seconds"] for i in items]

    def is_restored(self) -> bool:
        """Whether the pipeline gives the first reference again, to the bit."""
        first = self._store.records("item", row=REFERENCE)[0]["item"]
        return np.array_equal(self._generate(first), self._store.load(REFERENCE, first))

    def _try(self, name: str, plan: Plan, jobs: Sequence[Job]) -> None:
        pace = self._pace(jobs[0])
        with accelerate(self._pipe, plan) as accel:
            generate(self._pipe, jobs[0], {**self._calls, **self._short})  # kernels are chosen at their first use
            self._store.append(kind="put", row=name, bytes=self._weights())
            for number, job in enumerate(jobs, 1):
                self._run(name, job, pace)
                if number == len(jobs):
                    self._store.append(kind="report", row=name, report=accel.report().to_dict())

    def _run(self, name: str, job: Job, pace: float) -> None:
        sample, cost = metered(self._pipe, lambda: self._generate(job.index), memory=False)
        reference = None if name == REFERENCE else self._store.load(REFERENCE, job.index)
        if reference is not None and sample.shape != reference.shape:
            raise InputError(f"{name}: output {sample.shape}, original {reference.shape}: not comparable")
        scores = {
            m.measure.name: _finite(m.compute(sample, reference if m.measure.fidelity else text_of(job.prompt)))
            for m in self._measures
            if reference is not None or not m.measure.fidelity
        }
        facts: dict[str, Any] = {"row": name, "item": job.index, "repeat": 0, "digest": digest(sample)}
        if reference is None:
            facts["files"] = self._store.save(REFERENCE, job.index, sample)
        self._store.append(kind="item", **facts, scores=scores, seconds=cost.loop_seconds, pace=pace)

    def _loop_seconds(self, item: int) -> float:
        return metered(self._pipe, lambda: self._generate(item), memory=False)[1].loop_seconds

    def _generate(self, item: int) -> np.ndarray:
        return generate(self._pipe, self._jobs[item], self._calls)

    def _pace(self, job: Job) -> float:
        """Seconds of a short run of the untouched pipeline: machines change their speed while they tune."""
        _, cost = metered(self._pipe, lambda: generate(self._pipe, job, {**self._calls, **self._short}), memory=False)
        return cost.loop_seconds

    def _weights(self) -> int:
        return sum(module_bytes(denoiser.module) for denoiser in find_denoisers(self._pipe))

    def _items(self, name: str) -> dict[int, dict[str, Any]]:
        return {r["item"]: r for r in self._store.records("item", row=name)}

    @contextmanager
    def _timed(self, name: str, items: Sequence[int]) -> Iterator[None]:
        """Books the time, also of what is interrupted by an error."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._store.append(kind="trial", row=name, items=list(items), spent=time.perf_counter() - started)


def prompts_of(jobs: Sequence[Job]) -> list[int]:
    """To which prompt each item belongs; of a single prompt, whose seeds alone differ, each seed counts as one."""
    labels: dict[str, int] = {}
    found = [labels.setdefault(repr(job.prompt), len(labels)) for job in jobs]
    return found if len(labels) > 1 else list(range(len(jobs)))


def _paced(record: Mapping[str, Any]) -> float:
    return float(record["seconds"] / record["pace"])


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if np.isfinite(value) else None


def _number(value: float | None) -> float:
    return float("inf") if value is None else value

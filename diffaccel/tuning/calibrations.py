"""What some options have to be calibrated with: measured when first asked for, kept in the tuning's folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from diffaccel.calibration import calibrate
from diffaccel.eval.generate import Job
from diffaccel.eval.store import Store, slug
from diffaccel.pipelines.tasks import call_parameters
from diffaccel.plan import Plan

_JOBS = 2
Calibrated = Callable[[str, Plan], Plan]
"""Gets a name for the records and a plan; returns it with what was measured."""


class Calibrations:
    """Calibrates plans for the tuner, each once.

    Args:
        pipe: the pipeline.
        jobs: of the search; the first ones are what is calibrated on.
        calls: arguments of every call.
        store: of the tuning.
        aside: what keeps the live table out of the way of the calibration's own progress bar.
    """

    def __init__(
        self,
        pipe: Any,
        jobs: Sequence[Job],
        calls: Mapping[str, Any],
        store: Store,
        aside: Callable[[str], AbstractContextManager[None]] = lambda what: nullcontext(),
    ) -> None:
        self._pipe, self._jobs, self._calls, self._store = pipe, jobs[:_JOBS], calls, store
        self._aside = aside

    def __call__(self, name: str, plan: Plan) -> Plan:
        """``plan`` calibrated.

        Raises:
            PlanError: it cannot be on this pipeline.
        """
        folder = self._store.folder / "calibrations" / slug(name)
        if (folder / "plan.json").is_file():
            return Plan.load(folder)
        prompts: list[dict[str, Any]] = [
            dict(j.prompt) if isinstance(j.prompt, Mapping) else {"prompt": j.prompt} for j in self._jobs
        ]
        if "generator" in call_parameters(self._pipe):
            for job, prompt in zip(self._jobs, prompts, strict=True):
                prompt["generator"] = torch.Generator().manual_seed(job.seed)
        started = time.perf_counter()
        with self._aside(f"calibrating {name}"):
            found = calibrate(self._pipe, plan, prompts=prompts, **self._calls)
        found.save(folder)
        self._store.append(kind="trial", row=f"calibrating {name}", spent=time.perf_counter() - started)
        return found

"""The rows of a comparison: what is put on the pipeline for each, and whether a peer runs at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from diffaccel.eval.generate import Job, generate, steps_of
from diffaccel.eval.processes import Processes
from diffaccel.eval.store import Store
from diffaccel.inspection.quiet import quiet
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


def fewer(steps: int) -> Variant:
    """The control that runs this many steps and is otherwise the reference."""
    return Variant(f"{steps} step{'s' if steps > 1 else ''}", "control", nullcontext, steps)


def noise_floor(steps: int | None) -> Variant:
    """The reference with another thread count."""
    return Variant("noise floor", "noise floor", _other_threads, steps)


def apply_of(plan: PlanLike | Apply) -> Apply:
    """What puts ``plan`` on a pipeline."""
    if callable(plan):
        return plan
    from diffaccel.attach import accelerate

    return lambda pipe: accelerate(pipe, plan)


def can_run(
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


class _other_threads(AbstractContextManager[None]):
    """One thread more, or one fewer, inside the block: sums are split elsewhere, and nothing else differs."""

    def __init__(self, _: Any) -> None:
        self._threads = torch.get_num_threads()

    def __enter__(self) -> None:
        torch.set_num_threads(self._threads - 1 if self._threads > 1 else 2)

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self._threads)

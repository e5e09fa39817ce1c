"""The rows of a comparison: what is put on the pipeline for each, and whether a peer runs at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from diffaccel.eval.generate import Job, generate, steps_of
from diffaccel.eval.peer_command import Command, Surroundings
from diffaccel.eval.peers import PeerRow
from diffaccel.eval.processes import Processes
from diffaccel.eval.store import Store, slug
from diffaccel.inspection.quiet import quiet
from diffaccel.plan import Plan

PlanLike = str | os.PathLike[str] | Plan
Apply = Callable[[Any], AbstractContextManager[Any]]
"""Puts any acceleration on a pipeline: called with it, returns what takes it off again on leaving."""

_TRIAL_STEPS = 6  # enough for caches to skip some
_CALIBRATION_SEED = 2**31 - 1  # of no table


@dataclass(frozen=True)
class Variant:
    """One row to be: how the pipeline is changed, or the program that runs instead, and what its calls say instead."""

    name: str
    kind: str
    apply: Apply | Command
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


@dataclass(frozen=True)
class Trial:
    """What finds out whether peers run on this pipeline.

    Args:
        job: an item of the run, with which a short call is tried.
        calls: arguments of every call.
        around: what programs of their own are told.
    """

    pipe: Any
    job: Job
    calls: Mapping[str, Any]
    store: Store
    processes: Processes
    around: Surroundings | None

    def peers(self, offered: Mapping[str, PeerRow | Command], steps: int | None) -> list[Variant]:
        """The rows of those that run; of the others a note says why not."""
        return [Variant(name, "peer", peer, steps) for name, peer in offered.items() if self._runs(name, peer)]

    def _runs(self, name: str, peer: PeerRow | Command) -> bool:
        """Found out once, by process 0; what has to be calibrated is so in every process and sitting."""
        known = self.store.records("peer", row=name)
        if self.processes.first and not known:
            reason = self._obstacle(name, peer)
            if reason is not None:
                self.store.append(kind="note", text=f"{name} cannot run here: {reason:.300}")
            self.store.append(kind="peer", row=name, runs=reason is None)
        runs = self.processes.agree(self.processes.first and self.store.records("peer", row=name)[0]["runs"])
        if runs and isinstance(peer, PeerRow):
            with quiet(self.pipe):
                self._prepare(peer)
        return runs

    def _obstacle(self, name: str, peer: PeerRow | Command) -> str | None:
        steps = steps_of(self.pipe, self.calls)
        short = self.calls if steps is None else {**self.calls, "num_inference_steps": _TRIAL_STEPS}
        try:
            if isinstance(peer, Command):
                assert self.around is not None
                list(peer.run([self.job], short, short, self.around, self.store.folder / "commands" / slug(name)))
            else:
                with quiet(self.pipe):
                    self._prepare(peer)
                    with peer(self.pipe):
                        generate(self.pipe, self.job, short)
        except Exception as error:  # other people's code: anything can come out of it
            return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        return None

    def _prepare(self, peer: PeerRow) -> None:
        other = replace(self.job, seed=_CALIBRATION_SEED)
        peer.prepare(self.pipe, lambda: generate(self.pipe, other, self.calls), steps_of(self.pipe, self.calls))


class _other_threads(AbstractContextManager[None]):
    """One thread more, or one fewer, inside the block: sums are split elsewhere, and nothing else differs."""

    def __init__(self, _: Any) -> None:
        self._threads = torch.get_num_threads()

    def __enter__(self) -> None:
        torch.set_num_threads(self._threads - 1 if self._threads > 1 else 2)

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self._threads)

"""Denoiser calls of an untouched pipeline, recorded so that a changed denoiser can be asked the same again.

The error of a call made again with the reference's own inputs does not depend on what earlier steps did. It is
therefore far less noisy than the error of a picture, where a trajectory may tip over into another one, and a few calls
suffice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffaccel.clock import Call, Clock
from diffaccel.denoiser import Denoiser, find_denoisers
from diffaccel.errors import PlanError
from diffaccel.plan import Artefacts
from diffaccel.quantization import attach
from diffaccel.quantization.section import Quantize
from diffaccel.technique import Context


@contextmanager
def at_work(pipe: Any, sections: Sequence[Quantize] = (), artefacts: Artefacts | None = None) -> Iterator[Context]:
    """``pipe`` with these sections of a plan alone, or with none, but followed by a clock.

    Raises:
        PlanError: the pipeline is accelerated already, or the sections do not fit it.
    """
    denoisers = find_denoisers(pipe)
    for denoiser in denoisers:
        if "_diffaccel" in denoiser.module.__dict__:
            raise PlanError(f"{denoiser.component} is already accelerated; call remove() on its handle first")
    context = Context(denoisers, Clock(pipe), artefacts or Artefacts(), originals="device", pipeline=pipe)
    with context.undo:
        for denoiser in denoisers:
            context.root(denoiser)
        if sections:
            attach.attach(attach.resolve(sections, context), context)
        yield context


@dataclass(frozen=True)
class Recorded:
    """One call: where it stood (index of its step and length of the schedule), what went in and what came out."""

    component: str
    step: int
    steps: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: list[Tensor]

    @property
    def progress(self) -> float:
        """In [0, 1]."""
        return self.step / (self.steps - 1) if self.steps > 1 else 0.0


@dataclass(frozen=True)
class Error:
    """Of one call made again, both as energy of the difference over that of what it should be.

    Args:
        output: of the output.
        text: of the difference that the text makes, conditional less unconditional; NaN where a call holds only one.
    """

    output: float
    text: float


class Recorder:
    """Records calls of the denoisers while it is on.

    Args:
        context: of `at_work` without sections.
        wanted: told of each call; whether to record it.
    """

    def __init__(self, context: Context, wanted: Callable[[Call], bool]) -> None:
        self.calls: list[Recorded] = []
        self._wanted = wanted
        self._undo = ExitStack()
        self._now: Call | None = None
        for denoiser in context.denoisers:
            context.root(denoiser).listeners.append(self._follow)
            self._watch(denoiser)

    def remove(self) -> None:
        """Take the hooks off."""
        self._undo.close()

    def _follow(self, call: Call, arguments: Mapping[str, Any], compute: Any) -> None:
        self._now = call

    def _watch(self, denoiser: Denoiser) -> None:
        given: list[tuple[Any, Any]] = []

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            given[:] = [(copied(args), copied(kwargs))]  # the forward may write into its inputs

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            now, (args, kwargs) = self._now, given.pop()
            if now is not None and now.steps and self._wanted(now):
                output = floating(output)
                self.calls.append(Recorded(denoiser.component, now.step, now.steps, args, kwargs, output))

        self._undo.callback(denoiser.module.register_forward_pre_hook(before, with_kwargs=True).remove)
        self._undo.callback(denoiser.module.register_forward_hook(after, with_kwargs=True).remove)


@torch.no_grad()
def errors(
    calls: Sequence[Recorded], context: Context, *, batched: bool = False, guidance: float = 1.0
) -> Iterator[Error]:
    """Of each call made again; what depends on the step follows.

    Args:
        batched: whether a call holds both halves of guidance, the unconditional one first.
        guidance: its scale, with which the halves' outputs are put together before they are compared; 1 compares them
            as they are. Errors that both halves share stay as they are, independent ones grow by scale^2 + (scale-1)^2.
    """
    modules = {d.component: d.module for d in context.denoisers}
    for call in calls:
        context.clock.start(call.steps, call.step)
        output = floating(modules[call.component](*copied(call.args), **copied(call.kwargs)))
        text, expected = math.nan, call.output
        if batched:
            text = _relative([_difference(t) for t in expected], [_difference(t) for t in output])
            expected, output = ([guided(t, guidance) for t in tensors] for tensors in (expected, output))
        yield Error(_relative(expected, output), text)


def guided(batched: Tensor, scale: float) -> Tensor:
    """The halves of a batch put together by guidance of this scale; as they are for 1."""
    if scale == 1:
        return batched
    unconditional, conditional = batched.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def _relative(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    pairs = [(a.double(), b.double()) for a, b in zip(expected, got, strict=True)]
    different = sum(float((a - b).square().sum()) for a, b in pairs)
    return different / max(sum(float(a.square().sum()) for a, _ in pairs), 1e-300)


def _difference(batched: Tensor) -> Tensor:
    unconditional, conditional = batched.chunk(2)
    return conditional - unconditional


def floating(output: Any, *, detach: bool = True) -> list[Tensor]:
    """The floating tensors of a forward's result, copied unless gradients are to flow through them."""
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return [leaf.detach().clone() for leaf in leaves] if detach else leaves


def copied(values: Any) -> Any:
    """``values`` with a copy of every tensor in them."""
    return pytree.tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, values)

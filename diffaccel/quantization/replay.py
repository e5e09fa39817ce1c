"""Denoiser calls of an untouched pipeline, recorded so that a changed denoiser can be asked the same again.

The error of a call made again with the reference's own inputs does not depend on what earlier steps did. It is
therefore far less noisy than the error of a picture, where a trajectory may tip over into another one, and a few calls
suffice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffaccel.clock import Call
from diffaccel.denoiser import Denoiser
from diffaccel.technique import Context


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


class Recorder:
    """Records calls of the denoisers while it is on.

    Args:
        context: of an attached plan that changes nothing.
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
            given.append((_copy(args), _copy(kwargs)))  # the forward may write into its inputs

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            args, kwargs = given.pop()
            given.clear()
            if self._now is not None and self._now.steps and self._wanted(self._now):
                call = Recorded(denoiser.component, self._now.step, self._now.steps, args, kwargs, tensors_of(output))
                self.calls.append(call)

        self._undo.callback(denoiser.module.register_forward_pre_hook(before, with_kwargs=True).remove)
        self._undo.callback(denoiser.module.register_forward_hook(after, with_kwargs=True).remove)


@torch.no_grad()
def errors(calls: Sequence[Recorded], denoisers: Sequence[Denoiser], at: Callable[[Recorded], None]) -> Iterator[float]:
    """Energy of the difference over that of the output, for each call made again.

    Args:
        at: told of each call before it is made, so that what depends on the step can follow.
    """
    modules = {d.component: d.module for d in denoisers}
    for call in calls:
        at(call)
        output = tensors_of(modules[call.component](*_copy(call.args), **_copy(call.kwargs)))
        pairs = list(zip(call.output, output, strict=True))
        different = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
        yield different / max(sum(float(a.double().square().sum()) for a, _ in pairs), 1e-300)


def tensors_of(output: Any) -> list[Tensor]:
    """Copies of the floating tensors of a forward's result."""
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return [leaf.detach().clone() for leaf in leaves]


def _copy(values: Any) -> Any:
    return pytree.tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, values)

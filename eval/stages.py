"""Where the time of a call goes: what runs before the denoising loop, its steps, and what runs after it.

Found by structure, not by a list of classes: the loop is where denoisers are called and the scheduler steps; every
other network among the components, whether called or asked to ``decode`` or ``encode``, counts as text encoding before
the loop (images to start from included) and as decoding after it. Marks are CUDA events in the stream, so that nothing
waits inside the loop.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from diffaccel.denoiser import find_denoisers
from diffaccel.eval.timing import synchronise
from diffaccel.watch import watch_method

_METHODS = ("encode", "decode")  # of autoencoders, which are not called themselves


class Stages:
    """Marks of one call.

    Attributes:
        steps: scheduler steps seen; 0 where the pipeline steps a copy of its scheduler.
        calls: calls of all denoisers.
    """

    def __init__(self, device: torch.device) -> None:
        self.steps = self.calls = 0
        self._cuda = device.type == "cuda"
        self._first: Any = None
        self._last: Any = None
        self._step_ends: list[Any] = []
        self._others: list[tuple[bool, Any, Any]] = []  # whether after the loop, begin, end
        self._depth = 0
        self._begun: Any = None

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1e3 if self._cuda else end - begin

    def entered(self) -> None:
        """A denoiser is called."""
        self.calls += 1
        if self._first is None:
            synchronise()  # text encoding still in the queue is not the loop's
            self._first = self._now()

    def left(self) -> None:
        """It returns."""
        self._last = self._now()

    def stepped(self, _: Any) -> None:
        """The scheduler has stepped."""
        if self._first is not None:
            self.steps += 1
            self._last = self._now()
            self._step_ends.append(self._last)

    def began(self) -> None:
        """Another network begins."""
        if not self._depth:
            self._begun = self._now()
        self._depth += 1

    def ended(self) -> None:
        """It ends; one inside another counts once."""
        self._depth -= 1
        if not self._depth:
            self._others.append((self._first is not None, self._begun, self._now()))

    def loop_seconds(self) -> float:
        """From the first denoiser call to the end of the last step (or call); 0 when no denoiser was called."""
        return 0.0 if self._first is None or self._last is None else self._between(self._first, self._last)

    def step_seconds(self) -> list[float]:
        """Of each step: from the end of the one before."""
        marks = [self._first, *self._step_ends]
        return [self._between(a, b) for a, b in pairwise(marks)]

    def text_seconds(self) -> float:
        """Of all networks that ran before the loop."""
        return sum(self._between(a, b) for after, a, b in self._others if not after)

    def decode_seconds(self) -> float:
        """Of all networks that ran after the first denoiser call: the decoder."""
        return sum(self._between(a, b) for after, a, b in self._others if after)


def watch_loop(pipe: Any, marks: Any) -> Callable[[], None]:
    """Have ``marks.entered`` and ``left`` called around each denoiser call; returns the undo.

    A denoiser under ``torch.compile`` stays as compiled as it was.
    """
    undo = [_around_call(module, marks.entered, marks.left) for module in _called_modules(pipe)]
    return lambda: _undone(undo)


def watch_stages(pipe: Any, stages: Stages) -> Callable[[], None]:
    """Have ``stages`` told of everything; returns the undo. All that is put on is on these instances only."""
    undo = [watch_loop(pipe, stages)]
    undo += [watch_method(scheduler, "step", stages.stepped) for scheduler in _schedulers(pipe)]
    for network in other_networks(pipe):
        undo.append(_around_call(network, stages.began, stages.ended))
        for name in _METHODS:
            if callable(getattr(network, name, None)):
                undo.append(around_method(network, name, lambda *_, **__: stages.began(), stages.ended))
    return lambda: _undone(undo)


def _undone(undo: list[Callable[[], None]]) -> None:
    while undo:
        undo.pop()()


def _called_modules(pipe: Any) -> list[nn.Module]:
    """The denoisers as the pipeline calls them: a ``torch.compile`` wrapper where there is one."""
    if isinstance(pipe, nn.Module):
        return [pipe]
    return [pipe.components[denoiser.component] for denoiser in find_denoisers(pipe)]


def other_networks(pipe: Any) -> list[nn.Module]:
    """The components that are networks and no denoisers."""
    denoisers = _called_modules(pipe)
    components = getattr(pipe, "components", {}).values()
    networks = [c for c in components if isinstance(c, nn.Module) and all(c is not d for d in denoisers)]
    return list(dict.fromkeys(networks))


def _schedulers(pipe: Any) -> list[Any]:
    components = getattr(pipe, "components", {})
    return [c for c in components.values() if hasattr(c, "set_timesteps") and hasattr(c, "step")]


def _around_call(module: nn.Module, before: Callable[[], None], after: Callable[[], None]) -> Callable[[], None]:
    if module._compiled_call_impl is None:
        handles = (
            module.register_forward_pre_hook(lambda *_: before(), prepend=True),
            module.register_forward_hook(lambda *_: after(), always_call=True),
        )

        def remove() -> None:
            for handle in handles:
                handle.remove()

        return remove
    compiled = module._compiled_call_impl  # hooks would be traced: stand around the compiled call instead

    def noted(*args: Any, **kwargs: Any) -> Any:
        before()
        try:
            return compiled(*args, **kwargs)
        finally:
            after()

    module._compiled_call_impl = noted
    return lambda: setattr(module, "_compiled_call_impl", compiled)


def around_method(
    owner: nn.Module, name: str, before: Callable[..., None], after: Callable[[], None] | None = None
) -> Callable[[], None]:
    """Have ``before`` called with the arguments of each call of ``owner``'s method, and ``after`` when it returns.

    Returns:
        The undo, to be called in reverse order.
    """
    had, method = owner.__dict__.get(name), getattr(owner, name)

    @functools.wraps(method)
    def noted(*args: Any, **kwargs: Any) -> Any:
        before(*args, **kwargs)
        try:
            return method(*args, **kwargs)
        finally:
            if after is not None:
                after()

    owner.__dict__[name] = noted

    def remove() -> None:
        if had is None:
            owner.__dict__.pop(name, None)
        else:
            owner.__dict__[name] = had

    return remove

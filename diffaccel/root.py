"""The hook on the denoiser's root: asks the clock where the loop stands and lets techniques act on the whole call."""

from __future__ import annotations

import inspect
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import nn

from diffaccel.clock import Call, Clock
from diffaccel.denoiser import Denoiser, timestep_parameter
from diffaccel.hooks import ContextTap

Compute = Callable[..., Any]
"""Runs the denoiser on the arguments of the call at hand; the innermost wrapper may give a function for each."""

Listener = Callable[[Call, Mapping[str, Any], Compute], None]
"""Told of a call before it runs: where it stands, its arguments by parameter name, and how to run it (for probes)."""

Change = Callable[[str, Any], Any]
"""Name and value of an argument -> the value to give instead."""

Changer = Callable[[Mapping[str, Any], Callable[[Change], Any]], Change | None]
"""Gets the arguments of a call by name, and a function that makes the call with changed ones; says how to change them
before anybody else sees them, or None."""

Wrapper = Callable[[Call, Mapping[str, Any], Compute], Any]
"""Runs around a call and gives its output: by ``compute()``, or without it."""


class RootHook(ModelHook):
    """Runs outside every compiled region: decisions are made here, blocks read only what was decided."""

    _is_stateful = True  # so that diffusers hands cache contexts to `contexts`

    def __init__(self, denoiser: Denoiser, clock: Clock, *, profile: bool = False) -> None:
        super().__init__()
        self.contexts = ContextTap()
        self.listeners: list[Listener] = []
        self.changes: list[Changer] = []
        self.wrappers: list[Wrapper] = []
        self.seconds: list[float] | None = [] if profile else None
        self.calls = 0
        self._clock = clock
        self._component = denoiser.component
        self._signature = inspect.signature(denoiser.module.forward)
        self._timestep = timestep_parameter(denoiser.module)

    def reset_state(self, module: nn.Module) -> nn.Module:
        return module

    @torch.compiler.disable(
        recursive=False,
        reason="diffaccel decides outside the compiled region; compile the repeated blocks (compile_repeated_blocks), "
        "or compile the whole denoiser without fullgraph=True",
    )
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        bound = self._signature.bind(*args, **kwargs)
        arguments = _by_name(bound)
        timestep = arguments.get(self._timestep) if self._timestep else None
        call = self._clock.call(arguments, timestep, self.contexts.context, self._component)
        self.calls += 1

        for changer in self.changes:
            made = changer(arguments, partial(self._called, bound))
            if made is not None:
                bound = _changed(bound, made)
                args, kwargs, arguments = bound.args, bound.kwargs, _by_name(bound)

        def compute(change: Callable[[Any], Any] = lambda argument: argument) -> Any:
            return self.fn_ref.original_forward(*map(change, args), **{n: change(v) for n, v in kwargs.items()})

        started = self._now()
        for listener in self.listeners:
            listener(call, arguments, compute)
        run: Compute = compute
        for wrapper in self.wrappers:
            run = _wrapped(wrapper, call, arguments, run)
        output = run()
        if self.seconds is not None:
            self.seconds.append(self._now() - started)
        return output

    def _called(self, bound: inspect.BoundArguments, change: Change) -> Any:
        changed = _changed(bound, change)
        return self.fn_ref.original_forward(*changed.args, **changed.kwargs)

    def _now(self) -> float:
        if self.seconds is not None and torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def _by_name(bound: inspect.BoundArguments) -> Mapping[str, Any]:
    """The arguments; those in **kwargs of the forward, and in bundles such as added_cond_kwargs, by their own names."""
    arguments: dict[str, Any] = dict(bound.arguments)
    for value in [v for v in arguments.values() if isinstance(v, dict)]:
        arguments = {**value, **arguments}
    return arguments


def _changed(bound: inspect.BoundArguments, change: Change) -> inspect.BoundArguments:
    changed = OrderedDict(
        (name, {n: change(n, v) for n, v in value.items()} if isinstance(value, dict) else change(name, value))
        for name, value in bound.arguments.items()
    )
    return inspect.BoundArguments(bound.signature, changed)


def _wrapped(wrapper: Wrapper, call: Call, arguments: Mapping[str, Any], run: Compute) -> Compute:
    return lambda: wrapper(call, arguments, run)

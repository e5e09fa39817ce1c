"""What one pipeline call cost: its seconds, those of the denoising loop alone, and its peak memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil
import torch
from torch import nn

from diffaccel.denoiser import find_denoisers
from diffaccel.eval.timing import synchronise
from diffaccel.watch import watch_method

T = TypeVar("T")


@dataclass(frozen=True)
class CallCost:
    """The cost of one call.

    Attributes:
        seconds: the whole call, with text encoding and decoding.
        loop_seconds: from the first denoiser call to the end of the last scheduler step (or denoiser call).
        steps: scheduler steps seen; 0 where the pipeline steps a copy of its scheduler.
        denoiser_calls: calls of all denoisers.
        peak_bytes: on CUDA the most memory allocated by torch during the call, on the CPU the process's largest
            resident set, sampled 50 times a second; None unless asked for.
    """

    seconds: float
    loop_seconds: float
    steps: int
    denoiser_calls: int
    peak_bytes: int | None


def metered(pipe: Any, call: Callable[[], T], *, memory: bool = True) -> tuple[T, CallCost]:
    """Run ``call``, which calls ``pipe`` once, and measure it.

    The wrappers that note the loop are instance-local and come off again, whatever happens. A denoiser under
    ``torch.compile`` stays as compiled as it was.

    Args:
        pipe: a diffusers pipeline, or a bare denoiser (then the loop ends with its last call).
        call: runs it.
        memory: also measure the peak memory.

    Raises:
        ModelError: ``pipe`` holds no denoiser.
    """
    device = next(find_denoisers(pipe)[0].module.parameters()).device
    loop = _Loop(device)
    with ExitStack() as undo:
        for module in _called_modules(pipe):
            undo.callback(_watch_module(module, loop))
        for scheduler in _schedulers(pipe):
            undo.callback(watch_method(scheduler, "step", loop.stepped))
        peak = undo.enter_context(_peak_memory(device)) if memory else None
        synchronise()
        started = time.perf_counter()
        result = call()
        synchronise()
        seconds = time.perf_counter() - started
    return result, CallCost(seconds, loop.seconds(), loop.steps, loop.calls, peak.bytes if peak else None)


def _called_modules(pipe: Any) -> list[nn.Module]:
    """The denoisers as the pipeline calls them: a ``torch.compile`` wrapper where there is one."""
    if isinstance(pipe, nn.Module):
        return [pipe]
    return [pipe.components[denoiser.component] for denoiser in find_denoisers(pipe)]


def _schedulers(pipe: Any) -> list[Any]:
    components = getattr(pipe, "components", {})
    return [c for c in components.values() if hasattr(c, "set_timesteps") and hasattr(c, "step")]


class _Loop:
    """Marks of time: on CUDA events in the stream, so that nothing waits inside the loop."""

    def __init__(self, device: torch.device) -> None:
        self.steps = self.calls = 0
        self._cuda = device.type == "cuda"
        self._first: Any = None
        self._last: Any = None

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def entered(self) -> None:
        self.calls += 1
        if self._first is None:
            synchronise()  # text encoding still in the queue is not the loop's
            self._first = self._now()

    def left(self) -> None:
        self._last = self._now()

    def stepped(self, _: Any) -> None:
        if self._first is not None:
            self.steps += 1
            self._last = self._now()

    def seconds(self) -> float:
        """0 when no denoiser was called."""
        if self._first is None or self._last is None:
            return 0.0
        return self._first.elapsed_time(self._last) / 1e3 if self._cuda else self._last - self._first


def _watch_module(module: nn.Module, loop: _Loop) -> Callable[[], None]:
    if module._compiled_call_impl is None:
        handles = (
            module.register_forward_pre_hook(lambda *_: loop.entered(), prepend=True),
            module.register_forward_hook(lambda *_: loop.left(), always_call=True),
        )

        def remove() -> None:
            for handle in handles:
                handle.remove()

        return remove
    compiled = module._compiled_call_impl  # hooks would be traced: stand around the compiled call instead

    def noted(*args: Any, **kwargs: Any) -> Any:
        loop.entered()
        output = compiled(*args, **kwargs)
        loop.left()
        return output

    module._compiled_call_impl = noted
    return lambda: setattr(module, "_compiled_call_impl", compiled)


class _PeakMemory(AbstractContextManager["_PeakMemory"]):
    bytes = 0


class _CudaPeak(_PeakMemory):
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> _CudaPeak:
        torch.cuda.reset_peak_memory_stats(self._device)
        return self

    def __exit__(self, *error: object) -> None:
        self.bytes = torch.cuda.max_memory_allocated(self._device)


class _ResidentPeak(_PeakMemory):
    """Samples the resident set from a thread: `resource` knows only the peak since the process began."""

    def __enter__(self) -> _ResidentPeak:
        self._process = psutil.Process()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while True:
            self.bytes = max(self.bytes, self._process.memory_info().rss)
            if self._done.wait(0.02):
                return

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = max(self.bytes, self._process.memory_info().rss)


def _peak_memory(device: torch.device) -> _PeakMemory:
    return _CudaPeak(device) if device.type == "cuda" else _ResidentPeak()

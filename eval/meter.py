"""What one pipeline call cost: its seconds and where they went, its peak memory, its energy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil
import torch

from diffaccel.denoiser import find_denoisers
from diffaccel.eval.energy import energy_counter
from diffaccel.eval.stages import Stages, watch_stages
from diffaccel.eval.timing import synchronise

T = TypeVar("T")


@dataclass(frozen=True)
class CallCost:
    """The cost of one call.

    Attributes:
        seconds: the whole call, with text encoding and decoding.
        loop_seconds: from the first denoiser call to the end of the last scheduler step (or denoiser call).
        text_seconds: of the networks that ran before the loop.
        decode_seconds: of those that ran after it.
        step_seconds: of each scheduler step; empty where the pipeline steps a copy of its scheduler.
        steps: scheduler steps seen.
        denoiser_calls: calls of all denoisers.
        peak_bytes: on CUDA the most memory allocated by torch during the call, on the CPU the process's largest
            resident set, sampled 50 times a second; None unless asked for.
        reserved_bytes: on CUDA the most memory that torch held from the driver, what is cached included.
        joules: of an NVIDIA GPU, by NVML; None elsewhere, see `diffaccel.eval.energy`.
    """

    seconds: float
    loop_seconds: float
    text_seconds: float
    decode_seconds: float
    step_seconds: tuple[float, ...]
    steps: int
    denoiser_calls: int
    peak_bytes: int | None
    reserved_bytes: int | None
    joules: float | None


def metered(pipe: Any, call: Callable[[], T], *, memory: bool = True) -> tuple[T, CallCost]:
    """Run ``call``, which calls ``pipe`` once, and measure it.

    The wrappers that note the stages are instance-local and come off again, whatever happens. A denoiser under
    ``torch.compile`` stays as compiled as it was.

    Args:
        pipe: a diffusers pipeline, or a bare denoiser (then the loop ends with its last call).
        call: runs it.
        memory: also measure the peak memory.

    Raises:
        ModelError: ``pipe`` holds no denoiser.
    """
    device = next(find_denoisers(pipe)[0].module.parameters()).device
    stages, energy = Stages(device), energy_counter(device)
    with ExitStack() as undo:
        undo.callback(watch_stages(pipe, stages))
        peak = undo.enter_context(_peak_memory(device)) if memory else _PeakMemory()
        synchronise()
        joules = energy.joules() if energy else 0.0
        started = time.perf_counter()
        result = call()
        synchronise()
        seconds = time.perf_counter() - started
        joules = energy.joules() - joules if energy else 0.0
    return result, CallCost(
        seconds=seconds,
        loop_seconds=stages.loop_seconds(),
        text_seconds=stages.text_seconds(),
        decode_seconds=stages.decode_seconds(),
        step_seconds=tuple(stages.step_seconds()),
        steps=stages.steps,
        denoiser_calls=stages.calls,
        peak_bytes=peak.bytes,
        reserved_bytes=peak.reserved,
        joules=joules if energy else None,
    )


class _PeakMemory(AbstractContextManager["_PeakMemory"]):
    bytes: int | None = None
    reserved: int | None = None

    def __exit__(self, *error: object) -> None:
        return None


class _CudaPeak(_PeakMemory):
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> _CudaPeak:
        torch.cuda.reset_peak_memory_stats(self._device)
        return self

    def __exit__(self, *error: object) -> None:
        self.bytes = torch.cuda.max_memory_allocated(self._device)
        self.reserved = torch.cuda.max_memory_reserved(self._device)


class _ResidentPeak(_PeakMemory):
    """Samples the resident set from a thread: `resource` knows only the peak since the process began."""

    def __enter__(self) -> _ResidentPeak:
        self._process = psutil.Process()
        self._largest = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while True:
            self._largest = max(self._largest, self._process.memory_info().rss)
            if self._done.wait(0.02):
                return

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = max(self._largest, self._process.memory_info().rss)


def _peak_memory(device: torch.device) -> _PeakMemory:
    return _CudaPeak(device) if device.type == "cuda" else _ResidentPeak()

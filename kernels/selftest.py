"""The self-test of one kernel: right, the same every time, inside its tensors, compiled and captured; and how fast.

A `Case` is one candidate of an operator at one shape and dtype. `selftest_cases` lists them, `selftest_run` runs them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffaccel.kernels._candidates import seconds_of, worst_row_error

_POISON = {torch.int8: -128, torch.uint8: 255, torch.int32: 1 << 30, torch.int64: 1 << 30, torch.bool: True}
# Elements before and after each input; keeps the alignment to 16 bytes that kernels are compiled for.
_MARGIN = 4096


@dataclass(frozen=True)
class Subject:
    """A case with its data.

    Attributes:
        run: the candidate, on ``inputs``.
        inputs: what `Surroundings.place` returned; those that float and have no fixed meaning (scales) come first.
        sample: result -> the rows [R, n] that ``reference`` has, in float64.
        tolerance: the largest ||row - reference|| / ||reference||.
        dense: what the operator replaces, for the time.
    """

    run: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    sample: Callable[[Tensor], Tensor]
    reference: Tensor
    tolerance: float
    dense: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class Result:
    """What came out of a case.

    Attributes:
        checks: name -> why it failed, None if it passed. skipped: why the case did not run; "" if it did.
        error, tolerance: relative error of the worst sampled row (None if not finite), and the largest allowed.
        seconds, dense_seconds: of one call; None where not timed. peak_bytes: allocated beyond the inputs, CUDA only.
    """

    operator: str
    candidate: str
    dtype: str
    shape: str
    checks: dict[str, str | None] = field(default_factory=dict)
    skipped: str = ""
    error: float | None = None
    tolerance: float | None = None
    seconds: float | None = None
    dense_seconds: float | None = None
    peak_bytes: int | None = None
    disables: tuple[tuple[str, str], ...] = ()

    @property
    def failures(self) -> dict[str, str]:
        """The checks that failed, and why."""
        return {name: reason for name, reason in self.checks.items() if reason is not None}


@dataclass(frozen=True)
class Case:
    """One candidate at one shape.

    disables: (operator, candidate) pairs that a failure takes out of the choice for this dtype. timed: False where it
    is interpreted. compiles, captures: whether it is also run under torch.compile and, on CUDA, in a CUDA graph.
    """

    operator: str
    candidate: str
    dtype: torch.dtype
    shape: str
    make: Callable[[Surroundings], Subject]
    disables: tuple[tuple[str, str], ...] = ()
    timed: bool = True
    compiles: bool = True
    captures: bool = True

    @property
    def name(self) -> str:
        return f"{self.operator} {self.candidate} {str(self.dtype).removeprefix('torch.')} {self.shape}"

    def result(self, **outcome: Any) -> Result:
        """The result of this case."""
        dtype = str(self.dtype).removeprefix("torch.")
        return Result(self.operator, self.candidate, dtype, self.shape, disables=self.disables, **outcome)


class NotHere(Exception):
    """The candidate cannot take this case on this device; the message says why."""


class Surroundings:
    """Places tensors between stretches of NaN (of integers out of range), and tells whether those were written to."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: list[Tensor] = []

    def place(self, x: Tensor) -> Tensor:
        """A contiguous copy of ``x`` on the device, with poison before and after it."""
        buffer = torch.empty(x.numel() + 2 * _MARGIN, dtype=x.dtype, device=self.device)
        buffer.fill_(_POISON.get(x.dtype, float("nan")))
        inside = buffer[_MARGIN : _MARGIN + x.numel()].view(x.shape)
        inside.copy_(x)
        self._buffers.append(buffer)
        return inside

    def intact(self) -> bool:
        """Whether all of the poison is still there."""
        edges = (edge for b in self._buffers for edge in (b[:_MARGIN], b[-_MARGIN:]))
        return all(bool((_is_poison(edge)).all()) for edge in edges)


def _is_poison(x: Tensor) -> Tensor:
    return x == _POISON[x.dtype] if x.dtype in _POISON else x.float().isnan()


def examine(case: Case, device: torch.device) -> Result:
    """Build a case and put it through every check that the device has."""
    surroundings = Surroundings(device)
    try:
        subject = case.make(surroundings)
        checks: dict[str, str | None] = {}
        first = _with_nan_outputs(subject)
        error = worst_row_error(subject.sample(first), subject.reference)
        wrong = f"relative error {error:.2g}, allowed {subject.tolerance:.2g}"
        checks["accurate"] = None if error <= subject.tolerance else wrong
        checks["repeats"] = _differs(subject.run(*subject.inputs), first)
        if case.compiles:
            checks["compiles"] = _differs(_compiled(subject, device), first)
        if case.captures and device.type == "cuda":
            checks["captures"] = _capture(subject)
        checks["keeps inside"] = None if surroundings.intact() else "wrote outside its tensors"
        seconds, dense, peak = _measure(subject, device) if case.timed else (None, None, None)
    except NotHere as reason:
        return case.result(skipped=str(reason))
    except torch.OutOfMemoryError:
        return case.result(skipped="not enough memory")
    except Exception as reason:
        text = " ".join(str(reason).split())[:200]
        return case.result(checks={"runs": f"{type(reason).__name__}: {text}"})
    return case.result(
        checks=checks,
        error=error if math.isfinite(error) else None,
        tolerance=subject.tolerance,
        seconds=seconds,
        dense_seconds=dense,
        peak_bytes=peak,
    )


def _with_nan_outputs(subject: Subject) -> Tensor:
    """Run with fresh memory filled with NaN, so that what a kernel leaves out is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return subject.run(*subject.inputs).clone()
    finally:
        torch.use_deterministic_algorithms(False)


def _differs(got: Tensor, expected: Tensor) -> str | None:
    """None if equal to the bit."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return f"{tuple(got.shape)} {got.dtype} instead of {tuple(expected.shape)} {expected.dtype}"
    wrong = int((got != expected).sum())
    return None if wrong == 0 else f"{wrong} of {got.numel()} numbers differ"


def _compiled(subject: Subject, device: torch.device) -> Tensor:
    """One graph, without breaks; on the CPU without code generation, which takes half a minute."""
    torch.compiler.reset()
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    with torch.no_grad():
        return torch.compile(subject.run, fullgraph=True, backend=backend)(*subject.inputs)


def _capture(subject: Subject) -> str | None:
    """Capture in a CUDA graph, change the first input in place, replay: must equal the call outside the graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        subject.run(*subject.inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = subject.run(*subject.inputs)
    subject.inputs[0].copy_(subject.inputs[0].flip(-1))
    for _ in range(2):
        captured.zero_()
        graph.replay()
    difference = _differs(captured, subject.run(*subject.inputs))
    subject.inputs[0].copy_(subject.inputs[0].flip(-1))
    return difference


def _measure(subject: Subject, device: torch.device) -> tuple[float | None, float | None, int | None]:
    """Seconds of the candidate and of dense, peak bytes beyond the inputs."""
    peak = None
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        subject.run(*subject.inputs)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    runs = [lambda: subject.run(*subject.inputs), *([subject.dense] if subject.dense else [])]
    times = [[seconds_of(run, device) for run in runs] for _ in range(7)]
    best = [min(column) for column in zip(*times, strict=True)]
    return best[0], best[1] if subject.dense else None, peak

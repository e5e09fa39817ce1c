"""What is kept of computed calls, and how a call is made without computing all of it: the root, or the block stack."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from diffaccel.caching.stack import Ask, Stack
from diffaccel.forecast import Forecast, Slope
from diffaccel.latents import alike, output_tensors
from diffaccel.root import Compute


class Memory(Protocol):
    """Of one branch in one run."""

    @property
    def empty(self) -> bool:
        """Whether there is nothing yet that a call could be skipped with."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are kept."""

    def fits(self, inputs: list[Tensor]) -> bool:
        """Whether a call with these latents is of the remembered kind."""

    def run(self, inputs: list[Tensor], at: float, compute: Compute, skip: bool | Ask) -> tuple[Any, bool]:
        """Make a call: its output, and whether it was skipped. ``inputs`` are kept and must not change."""

    def copies(self, output: Any) -> list[Tensor]:
        """The tensors of ``output``, the last computed one, in copies of which nobody else knows."""


class RootMemory:
    """The whole call is skipped: its output is forecast from the outputs before."""

    def __init__(self, forecast: str, slope: Slope | None = None) -> None:
        self._forecast = Forecast(forecast, slope)

    @property
    def empty(self) -> bool:
        return self._forecast.empty

    @property
    def nbytes(self) -> int:
        return self._forecast.nbytes

    def fits(self, inputs: list[Tensor]) -> bool:
        return self._forecast.fits(inputs)

    def run(self, inputs: list[Tensor], at: float, compute: Compute, skip: bool | Ask) -> tuple[Any, bool]:
        if skip is True:
            return self._forecast(inputs, at), True
        output = compute()
        self._forecast.record(inputs, output, at)
        return output, False

    def copies(self, output: Any) -> list[Tensor]:
        return self._forecast.outputs


class StackMemory:
    """The blocks are skipped: what they add to their streams is forecast from what they added before."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._residuals: dict[int, Forecast] = {}
        self._like: list[Tensor] = []

    @property
    def empty(self) -> bool:
        return not self._stack.covered(self._residuals)

    @property
    def nbytes(self) -> int:
        return sum(forecast.nbytes for forecast in self._residuals.values())

    def fits(self, inputs: list[Tensor]) -> bool:
        return self._stack.refusal is None and alike(inputs, self._like)

    def run(self, inputs: list[Tensor], at: float, compute: Compute, skip: bool | Ask) -> tuple[Any, bool]:
        self._like = [x.new_empty(1).expand(x.shape) for x in inputs]
        return self._stack.call(self._residuals, at, skip, compute)

    def copies(self, output: Any) -> list[Tensor]:
        return [v.detach().clone() for v in output_tensors(output)]

"""What is kept of computed calls, and how a call is made without computing all of it.

There is one kind of memory for each granularity: the whole call, the block stack, single modules, a UNet's deep part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from diffaccel.caching.allowance import Allow
from diffaccel.caching.deep import Deep
from diffaccel.caching.sites import Key, Sites
from diffaccel.caching.stack import Ask, Stack
from diffaccel.forecast import Forecast, Slope
from diffaccel.latents import alike, output_tensors
from diffaccel.root import Compute

Part = Stack | Sites | Deep
"""What of a denoiser is left out when not the whole call is."""

Skip = Mapping[str, bool] | Ask
"""By group (``""`` where there is one only) what is decided, or who decides after the front blocks."""


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

    def run(self, inputs: list[Tensor], at: float, compute: Compute, skip: Skip) -> tuple[Any, bool]:
        """Make a call: its output, and whether all of it was skipped. ``inputs`` are kept and must not change."""

    def copies(self, output: Any) -> list[Tensor]:
        """The tensors of ``output``, the last computed one, in copies of which nobody else knows."""


def memory_of(part: Part | None, forecast: str, slope: Slope | None, allow: Allow) -> Memory:
    """A fresh memory. A part that turned out not to be followable gives way to whole calls."""
    if isinstance(part, Sites):
        return SitesMemory(part, allow)
    if part is None or part.refusal is not None:
        return RootMemory(forecast, slope, allow)
    return DeepMemory(part, allow) if isinstance(part, Deep) else StackMemory(part, allow)


class RootMemory:
    """The whole call is skipped: its output is forecast from the outputs before."""

    def __init__(self, forecast: str, slope: Slope | None, allow: Allow) -> None:
        self._forecast = Forecast(forecast, slope)
        self._allow = allow
        self._allowed: bool | None = None

    @property
    def empty(self) -> bool:
        return self._forecast.empty

    @property
    def nbytes(self) -> int:
        return self._forecast.nbytes

    def fits(self, inputs: list[Tensor]) -> bool:
        return self._allowed is False or self._forecast.fits(inputs)

    def run(self, inputs: list[Tensor], at: float, compute: Compute, skip: Skip) -> tuple[Any, bool]:
        if _told(skip) is True:
            return self._forecast(inputs, at), True
        output = compute()
        if self._allowed is None:
            self._allowed = self._allow("", self._forecast.needs(output_tensors(output)))
        if self._allowed:
            self._forecast.record(inputs, output, at)
        return output, False

    def copies(self, output: Any) -> list[Tensor]:
        return self._forecast.outputs


class _PartMemory:
    """What the memories of parts share: they know the kind of call by its latents alone."""

    def __init__(self, allow: Allow) -> None:
        self._allow = allow
        self._like: list[Tensor] = []

    def fits(self, inputs: list[Tensor]) -> bool:
        return alike(inputs, self._like)

    def _saw(self, inputs: list[Tensor]) -> None:
        self._like = [x.new_empty(1).expand(x.shape) for x in inputs]

    def copies(self, output: Any) -> list[Tensor]:
        return [v.detach().clone() for v in output_tensors(output)]


class StackMemory(_PartMemory):
    """The blocks are skipped: what they add to their streams is forecast from what they added before."""

    def __init__(self, stack: Stack, allow: Allow) -> None:
        super().__init__(allow)
        self._stack = stack
        self._residuals: dict[int, Forecast] = {}

    @property
    def empty(self) -> bool:
        return not self._stack.covered(self._residuals)

    @property
    def nbytes(self) -> int:
        return sum(forecast.nbytes for forecast in self._residuals.values())

    def fits(self, inputs: list[Tensor]) -> bool:
        return self._stack.refusal is None and super().fits(inputs)

    def run(self, inputs: list[Tensor], at: float, compute: Compute, skip: Skip) -> tuple[Any, bool]:
        self._saw(inputs)
        return self._stack.call(self._residuals, at, _told(skip), self._allow, compute)


class SitesMemory(_PartMemory):
    """Single modules are skipped: their outputs are forecast."""

    def __init__(self, sites: Sites, allow: Allow) -> None:
        super().__init__(allow)
        self._sites = sites
        self._kept: dict[Key, Forecast] = {}

    @property
    def empty(self) -> bool:
        return not self._kept

    @property
    def nbytes(self) -> int:
        return sum(forecast.nbytes for forecast in self._kept.values())

    def run(self, inputs: list[Tensor], at: float, compute: Compute, skip: Skip) -> tuple[Any, bool]:
        assert not callable(skip)
        self._saw(inputs)
        return self._sites.call(self._kept, at, skip, self._allow, compute), all(skip.values())


class DeepMemory(_PartMemory):
    """A UNet's deep part is skipped: what comes from it is forecast."""

    def __init__(self, deep: Deep, allow: Allow) -> None:
        super().__init__(allow)
        self._deep = deep
        self._kept = deep.memory()

    @property
    def empty(self) -> bool:
        return self._kept.deep.empty

    @property
    def nbytes(self) -> int:
        return self._kept.deep.nbytes

    def fits(self, inputs: list[Tensor]) -> bool:
        return self._deep.refusal is None and super().fits(inputs)

    def run(self, inputs: list[Tensor], at: float, compute: Compute, skip: Skip) -> tuple[Any, bool]:
        self._saw(inputs)
        left_out = _told(skip) is True
        return self._deep.call(self._kept, at, left_out, self._allow, compute), left_out


def _told(skip: Skip) -> bool | Ask:
    """The decision of the only group."""
    return skip if callable(skip) else skip[""]

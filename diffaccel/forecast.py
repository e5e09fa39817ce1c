"""What stands in for the output of a skipped denoiser call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from diffaccel.latents import add_leading, alike, output_like, output_tensors, partners, skeleton

_DEPTH = {"hold": 1, "residual": 1, "linear": 2, "quadratic": 3, "trend": 3, "fitted": 2}

Slope = Callable[[float, float, float], float]
"""Timesteps t, t_1 and t_0 -> by how much of v_1 - v_0 the output rises from t_1 to t."""


class Forecast:
    """The memory of one branch in one run: its last computed calls, and how they continue.

    With v the outputs computed at timesteps t (1 the last, 0 and -1 the ones before) and x the inputs:

    - ``hold``: v_1
    - ``residual``: x + (v_1 - x_1)
    - ``linear``: v_1 + (v_1 - v_0) * (t - t_1) / (t_1 - t_0)
    - ``quadratic``: the parabola through v_-1, v_0 and v_1 over the timestep
    - ``trend``: the same with the slope scaled by b in [0, 1], the share of v_1 - v_0 that the line through v_-1 and
      v_0 would have foretold (least squares, per sample). Where outputs turn, b is near 0 and the last one is held.

    - ``fitted``: v_1 + a (v_1 - v_0) with a = ``slope``(t, t_1, t_0), measured before on other runs, and no further
      than ``trend`` would go

    Everything kept is a copy: a CUDA graph overwrites its outputs at the next replay, and pipelines write into latents.
    """

    def __init__(self, kind: str, slope: Slope | None = None) -> None:
        self._kind = kind
        self._slope = slope
        self._template: Any = None
        self._inputs: list[Tensor] = []
        self._partners: list[int | None] = []
        self._history: list[tuple[float, list[Tensor]]] = []  # timestep and outputs, the last computed call last
        self._share: list[Tensor] | None = None  # b, by output

    @property
    def outputs(self) -> list[Tensor]:
        """The outputs of the last computed call."""
        return self._history[-1][1]

    @property
    def empty(self) -> bool:
        return not self._history

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are kept."""
        kept = [v for _, outputs in self._history for v in outputs] + (self._inputs if self._kind == "residual" else [])
        return sum(x.nbytes for x in kept)

    def needs(self, outputs: list[Tensor]) -> int:
        """Bytes that will be kept at most, given a call's outputs."""
        per_call = sum(v.nbytes for v in outputs)
        return per_call * (_DEPTH[self._kind] + (self._kind == "residual"))  # an input of each output's size

    def record(self, inputs: list[Tensor], output: Any, at: float) -> bool:
        """Remember a computed call at timestep ``at``; ``inputs`` are kept and must not change.

        Returns:
            Whether the output holds anything that can be told from earlier ones.
        """
        outputs = [v.detach().clone() for v in output_tensors(output)]
        if not outputs:
            return False
        if self._history and not alike(outputs, self.outputs):
            self._history.clear()
        if self._history and self._history[-1][0] == at:  # a second-order scheduler repeats timesteps
            self._history.pop()
        self._share = self._foretold(at, outputs)
        self._history = [*self._history, (at, outputs)][-_DEPTH[self._kind] :]
        # a tensor of one element stands for the shape where the values are not needed
        self._inputs = inputs if self._kind == "residual" else [x.new_empty(1).expand(x.shape) for x in inputs]
        self._template = skeleton(output)
        self._partners = partners(outputs, inputs)
        return True

    def fits(self, inputs: list[Tensor]) -> bool:
        """Whether a call with these inputs is of the remembered kind."""
        return not self.empty and alike(inputs, self._inputs)

    def __call__(self, inputs: list[Tensor], at: float) -> Any:
        """The output at timestep ``at``, in new tensors of the computed output's structure and dtypes."""
        return output_like(self._template, [self._tensor(i, inputs, at) for i in range(len(self.outputs))])

    def _tensor(self, i: int, inputs: list[Tensor], at: float) -> Tensor:
        last, partner = self.outputs[i], self._partners[i]
        if self._kind == "residual" and partner is not None:
            difference = add_leading(last, self._inputs[partner], -1)
            return add_leading(difference, inputs[partner], 1).to(last.dtype)
        if self._kind == "quadratic" and len(self._history) == 3:
            return self._parabola(i, at).to(last.dtype)
        if self._kind in ("linear", "quadratic", "fitted") or self._share is not None:
            rise = self._rise(i, at)
            if rise is not None:
                share = self._steepness(i, at)
                return (last.float() + (rise if share is None else share * rise)).to(last.dtype)
        return last.clone()

    def _steepness(self, i: int, at: float) -> Tensor | float | None:
        """By how much of the line through the last two output ``i`` rises to ``at``; None: all of it."""
        share = None if self._share is None else self._share[i]
        if self._kind != "fitted" or self._slope is None:
            return share
        (t0, _), (t1, _) = self._history[-2:]
        fitted = self._slope(at, t1, t0) * (t1 - t0) / (at - t1)
        return fitted if share is None else share.clamp(max=fitted)

    def _rise(self, i: int, at: float) -> Tensor | None:
        """Output ``i`` at ``at`` less the last one, on the line through the last two; None with fewer than two."""
        if len(self._history) < 2:
            return None
        (t0, before), (t1, last) = self._history[-2:]
        return (last[i].float() - before[i].float()) * ((at - t1) / (t1 - t0))

    def _parabola(self, i: int, at: float) -> Tensor:
        """Output ``i`` at ``at`` by Lagrange's polynomial through the last three."""
        times = [t for t, _ in self._history]
        total: Tensor | None = None
        for t, outputs in self._history:
            weight = math.prod((at - other) / (t - other) for other in times if other != t)
            part = outputs[i].float() * weight
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def _foretold(self, at: float, outputs: list[Tensor]) -> list[Tensor] | None:
        """b of each output as it is computed at ``at``, broadcastable over it; None while there is no line."""
        if self._kind not in ("trend", "fitted") or len(self._history) < 2:
            return None
        shares = []
        for i, v in enumerate(outputs):
            rise, real = self._rise(i, at), v.float() - self.outputs[i].float()
            assert rise is not None
            rest = tuple(range(1, v.ndim))
            along = (rise * real).sum(rest, keepdim=True) / (rise * rise).sum(rest, keepdim=True)
            shares.append(along.nan_to_num(0.0).clamp(0.0, 1.0))
        return shares

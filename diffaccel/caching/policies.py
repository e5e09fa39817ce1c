"""Which steps are skipped. A policy lives for one run and is asked once per step, on the branch that comes first."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from diffaccel.caching.ratios import Ratios


class Policy(Protocol):
    """Sees every step's input, may be asked whether to skip the step, and learns from each step that is computed."""

    def look(self, inputs: list[Tensor], at: float) -> None:
        """Take in a step: the denoiser's latents (kept, so they must not change) and the step's timestep."""

    def skip(self) -> bool:
        """Whether the step may be skipped. Asked at most once a step, and not while steps are protected."""

    def learn(self, outputs: list[Tensor]) -> None:
        """Take in the outputs of a computed step, whose input `look` had."""


class EasyCache:
    """Skip while the predicted change of the output stays within a budget (arXiv:2507.02860, sec. 3).

    With x the input and v the output, k = mean|v_t - v_last| / mean|x_t - x_last| is measured at computed steps.
    Every later step adds k * mean|x_t - x_{t-1}| / mean|v_last| to the accumulated error; it is skipped while that is
    below the threshold, else computed, which sets the error to zero. Reads one scalar from the device each time it is
    asked; everything else stays there.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._k: Tensor | None = None
        self._error: Tensor | None = None
        self._input: list[Tensor] = []  # of the last step, skipped or not
        self._computed: tuple[list[Tensor], list[Tensor]] | None = None  # input and output of the last computed step

    def look(self, inputs: list[Tensor], at: float) -> None:
        if self._k is not None and self._computed is not None and self._error is not None:
            moved = mean_abs_difference(inputs, self._input)
            self._error = self._error + self._k * moved / mean_abs(self._computed[1])
        self._input = inputs

    def skip(self) -> bool:
        return self._k is not None and self._error is not None and bool(self._error < self._threshold)

    def learn(self, outputs: list[Tensor]) -> None:
        if self._computed is not None:
            inputs_last, outputs_last = self._computed
            moved = mean_abs_difference(self._input, inputs_last)
            self._k = mean_abs_difference(outputs, outputs_last) / moved
        self._computed = self._input, outputs
        self._error = torch.zeros_like(mean_abs(outputs))


class MagCache:
    """Skip while calibrated magnitude ratios say that the residual hardly changed (arXiv:2506.09045, sec. 3).

    Each asked step multiplies the accumulated ratio by gamma_t and adds |1 - accumulated ratio| to the error; it is
    skipped while that is at most the threshold, else computed, which sets ratio and error back. Nothing is read from
    the device: which steps are skipped is known from the timesteps alone.
    """

    def __init__(self, threshold: float, ratios: Ratios | None) -> None:
        self._threshold = threshold
        self._ratios = ratios
        self._last: float | None = None
        self._gamma: float | None = None
        self.learn([])

    def look(self, inputs: list[Tensor], at: float) -> None:
        known = self._ratios is not None and self._last is not None
        self._gamma = self._ratios.between(self._last, at) if known else None  # type: ignore[union-attr, arg-type]
        self._last = at

    def skip(self) -> bool:
        if self._gamma is None:
            return False
        self._ratio *= self._gamma
        self._error += abs(1 - self._ratio)
        return self._error <= self._threshold

    def learn(self, outputs: list[Tensor]) -> None:
        self._ratio, self._error = 1.0, 0.0


def mean_abs(tensors: list[Tensor]) -> Tensor:
    """Mean magnitude over all elements of all tensors, a float32 scalar on their device."""
    total = torch.stack([t.abs().sum(dtype=torch.float32) for t in tensors]).sum()
    return total / sum(t.numel() for t in tensors)


def mean_abs_difference(new: list[Tensor], old: list[Tensor]) -> Tensor:
    """Mean magnitude of the difference, a float32 scalar on the tensors' device."""
    return mean_abs([a.float() - b.float() for a, b in zip(new, old, strict=True)])

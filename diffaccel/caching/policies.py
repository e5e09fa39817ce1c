"""Which steps are skipped. A policy lives for one run and is asked once per step, on the branch that comes first."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Protocol

import torch
from torch import Tensor

from diffaccel.caching.ratios import Ratios


class Policy(Protocol):
    """Sees every step's input, may be asked whether to skip the step, and learns from each step that is computed."""

    def look(self, inputs: list[Tensor], at: float, step: int) -> None:
        """Take in a step: the denoiser's latents (kept, so they must not change), its timestep and index."""

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

    def look(self, inputs: list[Tensor], at: float, step: int) -> None:
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

    def look(self, inputs: list[Tensor], at: float, step: int) -> None:
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


class Change:
    """Skip while what is looked at differs from what it was at the last computed step by at most the threshold.

    The distance is mean|a - b| / mean|b|. Looking at what the first block adds, this is FirstBlockCache (as in
    ParaAttention and diffusers) and, with more blocks, DBCache of cache-dit. Reads one scalar from the device.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._now: list[Tensor] = []
        self._computed: list[Tensor] | None = None

    def look(self, inputs: list[Tensor], at: float, step: int) -> None:
        self._now = inputs

    def skip(self) -> bool:
        if self._computed is None:
            return False
        return bool(mean_abs_difference(self._now, self._computed) / mean_abs(self._computed) <= self._threshold)

    def learn(self, outputs: list[Tensor]) -> None:
        self._computed = self._now


class Moved:
    """Skip while what is looked at has moved by less than the threshold in all since the last computed step.

    The distance of neighbouring steps, mean|a - b| / mean|b|, adds up. Looking at the modulated input of the first
    attention this is TeaCache (arXiv:2411.19108, sec. 3.3) with the identity for its polynomial, whose coefficients
    hold for one model, resolution and scheduler only. Reads one scalar from the device.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._last: list[Tensor] = []
        self._moved: Tensor | None = None

    def look(self, inputs: list[Tensor], at: float, step: int) -> None:
        if self._moved is not None:
            self._moved = self._moved + mean_abs_difference(inputs, self._last) / mean_abs(self._last)
        self._last = inputs

    def skip(self) -> bool:
        return self._moved is not None and bool(self._moved < self._threshold)

    def learn(self, outputs: list[Tensor]) -> None:
        self._moved = torch.zeros((), device=outputs[0].device)


class Interval:
    """Skip every step that may be skipped: a fixed interval, as FORA (arXiv:2407.01425) and TaylorSeer have."""

    def look(self, inputs: list[Tensor], at: float, step: int) -> None:
        """It needs none."""

    def skip(self) -> bool:
        return True

    def learn(self, outputs: list[Tensor]) -> None:
        """It needs none."""


class Static:
    """Skip the steps that a schedule made before the run leaves out. Reads nothing from the device."""

    def __init__(self, computed: Container[int]) -> None:
        self._computed = computed
        self._step = -1

    def look(self, inputs: list[Tensor], at: float, step: int) -> None:
        self._step = step

    def skip(self) -> bool:
        return self._step not in self._computed

    def learn(self, outputs: list[Tensor]) -> None:
        """It needs none."""


class SeaCache:
    """Skip while the filtered latents have moved by less than the threshold in all (arXiv:2602.18993, sec. 3).

    The filter keeps of each frequency f what of the latents is signal rather than noise, by a prior of clean power
    1 / f^p per axis: g = (1 - s) / ((1 - s)^2 + s^2 f^p) with the noise level s, scaled to a mean of 1. The distance of
    neighbouring steps, mean|a - b| / mean|b|, adds up until a step is computed. Reads one scalar from the device.

    Args:
        threshold: of the accumulated distance.
        noise: timestep -> noise level in [0, 1].
        power: p.
    """

    def __init__(self, threshold: float, noise: Callable[[float], float], power: float = 3.0) -> None:
        self._threshold, self._noise, self._power = threshold, noise, power
        self._filtered: list[Tensor] = []
        self._moved: Tensor | None = None

    def look(self, inputs: list[Tensor], at: float, step: int) -> None:
        level = min(max(self._noise(at), 1e-6), 1 - 1e-6)
        now = [self._filter(x, level) for x in inputs]
        if self._moved is not None and len(now) == len(self._filtered):
            self._moved = self._moved + mean_abs_difference(now, self._filtered) / mean_abs(self._filtered)
        self._filtered = now

    def skip(self) -> bool:
        return self._moved is not None and bool(self._moved < self._threshold)

    def learn(self, outputs: list[Tensor]) -> None:
        self._moved = torch.zeros((), device=outputs[0].device)

    def _filter(self, x: Tensor, level: float) -> Tensor:
        """``x`` [B, C, (F,) H, W], or tokens [B, N, C], whose axes are then the tokens alone."""
        axes = tuple(range(2, x.ndim)) if x.ndim > 3 else (1,)
        gain = torch.ones((), device=x.device)
        for axis in axes:
            frequency = torch.fft.fftfreq(x.shape[axis], device=x.device).abs().pow(self._power)
            g = (1 - level) / ((1 - level) ** 2 + level**2 * (frequency + 1e-16))
            gain = gain * g.view([-1 if d == axis else 1 for d in range(x.ndim)])
        return torch.fft.ifftn(torch.fft.fftn(x.float(), dim=axes) * (gain / gain.mean()), dim=axes).real


def mean_abs(tensors: list[Tensor]) -> Tensor:
    """Mean magnitude over all elements of all tensors, a float32 scalar on their device."""
    total = torch.stack([t.abs().sum(dtype=torch.float32) for t in tensors]).sum()
    return total / sum(t.numel() for t in tensors)


def mean_abs_difference(new: list[Tensor], old: list[Tensor]) -> Tensor:
    """Mean magnitude of the difference, a float32 scalar on the tensors' device."""
    return mean_abs([a.float() - b.float() for a, b in zip(new, old, strict=True)])

"""Which steps are skipped. A policy is asked once per step, on the branch that comes first."""

from __future__ import annotations

import torch
from torch import Tensor

from diffaccel.caching.forecast import mean_abs, mean_abs_difference


class EasyCache:
    """Skip while the predicted change of the output stays within a budget (arXiv:2507.02860, sec. 3).

    With x the input and v the output, k = mean|v_t - v_last| / mean|x_t - x_last| is measured at computed steps.
    Every later step adds k * mean|x_t - x_{t-1}| / mean|v_last| to the accumulated error; it is skipped while that is
    below the threshold, else computed, which sets the error to zero. Reads one scalar from the device per asked step.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._k: Tensor | None = None
        self._error: Tensor | None = None
        self._input: list[Tensor] = []  # of the last step, skipped or not
        self._computed: tuple[list[Tensor], list[Tensor]] | None = None  # input and output of the last computed step

    def skip(self, inputs: list[Tensor]) -> bool:
        """Whether this step may be skipped. Call `seen` before, whatever else decides the step."""
        if self._k is None or self._error is None:
            return False
        return bool(self._error < self._threshold)

    def seen(self, inputs: list[Tensor]) -> None:
        """Account for a step's input."""
        if self._k is not None and self._computed is not None and self._error is not None:
            change = mean_abs_difference(inputs, self._input) / mean_abs(self._computed[1])
            self._error = self._error + self._k * change
        self._input = [x.detach().clone() for x in inputs]

    def computed(self, outputs: list[Tensor]) -> None:
        """Learn from a computed step, whose input `seen` was told of."""
        if self._computed is not None:
            x_last, v_last = self._computed
            self._k = mean_abs_difference(outputs, v_last) / mean_abs_difference(self._input, x_last)
        self._computed = self._input, outputs
        self._error = torch.zeros((), device=outputs[0].device)

"""What stands in for the output of a skipped denoiser call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffaccel.caching.tensors import add_leading, output_like, output_tensors, partners, skeleton


class Forecast:
    """The memory of one branch: its last computed calls, in tensors of its own.

    Copies, because a CUDA graph overwrites its outputs at the next replay and pipelines write into latents.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._template: Any = None
        self._partners: list[int | None] = []
        self.outputs: list[Tensor] = []  # of the last computed call
        self._before: list[Tensor] = []  # of the one before it
        self._inputs: list[Tensor] = []
        self._at: list[float] = []

    def record(self, inputs: list[Tensor], output: Any, at: float) -> None:
        """Remember a computed call; ``at`` is its place on the noise axis."""
        outputs = [v.detach().clone() for v in output_tensors(output)]
        if not _alike(outputs, self.outputs):
            self._at = []
        self._before = self.outputs if self._kind == "linear" else []
        self.outputs = outputs
        self._inputs = [x.detach().clone() for x in inputs] if self._kind == "residual" else inputs_like(inputs)
        self._at = [*self._at[-1:], at]
        self._template = skeleton(output)
        self._partners = partners(outputs, inputs)

    def fits(self, inputs: list[Tensor]) -> bool:
        """Whether a call with these inputs can be told from what is remembered."""
        return bool(self.outputs) and _alike(inputs, self._inputs)

    @property
    def ready(self) -> bool:
        return bool(self.outputs) and (self._kind != "linear" or len(self._at) == 2)

    def __call__(self, inputs: list[Tensor], at: float) -> Any:
        """The output at ``at``, in new tensors of the computed output's structure and dtypes."""
        return output_like(self._template, [self._tensor(i, inputs, at) for i in range(len(self.outputs))])

    def _tensor(self, i: int, inputs: list[Tensor], at: float) -> Tensor:
        last, partner = self.outputs[i], self._partners[i]
        if self._kind == "residual" and partner is not None:
            difference = add_leading(last, self._inputs[partner], -1)
            return add_leading(difference, inputs[partner], 1).to(last.dtype)
        if self._kind == "linear" and len(self._at) == 2 and self._at[0] != self._at[1]:
            slope = (at - self._at[1]) / (self._at[1] - self._at[0])
            now = last.float()
            return (now + (now - self._before[i].float()) * slope).to(last.dtype)
        return last.clone()


def inputs_like(inputs: list[Tensor]) -> list[Tensor]:
    """Tensors that say shape, dtype and device of ``inputs`` but hold no memory."""
    return [x.new_empty(1).expand(x.shape) for x in inputs]


def _alike(new: list[Tensor], old: list[Tensor]) -> bool:
    return len(new) == len(old) and all(
        a.shape == b.shape and a.dtype == b.dtype and a.device == b.device for a, b in zip(new, old, strict=True)
    )


def mean_abs(tensors: list[Tensor]) -> Tensor:
    """Mean magnitude over all elements of all tensors, a float32 scalar on their device."""
    total = torch.stack([t.abs().sum(dtype=torch.float32) for t in tensors]).sum()
    return total / sum(t.numel() for t in tensors)


def mean_abs_difference(new: list[Tensor], old: list[Tensor]) -> Tensor:
    """Mean magnitude of the difference, a float32 scalar on the tensors' device."""
    return mean_abs([a.float() - b.float() for a, b in zip(new, old, strict=True)])

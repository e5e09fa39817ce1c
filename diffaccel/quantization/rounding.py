"""Rounding that is learnt: which of the two nearest codes each value of a weight takes, and the scale of each channel.

    w ~ step * (1 + gain) * clip(floor(w / step) + h(v)),        h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1)

With h pushed to 0 or 1 in the end (AdaRound, arXiv:2004.10568); the gain stands for the learnt
clipping of QuantVGGT (arXiv:2509.21302): codes stay, what they mean is fitted. What is minimised is not the
error of the weight, but of what a block of the network makes of it; see `reconstruct`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffaccel.kernels.hadamard import block_for, hadamard_matrix
from diffaccel.kernels.packed_weight import pack_nibbles, unpack_nibbles
from diffaccel.quantization.stored import Run

KINDS = ("int8", "int4")
"""Ways of storing a weight whose rounding can be learnt."""
_STRETCH = 1.2
_LARGEST_GAIN = 0.1


class Rounding(nn.Module):
    """The rounding of one stored weight while it is learnt.

    Args:
        weight: what is rounded, float32 [N, K]: conditioned, without its low-rank part.
        tensors: what rounding to nearest makes of it, by name, and its conditioning; see `stored`.
        run: which kind they are of.
    """

    def __init__(self, weight: Tensor, tensors: dict[str, Tensor], run: Run) -> None:
        super().__init__()
        self._tensors, self._run, self._columns = tensors, run, weight.shape[1]
        step = tensors["scale"][:, None].expand_as(weight)
        self._limits = (-127, 127) if run.kind == "int8" else (-8, 7)
        if run.kind == "int4" and "multiplier" in tensors:
            assert run.group is not None
            step = step * tensors["multiplier"].float().repeat_interleave(run.group, 1)[:, : self._columns]
        exact = (weight / step).nan_to_num()
        self._step, self._floor = step, exact.floor()
        share = ((exact - self._floor) / _STRETCH + 0.1 / _STRETCH).clamp(1e-4, 1 - 1e-4)
        self.v = nn.Parameter(share.logit())
        self.gain = nn.Parameter(torch.zeros_like(weight[:, :1]))

    def codes(self, *, hard: bool = False) -> Tensor:
        """[N, K]; ``hard`` as they will be stored, else as they are learnt."""
        h = (_STRETCH * self.v.sigmoid() - 0.1).clamp(0, 1)
        return (self._floor + (h.round() if hard else h)).clamp(*self._limits)

    def weight(self, *, hard: bool = False) -> Tensor:
        """Of the layer, float32 [N, K]: with the low-rank part, without the conditioning; gradients flow through it."""
        return self._released(self._step * self._factor() * self.codes(hard=hard))

    def nearest(self) -> Tensor:
        """The weight of the layer with every value rounded to the nearest code."""
        return self._released(self._step * self._nearest_codes())

    def _released(self, weight: Tensor) -> Tensor:
        t = self._tensors
        if "up" in t:
            weight = weight + t["up"].float() @ t["down"].float()
        weight = weight if "after" not in t else weight * t["after"].float()
        if self._run.rotated:
            block = block_for(self._columns)
            turned = weight.unflatten(1, (-1, block)) @ hadamard_matrix(block, weight.device)
            weight = turned.flatten(1)
        return weight if "before" not in t else weight * t["before"].float()

    def undecided(self, beta: float) -> Tensor:
        """How far h is from 0 and 1 in the mean, at most 1; the larger beta, the more only of those nearly decided."""
        h = (_STRETCH * self.v.sigmoid() - 0.1).clamp(0, 1)
        return (1 - (2 * h - 1).abs().pow(beta)).mean()

    def tensors(self) -> dict[str, Tensor]:
        """As they are stored, the conditioning included."""
        codes = self.codes(hard=True).detach()
        learnt = {"scale": (self._tensors["scale"][:, None] * self._factor().detach())[:, 0].contiguous()}
        learnt |= {"qweight": codes.to(torch.int8)} if self._run.kind == "int8" else {"nibbles": pack_nibbles(codes)}
        return {**self._tensors, **learnt}

    def changed(self) -> float:
        """Share of codes that are not those of rounding to nearest."""
        return float((self.codes(hard=True) != self._nearest_codes()).float().mean())

    def _nearest_codes(self) -> Tensor:
        if self._run.kind == "int8":
            return self._tensors["qweight"]
        return unpack_nibbles(self._tensors["nibbles"], self._columns)

    def _factor(self) -> Tensor:
        return 1 + _LARGEST_GAIN * torch.tanh(self.gain / _LARGEST_GAIN)


def annealed(done: float) -> tuple[float, float]:
    """(weight of `Rounding.undecided`, its beta) at this share of the iterations: free at first, then ever harder."""
    warm_up = 0.2
    if done < warm_up:
        return 0.0, 20.0
    share = (done - warm_up) / (1 - warm_up)
    return 1.0, 2 + (20 - 2) * (1 + math.cos(math.pi * share)) / 2

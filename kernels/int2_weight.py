"""Weights of 2 bits, to store: what they cost is to be compared (allocation of bits), not to be computed with as such.

    weight[n, k] ~ level[n, k] * multiplier[n, k // group] * scale[n],        level in -3, -1, 1, 3

Four levels have no zero, which for two bits is the better use of them. They are nibbles too: `Int2Weight.expanded`
gives the `Int4Weight` of the same values, with which every kernel of `packed_weight` computes, at twice the bytes.

SQNR of a gaussian weight [256, 1152] in dB: 9.6 in groups of 32, 9.4 of 64, 9.3 of 128, 9.2 for each channel, where
four even levels for all of it cannot do better than 9.25 (Max, IRE Trans. IT-6, 1960). With 4 bits: 21.5 to 19.4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.kernels.packed_weight import GROUP_STEP, Int4Weight, pack_nibbles

_LARGEST = 15  # multiplier, as in fit_int4.py
_SCALE_FLOOR = 2.0**-100  # as in int8_linear.py
# Outermost levels tried, as parts of the largest magnitude of the group.
_RATIOS = (1.0, 0.85, 0.75, 0.65, 0.55, 0.45, 0.35)


@dataclass(frozen=True, eq=False)
class Int2Weight:
    """A weight [N, K] in 2 bits.

    Attributes:
        pairs: uint8 [N, ceil(K / 4)] of bits, (level + 3) / 2; column j + i ceil(K / 4) at bits 2 i and 2 i + 1.
        multiplier: int8 [N, ceil(K / group)], 1..15; None per channel.
        scale: float32 [N]; NaN in channels that held NaN or infinity.
        columns: K. group: columns that share a multiplier; None per channel.
    """

    pairs: Tensor
    multiplier: Tensor | None
    scale: Tensor
    columns: int
    group: int | None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) = (out_features, in_features)."""
        return self.scale.shape[0], self.columns

    @property
    def nbytes(self) -> int:
        """Bytes held, multipliers and scales included."""
        return sum(t.nbytes for t in (self.pairs, self.multiplier, self.scale) if t is not None)

    def expanded(self) -> Int4Weight:
        """The same values in 4 bits."""
        quarters = [((self.pairs >> 2 * i) & 3).to(torch.int8) for i in range(4)]
        levels = torch.cat(quarters, 1)[:, : self.columns] * 2 - 3
        return Int4Weight(pack_nibbles(levels), self.multiplier, self.scale, self.columns, self.group)

    def codes(self) -> Tensor:
        """int8 [N, K]."""
        return self.expanded().codes()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """codes * scale, [N, K] in ``dtype``."""
        return self.expanded().dequantize(dtype)


def quantize_int2(weight: Tensor, group: int | None = 64) -> Int2Weight:
    """``weight`` [N, K] of any float dtype -> 2 bits, in ``group`` columns that share a multiplier, a multiple of 32.

    Raises:
        ValueError: Another shape or group.
    """
    if weight.ndim != 2 or not weight.numel() or not weight.is_floating_point():
        raise ValueError(f"expected a float weight [N, K], got {weight.dtype} {tuple(weight.shape)}")
    if group is not None and (group <= 0 or group % GROUP_STEP):
        raise ValueError(f"expected a group of a multiple of {GROUP_STEP} columns, got {group}")
    K = weight.shape[1]
    values = weight.detach().float()
    broken = ~values.isfinite().all(1)
    values = values.masked_fill(broken[:, None], 0.0)
    v = F.pad(values, (0, -K % (group or K))).unflatten(1, (-1, group or K))  # [N, G, g]
    inside = (torch.arange(v.shape[1] * v.shape[2], device=v.device) < K).view(v.shape[1:])  # no level is 0
    widest = v.abs().amax(-1, keepdim=True).div_(3).clamp_(min=_SCALE_FLOOR)
    step, least = widest, torch.full_like(widest, torch.inf)
    for ratio in _RATIOS:
        tried = widest * ratio
        error = (v - _levels(v, tried) * tried).square_().mul_(inside).sum(-1, keepdim=True)
        step, least = torch.where(error < least, tried, step), torch.minimum(error, least)
    multiplier = torch.ones_like(step)
    if group is not None:
        base = step.amax(1, keepdim=True) / _LARGEST
        multiplier = (step / base).round_().clamp_(1, _LARGEST)
        step = multiplier * base
    levels = _levels(v, step)
    codes = levels * multiplier * inside
    scale = (codes * v).sum((1, 2)) / codes.square().sum((1, 2))
    scale = torch.where(scale > 0, scale, _SCALE_FLOOR).masked_fill_(broken, torch.nan)
    factors = None if group is None else multiplier[..., 0].to(torch.int8)
    return Int2Weight(_packed(levels.flatten(1)[:, :K]), factors, scale, K, group)


def _levels(v: Tensor, step: Tensor) -> Tensor:
    return (v / (2 * step)).floor_().mul_(2).add_(1).clamp_(-3, 3)


def _packed(levels: Tensor) -> Tensor:
    bits = ((levels + 3) / 2).to(torch.uint8)
    quarters = F.pad(bits, (0, -levels.shape[1] % 4)).unflatten(1, (4, -1))
    return quarters[:, 0] | quarters[:, 1] << 2 | quarters[:, 2] << 4 | quarters[:, 3] << 6

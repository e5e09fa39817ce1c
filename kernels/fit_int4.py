"""Finds the nibbles, multipliers and scales of `packed_weight` that come closest to a weight.

Signal-to-noise ratio of weights in dB. Float: the same search with a float scale for every group instead of an integer
multiplier. High: the high plane of a nested weight. Truncated: the high halves of int8 codes with a constant correction
for each channel and a fitted scale, what a nested weight would be without groups.

    groups of                 32: absmax float int4 high   64: absmax float int4 high   channel: absmax int4 truncated
    gaussian [256, 1152]          20.3  21.6  21.5  21.5       19.4  20.8  20.8  20.6            16.8   19.4    17.9
    Student t, 4 degrees          17.7  19.0  18.8  18.6       16.0  17.5  17.3  17.2             9.9   13.8    11.2
    bundled image, to_q           19.9  21.2  21.2  21.1       18.8  20.3  20.3  20.1            17.4   19.2    18.5
    bundled image, ff.net.2       19.6  21.0  20.9  20.8       18.5  20.1  20.0  19.8            15.4   18.2    16.6
    bundled video, ff.net.2       19.8  21.2  21.1  21.0       18.8  20.3  20.2  20.0            16.2   18.6    17.4

So an integer multiplier costs up to 0.1 dB and being nested up to 0.2 dB (0.4 dB in groups of 128), whereas truncation
costs 0.7 to 3 dB against rounding for each channel: nested weights have groups, and their high plane is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.kernels.packed_weight import GROUP_STEP, Int4Weight, NestedWeight, pack_nibbles

_LARGEST = 15  # multiplier: 15 * -8 stays within int8 with room for rounding
_SCALE_FLOOR = 2.0**-100  # as in int8_linear.py
# Clipped ranges tried per channel. In groups the next smaller multipliers are such ranges themselves.
_RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
_SMALLER = 4
_LARGER = 3
# Elements at a time on the CPU: the intermediates of the search stay in the second-level cache.
_CHUNK = 1 << 16


def quantize_int4(weight: Tensor, group: int | None = 64, importance: Tensor | None = None) -> Int4Weight:
    """``weight`` [N, K] of any float dtype -> 4 bits.

    Args:
        group: columns that share a multiplier, a multiple of 32; None gives one scale per channel only.
        importance: [K], weight of each column in the squared error that is minimised; the mean square of its input
            makes this the error of the layer's output, up to correlations. None: all alike.

    A channel of zeros becomes zeros, a constant one is exact up to rounding of its scale, one that holds NaN or
    infinity gets a scale of NaN and so an output of NaN.

    Raises:
        ValueError: Another shape, group or importance.
    """
    _check(weight, group, importance)
    K = weight.shape[1]
    parts = []
    for v, h, broken in _chunks(weight, group or K, importance):
        nibbles, multiplier, scale = _fit_channel(v, h) if group is None else _fit_groups(v, h)
        parts.append((_packed(nibbles, K), multiplier, scale.masked_fill_(broken, torch.nan)))
    nibble_parts, multipliers, scales = zip(*parts, strict=True)
    multiplier = None if group is None else torch.cat(multipliers)
    return Int4Weight(torch.cat(nibble_parts), multiplier, torch.cat(scales), K, group)


def quantize_nested(weight: Tensor, group: int = 64, importance: Tensor | None = None) -> NestedWeight:
    """``weight`` [N, K] of any float dtype -> 8 bits that contain 4; arguments as for `quantize_int4`.

    The 8-bit codes are those of `int8_linear.quantize_per_channel` but in the few channels where one group reaches
    beyond 119 on one side and beyond 112 on the other, too far for a remainder of 4 bits: those use -119..119.
    """
    _check(weight, group, importance)
    K = weight.shape[1]
    parts = []
    for v, h, broken in _chunks(weight, group, importance):
        nibbles, multiplier, scale, low, scale8 = _fit_nested(v, h)
        scale, scale8 = (s.masked_fill_(broken, torch.nan) for s in (scale, scale8))
        parts.append((_packed(nibbles, K), multiplier, scale, _packed(low, K), scale8))
    nibbles, multiplier, scale, low, scale8 = (torch.cat(part) for part in zip(*parts, strict=True))
    return NestedWeight(Int4Weight(nibbles, multiplier, scale, K, group), low, scale8)


def _check(weight: Tensor, group: int | None, importance: Tensor | None) -> None:
    if weight.ndim != 2 or not weight.numel() or not weight.is_floating_point():
        raise ValueError(f"expected a float weight [N, K], got {weight.dtype} {tuple(weight.shape)}")
    if group is not None and (group <= 0 or group % GROUP_STEP):
        raise ValueError(f"expected a group of a multiple of {GROUP_STEP} columns, got {group}")
    if importance is not None and importance.shape != weight.shape[1:]:
        raise ValueError(f"expected importance [{weight.shape[1]}], got {tuple(importance.shape)}")


def _chunks(weight: Tensor, group: int, importance: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Some rows at a time: values float32 [n, G, group] with zeros beyond K, importance likewise, broken rows [n].

    Rows that hold NaN or infinity are broken: their values are zeros here.
    """
    N, K = weight.shape
    beyond = -K % group
    h = None if importance is None else F.pad(importance.detach().float(), (0, beyond)).view(-1, group)
    step = max(1, _CHUNK // (K + beyond)) if weight.device.type == "cpu" else N
    for start in range(0, N, step):
        v = weight.detach()[start : start + step].float()
        broken = ~v.isfinite().all(1)
        yield F.pad(v.masked_fill(broken[:, None], 0.0), (0, beyond)).unflatten(1, (-1, group)), h, broken


def _packed(values: Tensor, columns: int) -> Tensor:
    return pack_nibbles(values.flatten(1)[:, :columns])


def _fit_channel(v: Tensor, h: Tensor | None) -> tuple[Tensor, None, Tensor]:
    """``v`` [n, 1, K] -> nibbles alike, no multiplier, scale [n]."""
    widest = _widest_step(v)
    step = _best(v, h, [widest * ratio for ratio in _RATIOS])
    nibbles = _round(v, step)
    return nibbles, None, _fitted(v, h, nibbles, step[:, 0, 0])


def _fit_groups(v: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """``v`` [n, G, g] -> nibbles alike, multiplier int8 [n, G], scale [n]."""
    widest = _widest_step(v)
    scale = widest.abs().amax(1, keepdim=True) / _LARGEST  # [n, 1, 1]
    most = (widest / scale).abs().ceil_().clamp_(1, _LARGEST)
    sign = widest.sign()
    multiplier = _best(v, h, [(most - i).clamp_(min=1) * sign * scale for i in range(_SMALLER)]).div_(scale).round_()
    fitted = _fitted(v, h, _round(v, multiplier * scale) * multiplier, scale[:, 0, 0])
    nibbles = _round(v, multiplier * fitted[:, None, None])
    return nibbles, multiplier[..., 0].to(torch.int8), fitted


def _fit_nested(v: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``v`` [n, G, g] -> nibbles alike, multiplier int8 [n, G] and scale [n] of the 4 bits, low alike, scale of the 8.

    What multiples of m lack of the codes fits -8..7 if m is at most 16 and nothing is clipped by more than that: the
    multipliers to choose from begin at the least that reaches far enough. 16 goes with nibbles -7..7 only, for 8 * 16
    is no int8, and so reaches to 119 on both sides; 15 reaches to 127 on one side and to 112 on the other.
    """
    codes, scale = _codes8(v, 127)
    long, short = _extremes(codes)
    narrow, narrow_scale = _codes8(v, 119)
    too_wide = ((long > 119) & (short > 112)).any(1, keepdim=True)
    codes, scale = torch.where(too_wide, narrow, codes), torch.where(too_wide, narrow_scale, scale)
    long, short = _extremes(codes)
    least = torch.maximum(((long - 7) / 8).ceil_(), ((short - 7) / 7).ceil_()).clamp_(1, 16)
    largest = least.clamp(min=15)
    sign = _widest_step(v).sign()
    steps = [torch.minimum(least + i, largest) * sign * scale for i in range(_LARGER)]
    multiplier = _best(v, h, steps).div_(scale).round_()
    size = multiplier.abs()
    nibbles = torch.floor((codes + size / 2) / size).mul_(multiplier.sign())
    nibbles = nibbles.clamp_(max=7).maximum(torch.where(size == 16, -7.0, -8.0))
    codes4 = nibbles * multiplier
    fitted = _fitted(v, h, codes4, scale[:, 0, 0])
    return nibbles, multiplier[..., 0].to(torch.int8), fitted, codes - codes4, scale[:, 0, 0].clone()


def _extremes(codes: Tensor) -> tuple[Tensor, Tensor]:
    """How far each group of ``codes`` [n, G, g] reaches on its longer and on its shorter side, [n, G, 1]."""
    highest, lowest = codes.amax(-1, keepdim=True), codes.amin(-1, keepdim=True).neg_()
    return torch.maximum(highest, lowest), torch.minimum(highest, lowest)


def _codes8(v: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """int8 codes, as floats, of each channel of ``v`` [n, G, g] and their scale [n, 1, 1]."""
    scale = v.abs().amax((1, 2), keepdim=True).div_(largest).clamp_(min=_SCALE_FLOOR)
    return (v / scale).round_(), scale


def _widest_step(v: Tensor) -> Tensor:
    """[n, G, g] -> [n, G, 1]: the step, negative or positive, with which the largest magnitude becomes nibble -8."""
    highest, lowest = v.amax(-1, keepdim=True), v.amin(-1, keepdim=True)
    positive = highest > -lowest
    step = torch.where(positive, highest, -lowest).div_(8).clamp_(min=_SCALE_FLOOR)
    return torch.where(positive, -step, step)


def _round(v: Tensor, step: Tensor) -> Tensor:
    return (v / step).round_().clamp_(-8, 7)


def _best(v: Tensor, h: Tensor | None, steps: list[Tensor]) -> Tensor:
    """Of ``steps`` [n, G, 1] the one, in each group, with the least squared error over ``v`` [n, G, g]."""
    best, least = steps[0], None
    buffer = torch.empty_like(v)
    for step in steps:
        rounded = torch.mul(v, step.reciprocal(), out=buffer).round_().clamp_(-8, 7)
        squares = rounded.mul_(step).sub_(v).square_()
        error = (squares if h is None else squares.mul_(h)).sum(-1, keepdim=True)
        if least is None:
            least = error
            continue
        best = torch.where(error < least, step, best)
        least = torch.minimum(error, least)
    return best.clone()


def _fitted(v: Tensor, h: Tensor | None, codes: Tensor, otherwise: Tensor) -> Tensor:
    """The scale [n] with which ``codes`` come closest to ``v``, [n, G, g] both; ``otherwise`` if all codes are 0."""
    weighted = codes if h is None else codes * h
    denominator = (weighted * codes).sum((1, 2))
    return torch.where(denominator > 0, (weighted * v).sum((1, 2)) / denominator, otherwise)

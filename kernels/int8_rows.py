"""Rows (tokens) on the way to int8: multiplied by channel, rotated and rounded, without a pass over memory for each.

    x' = ((x * before) (I kron H_B / sqrt(B))) * after,        x' ~ q * row scale

What a channel balance and a randomised Hadamard rotation ask for (`hadamard`) is so done where the rows are read to be
rounded: on CUDA in the kernel that rounds, on the CPU for some rows at a time that stay in cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffaccel.kernels._candidates import has_triton
from diffaccel.kernels.hadamard import hadamard, hadamard_quantize
from diffaccel.kernels.per_token import quantize_per_token


class Conditioner(NamedTuple):
    """What is done to rows [..., K] before they are rounded.

    Args:
        before, after: multipliers of each channel, [K]; ``after`` comes after the rotation.
        block: of the rotation; 1 for none.
    """

    before: Tensor | None = None
    after: Tensor | None = None
    block: int = 1


PLAIN = Conditioner()


def conditioned(x: Tensor, how: Conditioner) -> Tensor:
    """x' of ``x`` [..., K], in its dtype."""
    before, after, block = how
    if block > 1:
        return hadamard(x, before, after, block)
    x = x if before is None else x * before.to(x.dtype)
    return x if after is None else x * after.to(x.dtype)


def quantize_rows(x: Tensor, how: Conditioner = PLAIN, bits: int = 8) -> tuple[Tensor, Tensor]:
    """``x`` [M, K] -> int8 q [M, K] and float32 row scale [M, 1]; q * row scale ~ x'.

    Args:
        bits: 8, or 7 where `int8_linear.activation_bits` says so.
    """
    before, after, block = how
    if block > 1:
        return hadamard_quantize(x, before, after, block, bits)
    factor = before if after is None or before is None else before * after
    factor = after if factor is None else factor
    if bits == 8 and has_triton(x.device, (8, 0)):
        from diffaccel.kernels.token_quantize import token_quantize

        return token_quantize(x, torch.int8, weight=factor)
    return quantize_per_token(x, bits, factor)

"""Randomised block Hadamard rotation of the last dimension (QuIP#, arXiv:2402.04396, sec. 3; QuaRot, arXiv:2404.00456).

x' = (x d) (I kron H_B / sqrt(B)), with B the largest power of two that divides the width, at most 128, and d random
signs: an outlying channel spreads over B channels. Larger blocks spread further, but cost more, and random signs
already make sums of B terms near normal. The signs come times a power of two, which the weight takes back: a sum of B
half-precision activations then stays in range.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

_LARGEST = 128
_SMALLEST = 16


def block_size(width: int) -> int | None:
    """B; None for a width that no block of 16 or more divides, which is not rotated."""
    block = min(width & -width, _LARGEST)
    return block if block >= _SMALLEST else None


def random_signs(width: int, device: torch.device) -> Tensor:
    """d, float32 [width]: the same for every layer of this width."""
    block = block_size(width)
    assert block is not None
    generator = torch.Generator().manual_seed(width)
    signs = torch.randint(0, 2, (width,), generator=generator) * 2.0 - 1.0
    return (signs * 2.0 ** -math.ceil(math.log2(block) / 2)).to(device)


def hadamard(x: Tensor) -> Tensor:
    """``x`` [..., K] times the block-diagonal matrix, which is its own inverse, in its dtype."""
    block = block_size(x.shape[-1])
    assert block is not None
    return (x.unflatten(-1, (x.shape[-1] // block, block)) @ _matrix(block, x.device, x.dtype)).view(x.shape)


@lru_cache(maxsize=16)
def _matrix(block: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Sylvester's, [block, block], orthonormal."""
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / block**0.5).to(device, dtype)

"""The randomised block Hadamard rotation of `diffaccel.kernels.hadamard`, and which widths it is for.

Random signs come times a power of two, which the weight takes back: a sum of a block's half-precision activations then
stays in range.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffaccel.kernels.hadamard import block_for

# Smaller blocks hardly spread an outlier, but cost a pass over the activations.
_SMALLEST = 16


def block_size(width: int) -> int | None:
    """Of the rotation; None for a width that no block of 16 or more divides, which is not rotated."""
    block = block_for(width) if width else 0
    return block if block >= _SMALLEST else None


def random_signs(width: int, device: torch.device | str) -> Tensor:
    """float32 [width]: the same for every layer of this width."""
    block = block_size(width)
    assert block is not None
    generator = torch.Generator().manual_seed(width)
    signs = torch.randint(0, 2, (width,), generator=generator) * 2.0 - 1.0
    return (signs * 2.0 ** -math.ceil(math.log2(block) / 2)).to(device)

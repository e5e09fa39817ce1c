"""Block masks of image tokens: chosen by mass, packed into bits, moved to other grids, completed with text.

Image masks are over the blocks that hold image tokens only, in an order that puts the grid's tokens first: the same
whatever the text's length. Text, and a block that holds tokens of both kinds, stay dense.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffaccel.attention.layout import Layout

_BITS = (1, 2, 4, 8, 16, 32, 64, 128)


def image_blocks(layout: Layout, block_size: int) -> int:
    """Blocks that hold image tokens only."""
    tokens = math.prod(layout.grid)
    return tokens // block_size if layout.before + layout.after else math.ceil(tokens / block_size)


def heaviest(value: Tensor, counts: Tensor) -> Tensor:
    """The ``counts`` [H] most valuable blocks of each head, as evenly over its rows as that number allows.

    Evenly, because a query block that keeps too little is wrong however little it matters to the others.

    Args:
        value: [H, n, n], not negative.
        counts: int64 [H]; at least n are kept, one a row.

    Returns:
        bool [H, n, n].
    """
    n = value.shape[-1]
    counts = counts.to(value.device).clamp(n, n * n)
    whole, rest = counts // n, counts % n
    rank = value.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
    following = value.sort(dim=2, descending=True).values.gather(
        2, whole.clamp_max(n - 1)[:, None, None].expand(-1, n, 1)
    )
    extra = following[..., 0].argsort(dim=1, descending=True, stable=True).argsort(dim=1) < rest[:, None]  # [H, n]
    return rank < (whole[:, None] + extra)[..., None]


def band(n: int, density: float, sink: bool = False) -> Tensor:
    """The band around the diagonal that comes nearest to ``density``, and with ``sink`` the first column and row."""
    place = torch.arange(n)
    distance = (place[:, None] - place[None]).abs()
    best = None
    for width in range(n):
        keep = distance <= width
        if sink:
            keep[0] = keep[:, 0] = True
        gap = abs(float(keep.float().mean()) - density)
        if best is not None and gap > best[0]:
            break
        best = (gap, keep)
    assert best is not None
    return best[1]


def completed(image: Tensor, layout: Layout, block_size: int) -> Tensor:
    """Image mask [H, n, n] -> mask over all blocks of the layout, text dense."""
    total, n = math.ceil(layout.tokens / block_size), image.shape[-1]
    keep = image.new_ones(len(image), total, total)
    keep[:, :n, :n] = image
    return keep


def packed(mask: Tensor) -> Tensor:
    """bool [..., n, n] -> uint8 [..., ceil(n * n / 8)], eight to a byte, the lowest bit first."""
    flat = mask.flatten(-2).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (flat * flat.new_tensor(_BITS)).sum(-1, dtype=torch.uint8)


def unpacked(bits: Tensor, n: int) -> Tensor:
    """The inverse of `packed`."""
    flat = (bits[..., None] & bits.new_tensor(_BITS)) != 0
    return flat.flatten(-2)[..., : n * n].unflatten(-1, (n, n))


def resampled(mask: Tensor, n: int) -> Tensor:
    """Image mask [H, m, m] for n blocks: each takes after the one at the same share of the way. The diagonal is kept.

    Orders are made anew on the other grid, so that the share of the way means the same place, up to rounding.
    """
    place = ((torch.arange(n, device=mask.device) + 0.5) * mask.shape[-1] / n).long()
    keep = mask[:, place][:, :, place]
    return keep | torch.eye(n, dtype=torch.bool, device=mask.device)

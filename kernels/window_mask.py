"""Static window over a grid of tokens, as the set of key blocks each query block keeps.

Tokens are in row-major order (frame, height, width), cut into blocks of ``block_size`` consecutive tokens. Two blocks
i and j lie at the mean squared grid distance of their token pairs, d_ij = |c_i - c_j|^2 + s_i + s_j (c: centre,
s: spread of the block around it). A pair is kept if either block counts the other among its k nearest, k being as
large as the density allows. Ranks instead of distances keep the windows at the borders as rich as those in the middle:
with one radius for all, a corner of a video would see an eighth of the keys. The choice is symmetric, and a denser
mask contains a sparser one. Text rows and columns stay dense ("arrow" attention of DiTFastAttn-V2; arXiv:2503.22796).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def window_blocks(
    grid: Sequence[int],
    text_before: int = 0,
    text_after: int = 0,
    *,
    density: float,
    block_size: int = 64,
    axis_scale: Sequence[float] | None = None,
) -> Tensor:
    """The kept blocks of a window around each query block.

    Args:
        grid: tokens along each axis, outermost first: ``(F, H, W)``, ``(H, W)`` or ``(N,)``.
        text_before: text tokens ahead of the grid. A block that holds any text token counts as text and stays dense.
        text_after: text tokens behind the grid.
        density: kept fraction in (0, 1] of the blocks between pure image blocks; lower = faster, further from the
            original. The diagonal is always kept. Over all blocks the density is higher where there is text:
            ``mask.float().mean()``.
        block_size: tokens in a block.
        axis_scale: length of one grid step along each axis; 1 each unless given. Larger = narrower window on that axis.

    Returns:
        bool [1, n, n], n = ceil(all tokens / block_size), symmetric; True = kept.
    """
    grid = tuple(int(size) for size in grid)
    if not grid or min(grid) < 1 or min(text_before, text_after) < 0 or block_size < 1:
        raise ValueError(
            f"grid and block_size must be positive and text lengths not negative, got grid={grid}, "
            f"text_before={text_before}, text_after={text_after}, block_size={block_size}"
        )
    if not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], got {density}")
    scale = torch.ones(len(grid)) if axis_scale is None else torch.as_tensor(axis_scale)
    if scale.shape != (len(grid),):
        raise ValueError(f"axis_scale needs one number for each of the {len(grid)} axes, got {axis_scale}")

    tokens = math.prod(grid)
    blocks = math.ceil((text_before + tokens + text_after) / block_size)
    keep = torch.ones(1, blocks, blocks, dtype=torch.bool)
    # Blocks without a single text token: from the first whole one to the last one.
    first = math.ceil(text_before / block_size)
    last = blocks if text_after == 0 else (text_before + tokens) // block_size
    if last - first < 2:
        return keep
    begin = first * block_size - text_before
    end = min(last * block_size - text_before, tokens)
    distance = _block_distance(grid, scale.double(), begin, end, block_size)
    keep[0, first:last, first:last] = _nearest_pairs(distance, density)
    return keep


def _block_distance(grid: tuple[int, ...], scale: Tensor, begin: int, end: int, block_size: int) -> Tensor:
    """Mean squared distance [n, n] of the token pairs between the blocks of the image tokens ``begin`` to ``end``."""
    index = torch.arange(begin, end)
    position = torch.stack(torch.unravel_index(index, grid), dim=1).double() * scale  # [tokens, axes]
    block = (index - begin) // block_size
    count = torch.bincount(block).double()[:, None]
    zeros = torch.zeros(len(count), len(grid), dtype=torch.float64)
    centre = zeros.index_add(0, block, position) / count
    spread = (zeros.index_add(0, block, (position - centre[block]) ** 2) / count).sum(1)
    distance = spread[:, None] + spread[None, :]
    for axis in range(len(grid)):
        distance += (centre[:, axis, None] - centre[None, :, axis]) ** 2
    # Rounded to float32, so that equal distances tie and the index, not the last bit, decides.
    return distance.float()


def _nearest_pairs(distance: Tensor, density: float) -> Tensor:
    """Symmetric bool [n, n]: the diagonal, then the nearest pairs until ``density`` of the n * n blocks is kept."""
    n = len(distance)
    # Rank of j seen from i = how many blocks are strictly nearer; ties share a rank.
    rank = torch.searchsorted(distance.sort(1).values, distance)
    row, col = torch.triu_indices(n, n, offset=1)
    nearer, farther = torch.minimum(rank, rank.T)[row, col], torch.maximum(rank, rank.T)[row, col]
    pairs = min(max(round((density * n * n - n) / 2), 0), len(row))
    order = torch.argsort(nearer * n + farther, stable=True)[:pairs]
    keep = torch.eye(n, dtype=torch.bool)
    keep[row[order], col[order]] = True
    return keep | keep.T

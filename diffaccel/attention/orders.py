"""Orders in which the tokens of a grid can be read, so that what attends to each other lies side by side.

All orders of the grid's axes (PAROAttention, arXiv:2506.16054, sec. 3.2), and space-filling curves over the whole grid
or over each frame. A name means the same on any grid with as many axes: ``fwh`` reads width before height.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import permutations

import torch
from torch import Tensor

from diffaccel.attention.layout import Layout

CURVES = ("morton", "hilbert")
_AXES = {1: "n", 2: "hw", 3: "fhw"}


def order_names(axes: int) -> tuple[str, ...]:
    """Every order of a grid with this many axes, the natural one first."""
    letters = _AXES[axes]
    names = ["".join(p) for p in permutations(letters)]
    if axes > 1:
        names += CURVES
    if axes == 3:
        names += [f"f-{curve}" for curve in CURVES] + [f"{curve}-f" for curve in CURVES]
    return tuple(names)


@lru_cache(maxsize=256)
def token_order(name: str, layout: Layout) -> Tensor:
    """The tokens of ``layout``: its grid in this order, then the others, so that text never shifts the image's blocks.

    Returns:
        int64 [tokens], a permutation: place i holds token ``order[i]``.

    Raises:
        ValueError: the grid has no such order.
    """
    if name not in order_names(len(layout.grid)):
        raise ValueError(
            f"a grid {layout.grid} has the orders {', '.join(order_names(len(layout.grid)))}; got {name!r}"
        )
    grid = _grid_order(name, layout.grid) + layout.before
    last = layout.before + math.prod(layout.grid)
    return torch.cat([grid, torch.arange(layout.before), torch.arange(last, layout.tokens)])


def _grid_order(name: str, grid: Sequence[int]) -> Tensor:
    letters = _AXES[len(grid)]
    if set(name) == set(letters):
        index = torch.arange(math.prod(grid)).reshape(tuple(grid))
        return index.permute([letters.index(letter) for letter in name]).reshape(-1)
    place = torch.cartesian_prod(*(torch.arange(n) for n in grid))  # [tokens, axes]
    if name in CURVES:
        return _along(name, place).argsort(stable=True)
    frames, plane = place[:, 0], _along(name.strip("f").strip("-"), place[:, 1:])
    major, minor = (frames, plane) if name.startswith("f-") else (plane, frames)
    return (major * (int(minor.max()) + 1) + minor).argsort(stable=True)


def _along(curve: str, place: Tensor) -> Tensor:
    """Where each place [tokens, axes] lies on the curve through the smallest enclosing cube of 2 ** bits places."""
    bits = max(int(place.max()).bit_length(), 1)
    axes = list(place.unbind(1))
    return _interleave(axes if curve == "morton" else _transposed_hilbert(axes, bits), bits)


def _interleave(axes: Sequence[Tensor], bits: int) -> Tensor:
    index = torch.zeros_like(axes[0])
    for bit in reversed(range(bits)):
        for axis in axes:
            index = index << 1 | (axis >> bit & 1)
    return index


def _transposed_hilbert(axes: Sequence[Tensor], bits: int) -> list[Tensor]:
    """J. Skilling, Programming the Hilbert curve (AIP Conf. Proc. 707, 2004): coordinates to transposed index."""
    x = [axis.clone() for axis in axes]
    for level in reversed(range(1, bits)):
        q, p = 1 << level, (1 << level) - 1
        for i in range(len(x)):
            inverts = (x[i] & q) != 0
            swap = torch.where(inverts, torch.zeros_like(x[0]), (x[0] ^ x[i]) & p)
            x[0] = torch.where(inverts, x[0] ^ p, x[0] ^ swap)
            if i:
                x[i] = x[i] ^ swap
    for i in range(1, len(x)):
        x[i] = x[i] ^ x[i - 1]
    t = torch.zeros_like(x[0])
    for level in reversed(range(1, bits)):
        t = torch.where((x[-1] & (1 << level)) != 0, t ^ ((1 << level) - 1), t)
    return [axis ^ t for axis in x]

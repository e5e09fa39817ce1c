"""The second pass of the calibration: what each block is worth, for each head in its order."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from diffaccel.attention.layout import Layout
from diffaccel.attention.masks import image_blocks
from diffaccel.attention.orders import order_names, token_order
from diffaccel.attention.profile import Seen
from diffaccel.attention.section import BlockSparse
from diffaccel.clock import Call
from diffaccel.kernels.block_mass import block_influence, block_mass
from diffaccel.plan import in_steps

_MOST_QUERIES = 8192
"""Queries that one call is measured by: a block of 64 then has some, however many tokens there are."""


class Worth:
    """The second pass, as a witness: mass or influence by block, as the section's policy says.

    Args:
        section: says at which steps, and how they are divided among the sets of masks.
        orders: site -> the order of each head; sites that are not in it take the section's, or the natural one.

    Attributes:
        sums: site -> float32 [sets, H, n, n], over calls.
        calls: site -> how many calls each set saw.
        layouts: site -> of its tokens.
    """

    def __init__(self, section: BlockSparse, orders: dict[int, list[str]]) -> None:
        self.sums: dict[int, Tensor] = {}
        self.calls: dict[int, Counter[int]] = {}
        self.layouts: dict[int, Layout] = {}
        self.orders = orders
        self._section = section

    def __call__(self, call: Call, seen: Seen) -> None:
        if not in_steps(call.progress, self._section.steps):
            return
        layout = self.layouts.setdefault(seen.site, seen.layout)
        if layout != seen.layout:
            return
        n = image_blocks(layout, self._section.block_size)
        if seen.site not in self.orders:
            self.orders[seen.site] = [_only_order(self._section, layout)] * seen.query.shape[1]
        orders = torch.stack([token_order(name, layout) for name in self.orders[seen.site]])
        worth = worth_of(self._section, seen, orders[None])[0, :, :n, :n].cpu()
        into = self._section.mask_at(call.progress)
        if seen.site not in self.sums:
            self.sums[seen.site] = torch.zeros(self._section.masks, *worth.shape)
            self.calls[seen.site] = Counter()
        self.sums[seen.site][into] += worth / len(seen.query)
        self.calls[seen.site][into] += 1

    def means(self, site: int) -> Tensor:
        """Of one call: [sets, H, n, n]; a set that no call fell into takes the next one's that has some."""
        counts = [self.calls[site][i] for i in range(self._section.masks)]
        filled = [i for i, count in enumerate(counts) if count]
        source = [min(filled, key=lambda j: (abs(j - i), -j)) for i in range(len(counts))]
        return torch.stack([self.sums[site][j] / counts[j] for j in source])


def worth_of(section: BlockSparse, seen: Seen, orders: Tensor, most: int = _MOST_QUERIES) -> Tensor:
    """What ``section`` measures of one call, in orders [C, N] or [C, H, N]: float32 [C, H, n, n].

    Args:
        most: queries that are looked at; of more tokens, an even sample.
    """
    size, options, queries = section.block_size, (seen.attn_mask, seen.scale), sampled(seen.layout.tokens, most)
    if section.kind == "influence":
        return block_influence(seen.query, seen.key, seen.value, size, orders, *options, queries=queries)
    return block_mass(seen.query, seen.key, size, orders, *options, maxima=False, queries=queries)[0]


def sampled(tokens: int, most: int) -> Tensor:
    """Queries to look at: all, or ``most`` of them at random, the same each time. int64, rising."""
    if tokens <= most:
        return torch.arange(tokens)
    return torch.randperm(tokens, generator=torch.Generator().manual_seed(0))[:most].sort().values


def _only_order(section: BlockSparse, layout: Layout) -> str:
    names = order_names(len(layout.grid))
    return str(section.reorder) if section.reorder in names else names[0]

"""How a density is spent on heads, sites and steps.

``even``: each head the same. ``share``: one threshold on what is measured of a block for all. ``error``: by marginal
gain, where what it costs the denoiser's output to leave blocks out is measured: for each head the error of its own
output at some densities, and for each site how far that moves the output of the denoiser.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.attention.layout import Layout
from diffaccel.attention.masks import completed, heaviest, image_blocks, packed
from diffaccel.attention.orders import token_order
from diffaccel.attention.profile import Profiler, Seen
from diffaccel.attention.section import BlockSparse
from diffaccel.attention.worth import Worth
from diffaccel.clock import Call
from diffaccel.kernels.block_pattern import BlockPattern
from diffaccel.kernels.block_sparse import block_sparse_attention
from diffaccel.plan import in_steps

_LADDER = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)
"""Densities at which errors are measured."""

_SORTED = 2**24
"""Blocks that a threshold is found by; of more, an even sample."""

Counts = dict[int, Tensor]
"""Site -> int64 [sets, H], the blocks that each head keeps."""


def allocated(section: BlockSparse, profiler: Profiler, worth: Worth, run: Callable[[], None]) -> dict[int, Tensor]:
    """The masks of one denoiser.

    Args:
        section: with density and way of allocation.
        profiler: of the denoiser, at work.
        worth: of its sites.
        run: runs the pipeline on the first prompt.

    Returns:
        Site -> packed masks, uint8 [sets, H, bytes].
    """
    means = {site: worth.means(site) for site in worth.sums}
    even = {site: _even(mass, section.density) for site, mass in means.items()}
    if section.allocate == "even" or not means:
        counts = even
    elif section.allocate == "share":
        counts = _by_threshold(means, worth, section.density)
    else:
        errors = Errors(section, profiler, worth, means, even)
        profiler.witness, profiler.trial = errors.heads, errors.denoiser
        run()
        profiler.witness = profiler.trial = None
        counts = errors.allocate()
    return {
        site: torch.stack([packed(heaviest(mass[s], counts[site][s])) for s in range(len(mass))])
        for site, mass in means.items()
    }


def _even(mass: Tensor, density: float) -> Tensor:
    return torch.full(mass.shape[:2], round(density * mass.shape[-1] ** 2))


def _by_threshold(means: dict[int, Tensor], worth: Worth, density: float) -> Counts:
    """The threshold at which, over all calls, the share ``density`` of the blocks is kept."""
    values, weights = [], []
    stride = 1 + sum(mass.numel() for mass in means.values()) // _SORTED
    for site, mass in means.items():
        calls = torch.tensor([float(max(worth.calls[site][s], 1)) for s in range(len(mass))])
        values.append(mass.flatten()[::stride])
        weights.append(calls[:, None, None, None].expand_as(mass).flatten()[::stride])
    value, weight = torch.cat(values), torch.cat(weights)
    order = value.argsort(descending=True)
    spent = weight[order].cumsum(0)
    last = int(torch.searchsorted(spent, density * spent[-1]).clamp_max(len(order) - 1))
    threshold = value[order[last]]
    return {site: (mass >= threshold).sum((2, 3)) for site, mass in means.items()}


class Errors:
    """What leaving blocks out costs, measured at the middle step of each set of masks.

    Args:
        section: with density.
        profiler: of the denoiser.
        worth: with the orders of the heads.
        means: site -> worth of one call, [sets, H, n, n].
        even: counts at the section's density.
    """

    def __init__(
        self, section: BlockSparse, profiler: Profiler, worth: Worth, means: dict[int, Tensor], even: Counts
    ) -> None:
        self._section = section
        self._profiler = profiler
        self._worth = worth
        self._means = means
        self._even = even
        shape = {site: (*mass.shape[:2], len(_LADDER)) for site, mass in means.items()}
        self._own = {site: torch.zeros(s) for site, s in shape.items()}
        self._at_density = {site: torch.zeros(s[:2]) for site, s in shape.items()}
        self._moved = {site: torch.zeros(s[0]) for site, s in shape.items()}

    def heads(self, call: Call, seen: Seen) -> None:
        """A witness: the squared error of each head's output at each density of the ladder, over its square."""
        if not self._measured_at(call) or seen.layout != self._worth.layouts.get(seen.site):
            return
        into = self._section.mask_at(call.progress)
        exact = F.scaled_dot_product_attention(
            seen.query, seen.key, seen.value, seen.attn_mask, scale=seen.scale, enable_gqa=_grouped(seen)
        ).float()
        for rung, density in enumerate(_LADDER):
            n = image_blocks(seen.layout, self._section.block_size)
            counts = torch.full((exact.shape[1],), round(density * n * n))
            self._own[seen.site][into, :, rung] += self._error(seen, into, counts, exact)
        self._at_density[seen.site][into] += self._error(seen, into, self._even[seen.site][into], exact)

    def denoiser(self, call: Call, output: list[Tensor], again: Callable[[], list[Tensor]]) -> None:
        """A trial: how far each site alone, at the section's density, moves the output of the denoiser."""
        if not self._measured_at(call):
            return
        into = self._section.mask_at(call.progress)
        watching, self._profiler.witness = self._profiler.witness, None
        for site, layout in self._worth.layouts.items():
            pattern = self._pattern(site, layout, into, self._even[site][into])
            self._profiler.put(site, ((layout.tokens, pattern.to(output[0].device)),))
            moved = again()
            self._profiler.put(site, ())
            change = sum(float((a.float() - b.float()).square().sum()) for a, b in zip(moved, output, strict=True))
            self._moved[site][into] += change / sum(float(x.float().square().sum()) for x in output)
        self._profiler.witness = watching

    def allocate(self) -> Counts:
        """By marginal gain: from the lowest density on, each time the step up that saves most error for its blocks."""
        density = {site: torch.full(own.shape[:2], _LADDER[0]) for site, own in self._own.items()}
        weights: dict[tuple[int, int], float] = {}
        total = left = 0.0
        for site, own in self._own.items():
            for into in range(len(own)):
                calls, blocks = self._worth.calls[site][into], self._means[site].shape[-1] ** 2
                weights[site, into] = calls * blocks
                total += calls * blocks * own.shape[1]
        left = (self._section.density - _LADDER[0]) * total
        heap = [
            step
            for (site, into), weight in weights.items()
            if weight
            for head in range(self._own[site].shape[1])
            if (step := self._step(site, into, head, 0)) is not None
        ]
        heapq.heapify(heap)
        while heap:
            _, site, into, head, rung = heapq.heappop(heap)
            current = float(density[site][into, head])
            cost = (_LADDER[rung] - current) * weights[site, into]
            if cost > left:
                continue
            left -= cost
            density[site][into, head] = _LADDER[rung]
            if (step := self._step(site, into, head, rung)) is not None:
                heapq.heappush(heap, step)
        counts = {}
        for site, share in density.items():
            unseen = torch.tensor([self._worth.calls[site][into] == 0 for into in range(len(share))])
            share[unseen] = self._section.density
            counts[site] = (share * self._means[site].shape[-1] ** 2).round().long()
        return counts

    def _step(self, site: int, into: int, head: int, rung: int) -> tuple[float, int, int, int, int] | None:
        """The best step up from ``rung``: (error saved per density, negative; site, set, head, rung it leads to)."""
        errors = self._own[site][into, head] * self._weight(site, into)
        gains = [
            (-(float(errors[rung] - errors[to]) / (_LADDER[to] - _LADDER[rung])), to)
            for to in range(rung + 1, len(_LADDER))
        ]
        if not gains:
            return None
        gain, to = min(gains)
        return gain, site, into, head, to

    def _weight(self, site: int, into: int) -> float:
        """How much a head's own error moves the denoiser's output."""
        own = float(self._at_density[site][into].sum())
        return float(self._moved[site][into]) / own if own > 0 else 0.0

    def _measured_at(self, call: Call) -> bool:
        """One step for each set of masks: that nearest to the middle of its range."""
        if not in_steps(call.progress, self._section.steps):
            return False
        edges, last = self._section.edges, max((call.steps or 1) - 1, 1)
        into = self._section.mask_at(call.progress)
        inside = [s for s in range(last + 1) if self._section.mask_at(s / last) == into]
        inside = [s for s in inside if in_steps(s / last, self._section.steps)]
        middle = (edges[into] + edges[into + 1]) / 2
        return bool(inside) and call.step == min(inside, key=lambda s: abs(s / last - middle))

    def _error(self, seen: Seen, into: int, counts: Tensor, exact: Tensor) -> Tensor:
        pattern = self._pattern(seen.site, seen.layout, into, counts).to(exact.device)
        sparse = block_sparse_attention(
            *(seen.query, seen.key, seen.value, pattern),
            attn_mask=seen.attn_mask,
            scale=seen.scale,
            enable_gqa=_grouped(seen),
        )
        return ((sparse.float() - exact).square().sum((0, 2, 3))).cpu()

    def _pattern(self, site: int, layout: Layout, into: int, counts: Tensor) -> BlockPattern:
        size = self._section.block_size
        keep = completed(heaviest(self._means[site][into], counts), layout, size)
        orders = torch.stack([token_order(name, layout) for name in self._worth.orders[site]])
        return BlockPattern.from_mask(keep, size, orders, merge=False)


def _grouped(seen: Seen) -> bool:
    return seen.query.shape[1] != seen.key.shape[1]

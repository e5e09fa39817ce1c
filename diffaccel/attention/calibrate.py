"""Calibration of sparse attention: which order of the tokens suits each head, and which blocks hold its attention.

Two passes over the pipeline (after PAROAttention, arXiv:2506.16054, sec. 3.2 and 3.3). The first tries every order on
one prompt, at a few steps, and keeps of each only how far the output would move without the blocks that the policy
leaves out (`block_influence`; the paper looks at how many are empty). The second adds up the worth of blocks in each
head's chosen order, for each set of masks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffaccel.attention.allocate import allocated
from diffaccel.attention.layout import Layout
from diffaccel.attention.masks import band, heaviest, image_blocks, packed
from diffaccel.attention.orders import order_names, token_order
from diffaccel.attention.patterns import Calibrated
from diffaccel.attention.profile import Profiler, Seen
from diffaccel.attention.section import ORDERS, BlockSparse
from diffaccel.attention.worth import Worth, sampled, worth_of
from diffaccel.clock import Call
from diffaccel.denoiser import Denoiser, Site, select
from diffaccel.errors import PlanError
from diffaccel.kernels.block_mass import block_influence
from diffaccel.plan import in_steps
from diffaccel.technique import Context

_STEPS_TRIED = 4
"""Steps at which the first pass measures."""

_SKETCH = 8
"""Dimensions that values are projected to (at random) for the first pass: on average, lengths of sums stay."""

_QUERIES = 2048
"""Queries that the first pass looks at."""

_AS_GOOD = 1.1
"""An order that misses up to this much times what the best one misses is as good."""

Run = Callable[[], None]


def sites_of(section: BlockSparse, denoiser: Denoiser) -> list[Site]:
    """The sites of one denoiser that ``section`` plans; empty if it plans none there."""
    try:
        chosen = select([denoiser], section.sites, "attentions")
    except PlanError:
        return []
    return [site for site in chosen if site.role != "cross"]


@dataclass
class HeadOrders:
    """How well each order suits each head of one site.

    Args:
        layout: of its tokens.
        missed: order -> measurements, each [H]: influence of what would be left out, over all of it in the first order.
    """

    layout: Layout
    missed: dict[str, list[Tensor]] = field(default_factory=dict)

    def score(self) -> tuple[list[str], Tensor]:
        """Names, and what they miss on average, [C, H]; lower = better."""
        names = list(self.missed)
        return names, torch.stack([torch.stack(self.missed[name]).mean(0) for name in names])

    def agreement(self, chosen: Sequence[str]) -> Tensor:
        """[H], the share of measurements in which the chosen order was the best, or as good."""
        stacked = torch.stack([torch.stack(missed) for missed in self.missed.values()])  # [C, measurements, H]
        place = torch.tensor([list(self.missed).index(name) for name in chosen])
        own = stacked.gather(0, place.expand(1, stacked.shape[1], -1))[0]
        return (own <= _AS_GOOD * stacked.amin(0)).float().mean(0)


class Orders:
    """The first pass, as a witness.

    Args:
        section: says at which steps, which density is meant and what counts.
    """

    def __init__(self, section: BlockSparse) -> None:
        self.sites: dict[int, HeadOrders] = {}
        self._section = section

    def __call__(self, call: Call, seen: Seen) -> None:
        steps = call.steps or 1
        tried = {round(i * (steps - 1) / (_STEPS_TRIED - 1)) for i in range(_STEPS_TRIED)}
        if call.step not in tried or not in_steps(call.progress, self._section.steps):
            return
        layout, size = seen.layout, self._section.block_size
        n = image_blocks(layout, size)
        site = self.sites.setdefault(seen.site, HeadOrders(layout))
        if site.layout != layout:  # a site that is called at several sizes: the first counts
            return
        names = _candidates(self._section, layout)
        orders = torch.stack([token_order(name, layout) for name in names])
        queries, options = sampled(layout.tokens, _QUERIES), (seen.attn_mask, seen.scale)
        values = _projected(seen.value)
        sketch = block_influence(seen.query, seen.key, values, size, orders, *options, queries=queries)
        sketch = sketch[..., :n, :n]  # [C, H, n, n]
        if self._section.kind == "spatial-temporal":
            kept = band(n, self._section.density).to(sketch.device).expand_as(sketch)
        else:
            worth = sketch if self._section.kind == "influence" else worth_of(self._section, seen, orders, _QUERIES)
            worth = worth[..., :n, :n]
            counts = torch.full((seen.query.shape[1],), round(self._section.density * n * n))
            kept = torch.stack([heaviest(of_order, counts) for of_order in worth])
        missed = sketch.masked_fill(kept, 0).sum((2, 3)) / sketch[:1].sum((2, 3)).clamp_min(1e-30)
        for i, name in enumerate(names):
            site.missed.setdefault(name, []).append(missed[i].cpu())

    def choose(self) -> dict[int, list[str]]:
        """Site -> the order of each head."""
        scores = {index: site.score() for index, site in self.sites.items()}
        if self._section.reorder == "fixed":
            total: Counter[str] = Counter()
            for names, score in scores.values():
                total.update(dict(zip(names, score.sum(1).tolist(), strict=True)))
            # A grid that lacks the best order (one site of fewer axes) is read in its own best one.
            best = {i: min(names, key=lambda name: total[name]) for i, (names, _) in scores.items()}
            return {i: [best[i]] * score.shape[1] for i, (_, score) in scores.items()}
        return {i: [names[c] for c in score.argmin(0).tolist()] for i, (names, score) in scores.items()}


def calibrate_section(index: int, section: BlockSparse, context: Context, run: Run, run_all: Run) -> dict[str, Tensor]:
    """Measure one section.

    Args:
        index: its place in the plan.
        section: it needs a calibration.
        context: of a pipeline at work; hooks stay on until it is undone.
        run: runs the pipeline on the first prompt.
        run_all: runs it on every prompt.

    Returns:
        Artefacts.

    Raises:
        PlanError: no attention call was measured; the message says why.
    """
    profilers = []
    for denoiser in context.denoisers:
        if sites := sites_of(section, denoiser):
            profilers.append(Profiler(denoiser, sites, section, context))
    orders = [Orders(section) for _ in profilers]
    if section.kind == "spatial-temporal" or section.reorder in (True, "fixed"):
        _listen(profilers, orders, run)
    chosen = [found.choose() for found in orders]
    artefacts: dict[str, Tensor] = {}
    if section.kind == "spatial-temporal":
        for profiler, found, names in zip(profilers, orders, chosen, strict=True):
            for site, own in names.items():
                layout = found.sites[site].layout
                keep = packed(band(image_blocks(layout, section.block_size), section.density))
                masks = keep.expand(section.masks, len(own), -1).contiguous()
                artefacts |= _written(index, profiler.sites[site], layout, own, masks, found.sites.get(site))
        return _something(artefacts, section, profilers)
    worth = [Worth(section, names) for names in chosen]
    _listen(profilers, worth, run_all)
    for profiler, found, measured in zip(profilers, orders, worth, strict=True):
        by_site = allocated(section, profiler, measured, run)
        for site, layout in measured.layouts.items():
            own = measured.orders[site]
            artefacts |= _written(index, profiler.sites[site], layout, own, by_site[site], found.sites.get(site))
    return _something(artefacts, section, profilers)


def _something(artefacts: dict[str, Tensor], section: BlockSparse, profilers: Sequence[Profiler]) -> dict[str, Tensor]:
    if not artefacts:
        reasons = "; ".join(profiler.why_nothing() for profiler in profilers) or "no such sites"
        raise PlanError(
            f"BlockSparse(sites={section.sites!r}, steps={section.steps}, block_size={section.block_size}) has nothing "
            f"to calibrate on: {reasons}"
        )
    return artefacts


def _projected(value: Tensor) -> Tensor:
    """[B, H, N, Dv] -> [B, H, N, _SKETCH], where that is less."""
    if value.shape[-1] <= _SKETCH:
        return value
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(value.shape[-1], _SKETCH, generator=generator) / _SKETCH**0.5
    return value.float() @ directions.to(value.device)


def _listen(profilers: Sequence[Profiler], witnesses: Sequence[Orders | Worth], run: Run) -> None:
    for profiler, witness in zip(profilers, witnesses, strict=True):
        profiler.witness = witness
    run()
    for profiler in profilers:
        profiler.witness = None


def _written(
    index: int, site: Site, layout: Layout, names: list[str], masks: Tensor, measured: HeadOrders | None
) -> dict[str, Tensor]:
    agreement = torch.ones(len(names)) if measured is None else measured.agreement(names)
    orders = torch.tensor([ORDERS.index(name) for name in names], dtype=torch.uint8)
    return Calibrated(torch.tensor(layout.grid), orders, masks, agreement).write(index, site)


def _candidates(section: BlockSparse, layout: Layout) -> tuple[str, ...]:
    """The orders to try: all, or for ``spatial-temporal`` frames outermost and innermost."""
    names = order_names(len(layout.grid))
    if section.kind != "spatial-temporal" or len(layout.grid) < 2:
        return names
    return ("fhw", "hwf") if len(layout.grid) == 3 else ("hw", "wh")

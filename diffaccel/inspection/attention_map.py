"""What a head attends to, as a picture: its map in the tokens' own order, and in the plan's with the kept blocks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffaccel.attach import accelerate
from diffaccel.attention.calibrate import sites_of
from diffaccel.attention.patterns import Calibrated, PatternMaker
from diffaccel.attention.profile import Profiler, Seen
from diffaccel.attention.section import BlockSparse
from diffaccel.clock import Call
from diffaccel.denoiser import Site
from diffaccel.errors import InputError, MissingPackageError
from diffaccel.kernels.block_mass import block_mass
from diffaccel.kernels.block_pattern import BlockPattern
from diffaccel.plan import Plan, in_steps

_PIXELS = 96
"""Side of a map, at most: longer sequences are summed by blocks."""


@dataclass(frozen=True)
class HeadMap:
    """One head in one call.

    Args:
        site: its full name.
        head: its number.
        order: name of the order of the tokens.
        natural: mass by group of tokens in their own order, [n, n].
        ordered: the same in the head's order.
        kept: bool [m, m], the blocks that the plan keeps, in that order.
        held: share of the mass in them.
        agreement: share of the calibration's measurements that would have chosen this order, or None.
    """

    site: str
    head: int
    order: str
    natural: Tensor
    ordered: Tensor
    kept: Tensor
    held: float
    agreement: float | None


def head_maps(pipe: Any, plan: Plan, call: Mapping[str, Any], sites: int = 2, heads: int = 4) -> list[HeadMap]:
    """Maps of the first ``heads`` heads at ``sites`` sites spread over the first denoiser, in the middle of a run.

    Args:
        pipe: a pipeline that is not accelerated.
        plan: its first attention section is shown.
        call: arguments of the pipeline's call.

    Raises:
        InputError: the plan has no sparse attention with static masks, or the call makes no attention that it covers.
        PlanError: the plan does not fit the model.
    """
    section = next((s for s in plan.attention if isinstance(s, BlockSparse)), None)
    if section is None or section.kind == "online":
        raise InputError("attention maps need a plan with static block masks: BlockSparse with a policy but 'online'")
    with accelerate(pipe, plan):
        pass  # whether it fits
    found: list[HeadMap] = []
    seen_last: dict[int, tuple[Call, Seen]] = {}
    with accelerate(pipe, Plan()) as accel:
        denoiser = accel._context.denoisers[0]
        planned = sites_of(section, denoiser)
        shown = sorted({round(i * (len(planned) - 1) / max(sites - 1, 1)) for i in range(sites)})
        profiler = Profiler(denoiser, planned, section, accel._context)

        def witness(where: Call, seen: Seen) -> None:
            middle = (section.steps[0] + section.steps[1]) / 2
            if seen.site in shown and in_steps(where.progress, section.steps):
                before = seen_last.get(seen.site)
                if before is None or abs(where.progress - middle) < abs(before[0].progress - middle):
                    seen_last[seen.site] = (where, seen)

        profiler.witness = witness
        pipe(**call)
    maker = PatternMaker(plan.attention, plan.artefacts, planned)  # type: ignore[arg-type]
    index = plan.attention.index(section)
    for site, (where, seen) in sorted(seen_last.items()):
        known = Calibrated.read(plan.artefacts, index, planned[site])
        if maker.why_dense(site, seen.layout, section, seen.query.shape[1]) is None:
            found += _maps(maker, section, planned[site], site, where, seen, known, heads)
    if not found:
        raise InputError("the call made no attention that the plan covers; check its size, steps and sites")
    return found


def draw_heads(maps: Sequence[HeadMap], file: str | os.PathLike[str]) -> None:
    """A row for each head: its map, and the reordered map with what is left out shaded.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError("attention maps as a picture need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(6.4, 3.2 * len(maps)), layout="constrained")
    axes = figure.subplots(len(maps), 2, squeeze=False)
    for (left, right), head in zip(axes, maps, strict=True):
        top = float(torch.cat([head.natural, head.ordered]).flatten().quantile(0.98)) or 1.0
        left.imshow(head.natural.numpy(), vmax=top, cmap="magma")
        left.set_title(f"{head.site}, head {head.head}", fontsize=7)
        side = head.ordered.shape[0]
        right.imshow(head.ordered.numpy(), vmax=top, cmap="magma", extent=(0, side, side, 0))
        right.imshow(
            (~head.kept).float().numpy(), cmap="Blues", alpha=0.45 * (~head.kept).float().numpy(), vmin=0, vmax=1,
            extent=(0, side, side, 0), interpolation="nearest",
        )  # fmt: skip
        agrees = "" if head.agreement is None else f", {head.agreement:.0%} agree"
        right.set_title(f"order {head.order}: {head.held:.0%} of the mass kept{agrees}", fontsize=6)
        for axis in (left, right):
            axis.set_xticks([])
            axis.set_yticks([])
    figure.savefig(file, dpi=120)


def _maps(
    maker: PatternMaker,
    section: BlockSparse,
    where: Site,
    site: int,
    call: Call,
    seen: Seen,
    known: Calibrated | None,
    heads: int,
) -> list[HeadMap]:
    layout, count = seen.layout, seen.query.shape[1]
    pattern = maker.make(site, layout, section, section.mask_at(call.progress), count)
    assert isinstance(pattern, BlockPattern)
    own = torch.arange(layout.tokens)[None] if pattern.order is None else pattern.order.long()
    own, kept = own.expand(count, -1), pattern.keep.expand(count, -1, -1)
    names = known.names() if known is not None else ["natural"] * count
    group = max(-(-layout.tokens // _PIXELS), 1)
    natural = torch.arange(layout.tokens).expand(count, -1)
    fine, _ = block_mass(seen.query, seen.key, group, torch.stack([natural, own]), seen.attn_mask, seen.scale, False)
    coarse, _ = block_mass(seen.query, seen.key, section.block_size, own[None], seen.attn_mask, seen.scale, False)
    return [
        HeadMap(
            where.full_name,
            h,
            names[h],
            fine[0, h].cpu(),
            fine[1, h].cpu(),
            kept[h],
            float(coarse[0, h].cpu()[kept[h]].sum() / coarse[0, h].sum()),
            float(known.agreement[h]) if known is not None else None,
        )
        for h in range(min(heads, count))
    ]

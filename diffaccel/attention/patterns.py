"""From a section, and what was calibrated for it, to the block pattern of one site's calls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffaccel.attention.layout import Layout
from diffaccel.attention.masks import band, completed, image_blocks, resampled, unpacked
from diffaccel.attention.orders import order_names, token_order
from diffaccel.attention.section import ORDERS, BlockSparse
from diffaccel.denoiser import Site
from diffaccel.errors import PlanError
from diffaccel.kernels.block_pattern import BlockPattern
from diffaccel.kernels.online_sparse import OnlinePattern
from diffaccel.kernels.window_mask import window_blocks
from diffaccel.plan import Artefacts

Pattern = BlockPattern | OnlinePattern


@dataclass(frozen=True)
class Calibrated:
    """What was measured for a section at one site.

    Args:
        grid: int64 [axes], of the tokens.
        orders: uint8 [H], places in `ORDERS`.
        masks: uint8 [sets, H, bytes], packed masks of image blocks.
        agreement: float32 [H], the share of measurements that would have chosen the head's order, or one as good.
    """

    grid: Tensor
    orders: Tensor
    masks: Tensor
    agreement: Tensor

    @classmethod
    def read(cls, artefacts: Artefacts, index: int, site: Site) -> Calibrated | None:
        """Of the section with this place in the plan; None if it was not calibrated at ``site``."""
        names = {field: f"attention.{index}.{site.full_name}.{field}" for field in cls.__dataclass_fields__}
        if not all(name in artefacts for name in names.values()):
            return None
        return cls(**{field: artefacts[name] for field, name in names.items()})

    def write(self, index: int, site: Site) -> dict[str, Tensor]:
        """As artefacts."""
        return {f"attention.{index}.{site.full_name}.{n}": getattr(self, n) for n in self.__dataclass_fields__}

    def names(self) -> list[str]:
        """Each head's order."""
        return [ORDERS[i] for i in self.orders.tolist()]


class PatternMaker:
    """Makes the patterns of one denoiser's sites.

    Args:
        sections: of the plan, in its order.
        artefacts: of the plan.
        sites: of the denoiser.
        rank: which share of the heads a call sees, where several processes share them (Ulysses).

    Attributes:
        notes: what a user should know of what was made.
    """

    def __init__(
        self, sections: Sequence[BlockSparse], artefacts: Artefacts, sites: Sequence[Site], rank: int = 0
    ) -> None:
        self.notes: dict[str, None] = {}
        self._sections = list(sections)
        self._rank = rank
        self._calibrated = {
            (i, s): found
            for i, section in enumerate(sections)
            if section.needs_calibration
            for s, site in enumerate(sites)
            if (found := Calibrated.read(artefacts, i, site)) is not None
        }

    def why_dense(self, site: int, layout: Layout, section: BlockSparse, heads: int) -> str | None:
        """Why calls with this layout stay dense; None if they do not."""
        if section.kind in ("window", "arrow"):
            return None
        if section.kind == "online":
            named = section.reorder and section.reorder not in order_names(len(layout.grid))
            return f"a grid of {len(layout.grid)} axes has no order {section.reorder!r}" if named else None
        known = self._calibrated.get((self._sections.index(section), site))
        if known is None:
            return "not calibrated"
        grid = tuple(known.grid.tolist())
        if len(known.orders) % heads:
            return f"calibrated with {len(known.orders)} heads, called with {heads}"
        if len(grid) != len(layout.grid):
            return f"calibrated on a grid of {len(grid)} axes, called with {len(layout.grid)}"
        same = grid == layout.grid and self._fits(known, layout, section)
        if not same and section.other_grid == "dense":
            return f"calibrated on a grid {_words(grid)}, called with {_words(layout.grid)}"
        return None

    def varies(self, section: BlockSparse) -> bool:
        """Whether patterns differ between sites and along the steps."""
        return section.needs_calibration

    def make(self, site: int, layout: Layout, section: BlockSparse, mask_set: int, heads: int) -> Pattern:
        """The pattern of a call for which `why_dense` gives None; on the CPU."""
        size = section.block_size
        if section.kind == "window":
            keep = window_blocks(layout.grid, layout.before, layout.after, density=section.density, block_size=size)
            return BlockPattern.from_mask(keep, size)
        n = image_blocks(layout, size)
        if section.kind == "arrow":
            keep = completed(band(n, section.density, sink=True)[None], layout, size)
            return BlockPattern.from_mask(keep, size, token_order(_natural(layout), layout)[None])
        if section.kind == "online":
            order = token_order(str(section.reorder or _natural(layout)), layout)
            return OnlinePattern.of(order, n, max(round(section.density * n), 1), size)
        known = self._calibrated[self._sections.index(section), site]
        own = slice(self._rank * heads, (self._rank + 1) * heads) if len(known.orders) > heads else slice(None)
        image = unpacked(known.masks[mask_set, own], _side(known, layout, size))
        grid = tuple(known.grid.tolist())
        if image.shape[-1] != n or grid != layout.grid:
            self.notes[f"masks of a grid {_words(grid)} resampled for {_words(layout.grid)}"] = None
            image = resampled(image, n)
        order = torch.stack([token_order(ORDERS[i], layout) for i in known.orders[own].tolist()])
        return BlockPattern.from_mask(completed(image, layout, size), size, order, merge=False)

    def _fits(self, known: Calibrated, layout: Layout, section: BlockSparse) -> bool:
        n = image_blocks(layout, section.block_size)
        return -(-n * n // 8) == known.masks.shape[-1]


def require_calibration(sections: Sequence[BlockSparse], artefacts: Artefacts) -> None:
    """Refuse sections that were never calibrated.

    Raises:
        PlanError: one of ``sections`` needs `diffaccel.calibrate`.
    """
    for index, section in enumerate(sections):
        if section.needs_calibration and not any(name.startswith(f"attention.{index}.") for name in artefacts):
            raise PlanError(
                f"BlockSparse(policy={section.kind!r}) needs a calibration: "
                "plan = diffaccel.calibrate(pipe, plan, prompts=[...]); policies without one are window, arrow, online"
            )


def _side(known: Calibrated, layout: Layout, block_size: int) -> int:
    """Blocks along a side of the calibrated masks: whole blocks of the grid where there was text, else all of them."""
    tokens = math.prod(known.grid.tolist())
    up, down = math.ceil(tokens / block_size), tokens // block_size
    return up if -(-up * up // 8) == known.masks.shape[-1] else down


def _natural(layout: Layout) -> str:
    return order_names(len(layout.grid))[0]


def _words(grid: Sequence[int]) -> str:
    return " x ".join(map(str, grid))

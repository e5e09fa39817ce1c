"""What is known of one shape of denoiser calls: layouts, patterns, and which attention calls stay dense."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from diffaccel.attention.intercept import Patterns
from diffaccel.attention.layout import Geometry, Layout
from diffaccel.attention.patterns import Pattern, PatternMaker
from diffaccel.attention.section import BlockSparse
from diffaccel.kernels.block_pattern import BlockPattern

FEWEST_BLOCKS = 4
"""Shorter sequences stay dense: the window would be all of them."""

_SLOWER = 1.05
# Patterns beyond these bytes are made again when they are needed again: those of other steps wait packed.
_PATTERN_BYTES = 2**31


@dataclass(frozen=True)
class Timing:
    """Seconds of one attention call, dense and sparse."""

    dense: float
    sparse: float
    shape: tuple[int, ...]

    @property
    def slower(self) -> bool:
        return self.sparse > _SLOWER * self.dense


@dataclass
class Learned:
    """One shape of denoiser calls.

    Args:
        maker: of the patterns.
        layouts: by number of tokens; None for tokens that are no image.
        suitable: site -> number of tokens -> calls.
        dense: site -> reason -> calls that stay dense in any case.
        paths: how the kernel ran the sparse calls.
        seen: attention calls that came to PyTorch's function.
        probed: other tokens were looked for by a probe.
        devices: (site, tokens) -> where the calls run.
        heads: (site, tokens) -> how many the calls have.
        fake_mode: of a dry run.
    """

    geometry: Geometry
    maker: PatternMaker
    layouts: dict[int, Layout | None] = field(default_factory=dict)
    suitable: dict[int, Counter[int]] = field(default_factory=dict)
    dense: dict[int, Counter[str]] = field(default_factory=dict)
    paths: set[str] = field(default_factory=set)
    timings: list[Timing] = field(default_factory=list)
    seen: int = 0
    probed: bool = False
    devices: dict[tuple[int, int], torch.device] = field(default_factory=dict)
    heads: dict[tuple[int, int], int] = field(default_factory=dict)
    fake_mode: Any = None
    _patterns: dict[tuple[Any, ...], Pattern] = field(default_factory=dict)
    _achieved: dict[tuple[Any, ...], tuple[float, float]] = field(default_factory=dict)

    def patterns(self, site: int, section: BlockSparse | None, mask_set: int = 0) -> Patterns:
        """What the site's hook needs while a set of masks of ``section`` holds there."""
        if section is None:
            return ()
        found = []
        for tokens in sorted(self.suitable.get(site, ())):
            pattern = self.pattern(site, tokens, section, mask_set)
            if pattern is not None:
                found.append((tokens, pattern))
        return tuple(found)

    def why_dense(self, site: int, tokens: int, section: BlockSparse) -> str | None:
        """Why suitable calls with ``tokens`` tokens stay dense under ``section``; None if they do not."""
        if -(-tokens // section.block_size) < FEWEST_BLOCKS:
            return f"fewer than {FEWEST_BLOCKS} blocks of tokens"
        layout = self.layouts.get(tokens)
        if layout is None:
            return "no image tokens"
        return self.maker.why_dense(site, layout, section, self.heads[site, tokens])

    def asked(self) -> set[float]:
        """The densities that patterns were made for."""
        return {asked for asked, _ in self._achieved.values()}

    def achieved(self, density: float) -> list[float]:
        """Kept shares of all blocks where ``density`` was asked for; one mean where masks differ between sites."""
        kinds: dict[Any, list[float]] = {}
        for (_, _, section, _), (asked, got) in self._achieved.items():
            if asked == density:
                kinds.setdefault(section if self.maker.varies(section) else got, []).append(got)
        return [sum(shares) / len(shares) for shares in kinds.values()]

    def pattern(self, site: int, tokens: int, section: BlockSparse, mask_set: int) -> Pattern | None:
        """The pattern for calls with ``tokens`` tokens; made once, unless others took its room meanwhile."""
        layout = self.layouts.get(tokens)
        if layout is None or self.why_dense(site, tokens, section) is not None:
            return None
        device, heads = self.devices[site, tokens], self.heads[site, tokens]
        own = (site, mask_set, heads) if self.maker.varies(section) else None
        key = (own, tokens, section, device)
        if key in self._patterns:
            return self._patterns[key]
        with unset_fake_temporarily():
            made = self.maker.make(site, layout, section, mask_set, heads)
            self._achieved[key] = (section.density, made.density)
            if self.fake_mode is None:
                made = made.to(device)
            if isinstance(made, BlockPattern):
                for lengths in (made.ranges, made.rows):  # as many as the mask needs: no reason to compile again
                    torch._dynamo.decorators.mark_unbacked(lengths, 0)
        if self.fake_mode is not None:
            made = _faked(made, self.fake_mode, device)
        self._patterns[key] = made
        while len(self._patterns) > 1 and sum(map(_bytes, self._patterns.values())) > _PATTERN_BYTES:
            del self._patterns[next(iter(self._patterns))]
        return made


def _bytes(pattern: Pattern) -> int:
    return sum(x.nbytes for x in vars(pattern).values() if isinstance(x, torch.Tensor))


def _faked(pattern: Pattern, mode: Any, device: torch.device) -> Pattern:
    """For a dry run on fake tensors, which do not mix with real ones."""
    on_host = ("ranges", "rows")
    fakes = {
        name: mode.from_tensor(x) if name in on_host else mode.from_tensor(x).to(device)
        for name, x in vars(pattern).items()
        if isinstance(x, torch.Tensor)
    }
    return replace(pattern, **fakes)

"""Settings of sparse attention. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffaccel.errors import PlanError
from diffaccel.plan import Section, section_type


@section_type
@dataclass(frozen=True, kw_only=True)
class BlockSparse(Section):
    """Compute only some blocks of self-attention: a static window over the token grid; text is always dense.

    Args:
        density: kept share of attention blocks among the image tokens, in (0, 1]; lower = faster, further from the
            original.
        sites: which attention calls, by role (``attn``) or name; cross-attention is never made sparse.
        steps: range of progress in which the mask holds; outside it attention is dense. The noisy start needs
            all tokens.
        block_size: tokens per block, a multiple of 16.
    """

    technique: ClassVar[str] = "attention"

    density: float = 0.5
    sites: str = "attn"
    steps: tuple[float, float] = (0.2, 1.0)
    block_size: int = 64

    def __post_init__(self) -> None:
        self._check_number("density", 0, 1, open_low=True)
        self._check_sites(self.sites)
        self._check_steps(self.steps)
        self._check_number("block_size", 16, 1024, whole=True)
        if self.block_size % 16:
            raise PlanError(f"BlockSparse.block_size must be a multiple of 16, got {self.block_size}")

"""Settings of token merging. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from diffaccel.errors import PlanError
from diffaccel.plan import Section, section_type

if TYPE_CHECKING:
    from diffaccel.plan import Plan

AXES = ("space", "time")


@section_type
@dataclass(frozen=True, kw_only=True)
class MergeTokens(Section):
    """In self-attention, merge keys and values of image tokens that are alike; every token still asks.

    Token Merging (ToMe-SD, arXiv:2303.17604) of keys and values only: nothing has to be unmerged, and since it happens
    inside the attention call, after rotary positions, these stay right. Text among the tokens is never merged.

    Args:
        ratio: share of the image's keys that is merged away, in (0, 0.75]; along ``time`` at most 0.5.
        axis: ``space`` (with the most similar one of the destinations in the same window) or ``time`` (with the token
            at the same place of the frame before, as FrameFusion does, arXiv:2501.01986; videos with full attention).
        sites: which attention calls, by role (``attn``) or name; cross-attention is never merged.
        steps: range of progress in which keys are merged.
        window: tokens, neighbours in their order, within which similar ones are looked for; along ``space``.
        proportional: whether a merged key counts as many times as it has members (an additive mask, which some GPU
            kernels are slower with).
    """

    technique: ClassVar[str] = "tokens"

    ratio: float = 0.5
    axis: str = "space"
    sites: str = "attn"
    steps: tuple[float, float] = (0.2, 1.0)
    window: int = 64
    proportional: bool = True

    def __post_init__(self) -> None:
        self._check_choice("axis", AXES)
        self._check_number("ratio", 0, 0.75 if self.axis == "space" else 0.5, open_low=True)
        self._check_sites(self.sites)
        self._check_steps(self.steps)
        self._check_number("window", 4, 1 << 20, whole=True)
        if self.window % 4:
            raise PlanError(f"MergeTokens.window must be a multiple of 4, got {self.window}")
        if not isinstance(self.proportional, bool):
            raise PlanError(f"MergeTokens.proportional must be True or False, got {self.proportional!r}")

    def conflict(self, plan: Plan) -> str | None:
        if plan.attention:
            return (
                "MergeTokens leaves no grid of keys, which the masks of sparse attention (BlockSparse) are made for; "
                "use one of them"
            )
        return None

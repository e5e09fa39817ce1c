"""Settings of guidance reuse. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from diffaccel.plan import Section, section_type

if TYPE_CHECKING:
    from diffaccel.plan import Plan

FORECASTS = ("hold", "linear", "trend", "zero")


@section_type
@dataclass(frozen=True, kw_only=True)
class GuidanceReuse(Section):
    """Compute the unconditional branch of classifier-free guidance on some steps only.

    On the others it is the conditional output less their difference as forecast from earlier steps, which changes more
    slowly than either (FasterCache, arXiv:2410.19355, sec. 3.3; Adaptive Guidance, arXiv:2312.12487). A step then costs
    half, whether the pipeline calls the denoiser once with both halves or twice.

    Args:
        every: within ``steps`` the branch is computed on every so-manieth step.
        forecast: how the difference goes on: ``hold`` (the last), ``linear`` or ``trend`` as in `StepCache`; ``zero``
            drops guidance there (interval guidance, arXiv:2404.07724), and never computes the branch.
        steps: range of progress in which the branch may be left out. Early differences decide what the picture becomes.
    """

    technique: ClassVar[str] = "guidance"

    every: int = 3
    forecast: str = "hold"
    steps: tuple[float, float] = (0.4, 1.0)

    def __post_init__(self) -> None:
        self._check_number("every", 2, 1000, whole=True)
        self._check_choice("forecast", FORECASTS)
        self._check_steps(self.steps)

    def conflict(self, plan: Plan) -> str | None:
        if getattr(plan.caching, "granularity", "root") != "root":
            return (
                f"GuidanceReuse halves the batch of some calls, and what StepCache(granularity="
                f"{plan.caching.granularity!r}) keeps is for one batch size; use granularity='root'"
            )
        return None

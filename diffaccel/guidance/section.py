"""Settings of guidance reuse. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from diffaccel.errors import PlanError
from diffaccel.plan import Section, section_type

if TYPE_CHECKING:
    from diffaccel.plan import Plan

FORECASTS = ("hold", "linear", "trend", "frequency", "zero")


@section_type
@dataclass(frozen=True, kw_only=True)
class GuidanceReuse(Section):
    """Compute the unconditional branch of classifier-free guidance on some steps only.

    On the others it is the conditional output less their difference as forecast from earlier steps, which changes more
    slowly than either (FasterCache, arXiv:2410.19355, sec. 3.3; Adaptive Guidance, arXiv:2312.12487). A step then costs
    half, whether the pipeline calls the denoiser once with both halves or twice.

    Args:
        every: within ``steps`` the branch is computed on every so-manieth step.
        forecast: how the difference goes on: ``hold`` (the last), ``linear`` or ``trend`` as in `StepCache`,
            ``frequency`` (the last, its low and high frequencies weighted by time, as FasterCache does); ``zero`` drops
            guidance there (interval guidance, arXiv:2404.07724), and never computes the branch.
        change: the branch is computed sooner than on every so-manieth step once the difference is expected to have
            changed by more than this share of the conditional output, by how fast it changed before; None: by count
            alone.
        agree: once both branches have at least this cosine similarity the unconditional one is never computed again in
            the run (arXiv:2312.12487, sec. 4); None: it always goes on. In the published method guidance ends there;
            here what was left of the difference goes on as ``forecast`` says.
        steps: range of progress in which the branch may be left out. Early differences decide what the picture becomes.
    """

    technique: ClassVar[str] = "guidance"

    every: int = 3
    forecast: str = "hold"
    change: float | None = None
    agree: float | None = None
    steps: tuple[float, float] = (0.4, 1.0)

    def __post_init__(self) -> None:
        self._check_number("every", 2, 1000, whole=True)
        self._check_choice("forecast", FORECASTS)
        self._check_steps(self.steps)
        if self.change is not None:
            self._check_number("change", 0, 100, open_low=True)
        if self.agree is not None:
            self._check_number("agree", 0, 1, open_low=True)
        if self.forecast == "zero" and (self.change is not None or self.agree is not None):
            raise PlanError(
                "GuidanceReuse(forecast='zero') never computes the branch, so there is no change and no agreement to "
                f"look at; got change={self.change!r} and agree={self.agree!r}"
            )

    def conflict(self, plan: Plan) -> str | None:
        granularity = getattr(plan.caching, "granularity", "root")
        if granularity != "root":
            return (
                f"GuidanceReuse halves the batch of some calls, and what StepCache(granularity="
                f"{granularity!r}) keeps is for one batch size; use granularity='root'"
            )
        return None

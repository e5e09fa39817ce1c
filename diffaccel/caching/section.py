"""Settings of step caching. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffaccel.plan import Section, section_type

POLICIES = ("easy", "mag")
FORECASTS = ("hold", "residual", "linear", "trend")


@section_type
@dataclass(frozen=True, kw_only=True)
class StepCache(Section):
    """Skip whole denoiser calls while their result can be told from earlier ones.

    Args:
        policy: which steps are skipped: ``easy`` (EasyCache: watches input and output, arXiv:2507.02860) or ``mag``
            (MagCache: by magnitude ratios, arXiv:2506.09045; needs `diffaccel.calibrate`).
        forecast: what stands in for a skipped output: ``hold`` (the last computed one), ``residual`` (the input plus
            the last difference of output and input; what EasyCache and MagCache do), ``linear`` (the line through the
            last two over the timestep; after TaylorSeer, arXiv:2503.06923) or ``trend`` (that line, as far as lines
            held so far in this run).
        threshold: error budget of a run of skipped steps, > 0; higher = faster, further from the original.
        protect_first: share of the schedule at its noisy start that is always computed (at least one step).
        protect_last: number of last steps that are always computed.
        max_skips: most consecutive skipped steps.
        min_steps: schedules with fewer steps are left alone; step-distilled models have nothing to spare.
    """

    technique: ClassVar[str] = "caching"

    policy: str = "easy"
    forecast: str = "trend"
    threshold: float = 0.05
    protect_first: float = 0.1
    protect_last: int = 1
    max_skips: int = 3
    min_steps: int = 9

    def __post_init__(self) -> None:
        self._check_choice("policy", POLICIES)
        self._check_choice("forecast", FORECASTS)
        self._check_number("threshold", 0, 100, open_low=True)
        self._check_number("protect_first", 0, 1)
        self._check_number("protect_last", 0, 1000, whole=True)
        self._check_number("max_skips", 1, 1000, whole=True)
        self._check_number("min_steps", 1, 1000, whole=True)

    @classmethod
    def easycache(cls, threshold: float = 0.05, protect_first: float = 0.14) -> StepCache:
        """EasyCache as published: residual, any number of skips in a row, 7 of 50 steps protected, and the last two."""
        return cls(
            policy="easy",
            forecast="residual",
            threshold=threshold,
            protect_first=protect_first,
            protect_last=2,
            max_skips=1000,
            min_steps=1,
        )

    @classmethod
    def magcache(cls, threshold: float = 0.12, max_skips: int = 4, protect_first: float = 0.2) -> StepCache:
        """MagCache as published, with its settings for Wan 2.1 1.3B; FLUX: 0.24, 5, 0.1."""
        return cls(
            policy="mag",
            forecast="residual",
            threshold=threshold,
            protect_first=protect_first,
            protect_last=0,
            max_skips=max_skips,
            min_steps=1,
        )

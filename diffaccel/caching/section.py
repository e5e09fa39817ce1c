"""Settings of step caching. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffaccel.plan import Section, section_type


@section_type
@dataclass(frozen=True, kw_only=True)
class StepCache(Section):
    """Skip whole denoiser calls while their result can be told from earlier ones.

    Args:
        policy: ``easy`` (EasyCache: watches the model's input and output, arXiv:2507.02860) or ``mag`` (MagCache: skips
            by calibrated magnitude ratios, arXiv:2506.09045; needs `diffaccel.calibrate`).
        threshold: error budget of a run of skipped steps, > 0; higher = faster, further from the original.
        protect_first: share of the schedule at its noisy start that is always computed (at least one step).
        protect_last: number of last steps that are always computed.
        max_skips: most consecutive skipped steps.
    """

    technique: ClassVar[str] = "caching"

    policy: str = "easy"
    threshold: float = 0.05
    protect_first: float = 0.1
    protect_last: int = 1
    max_skips: int = 3

    def __post_init__(self) -> None:
        self._check_choice("policy", ("easy", "mag"))
        self._check_number("threshold", 0, 100, open_low=True)
        self._check_number("protect_first", 0, 1)
        self._check_number("protect_last", 0, 1000, whole=True)
        self._check_number("max_skips", 1, 1000, whole=True)

"""Settings of step caching. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from diffaccel.errors import PlanError
from diffaccel.plan import Section, section_type

POLICIES = ("easy", "mag", "sea", "first-block", "interval", "schedule")
FORECASTS = ("hold", "residual", "linear", "quadratic", "trend", "fitted")
GRANULARITIES = ("root", "stack")


@section_type
@dataclass(frozen=True, kw_only=True)
class StepCache(Section):
    """Skip denoiser calls, or the blocks in them, while their result can be told from earlier ones.

    Args:
        policy: which steps are skipped: ``easy`` (EasyCache: watches input and output, arXiv:2507.02860), ``mag``
            (MagCache: by magnitude ratios, arXiv:2506.09045; needs `diffaccel.calibrate`), ``sea`` (SeaCache: by how
            far the latents moved where they are signal, arXiv:2602.18993), ``first-block`` (FirstBlockCache, DBCache:
            by how what the first blocks add has changed; granularity ``stack``), ``interval`` (every step that
            ``max_skips`` and the protected ones allow) or ``schedule`` (those that cost least by calibrated
            trajectories, after SmoothCache, arXiv:2411.10510; needs `diffaccel.calibrate`; ``psnr`` or ``share`` says
            how many).
        granularity: what a skip leaves out: ``root``, the whole call, or ``stack``, the repeated blocks; embeddings and
            the final projection then see the step's own latents and timestep.
        front: with ``stack``, blocks at the beginning that always run. back: likewise at the end.
        forecast: what stands in for the skipped output (of the call, or what the blocks add): ``hold`` (the last
            computed one), ``residual`` (the input plus the last difference of output and input; what EasyCache and
            MagCache do), ``linear`` (the line through the last two over the timestep; after TaylorSeer,
            arXiv:2503.06923), ``quadratic`` (the parabola through the last three) or ``trend`` (the line, as far as
            lines held so far in this run) or ``fitted`` (the line, as far as lines held when calibrated;
            granularity ``root``).
        psnr: of ``schedule``: error budget, the expected mean PSNR in dB of results in [0, 1] against the
            unaccelerated ones. share: or the largest share of steps that are computed.
        threshold: error budget of a run of skipped steps, > 0; higher = faster, further from the original.
        protect_first: share of the schedule at its noisy start that is always computed (at least one step).
        protect_last: number of last steps that are always computed.
        max_skips: most consecutive skipped steps.
        min_steps: schedules with fewer steps are left alone; step-distilled models have nothing to spare.

    Raises:
        PlanError: a value that cannot be, or ``first-block`` without the granularity that has a first block.
    """

    technique: ClassVar[str] = "caching"

    policy: str = "easy"
    granularity: str = "root"
    front: int = 0
    back: int = 0
    forecast: str = "trend"
    psnr: float | None = None
    share: float | None = None
    threshold: float = 0.05
    protect_first: float = 0.1
    protect_last: int = 1
    max_skips: int = 3
    min_steps: int = 9

    def __post_init__(self) -> None:
        self._check_choice("policy", POLICIES)
        self._check_choice("forecast", FORECASTS)
        self._check_choice("granularity", GRANULARITIES)
        self._check_number("front", 0, 1000, whole=True)
        self._check_number("back", 0, 1000, whole=True)
        if self.granularity == "root" and (self.front or self.back):
            raise PlanError("StepCache.front and .back are blocks of granularity='stack', got granularity='root'")
        if self.looks_inside and (self.granularity != "stack" or not self.front):
            raise PlanError(
                f"StepCache(policy={self.policy!r}) decides after the first blocks: it needs granularity='stack' and "
                f"front of 1 or more, got {self.granularity!r} and {self.front}"
            )
        self._check_schedule()
        self._check_number("threshold", 0, 100, open_low=True)
        self._check_number("protect_first", 0, 1)
        self._check_number("protect_last", 0, 1000, whole=True)
        self._check_number("max_skips", 1, 1000, whole=True)
        self._check_number("min_steps", 1, 1000, whole=True)

    def _check_schedule(self) -> None:
        if (self.psnr is None) + (self.share is None) != (1 if self.policy == "schedule" else 2):
            raise PlanError(
                "StepCache(policy='schedule') has either psnr (decibels) or share (of computed steps), and no other "
                f"policy has one; got policy={self.policy!r}, psnr={self.psnr!r} and share={self.share!r}"
            )
        if self.psnr is not None:
            self._check_number("psnr", 0, 200)
        if self.share is not None:
            self._check_number("share", 0, 1, open_low=True)
        if self.policy == "schedule" and self.forecast not in ("hold", "linear", "fitted"):
            raise PlanError(
                "StepCache(policy='schedule') knows the errors of the forecasts hold, linear and fitted, got "
                f"{self.forecast!r}"
            )
        if self.forecast == "fitted" and self.granularity != "root":
            raise PlanError("StepCache(forecast='fitted') continues whole outputs: it needs granularity='root'")

    @property
    def needs_calibration(self) -> bool:
        """Whether `diffaccel.calibrate` has to measure something before this can be attached."""
        return self.policy in ("mag", "schedule") or self.forecast == "fitted"

    @property
    def looks_inside(self) -> bool:
        """Whether it is decided inside the call, after the first blocks."""
        return self.policy == "first-block"

    @classmethod
    def scheduled(cls, psnr: float | None = None, share: float | None = None, max_skips: int = 4) -> StepCache:
        """The steps that cost least by calibrated trajectories, within ``psnr`` or ``share``; see the class."""
        return cls(
            policy="schedule",
            forecast="hold",
            psnr=psnr,
            share=share,
            protect_first=0.0,
            protect_last=0,
            max_skips=max_skips,
        )

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

    @classmethod
    def first_block(cls, threshold: float = 0.08, front: int = 1, back: int = 0, warm_up: float = 0.0) -> StepCache:
        """FirstBlockCache as in ParaAttention and diffusers; more blocks in front (Fn) or behind (Bn) make it DBCache.

        cache-dit's DBCache has front 8, threshold 0.08 and 8 steps of warm-up.
        """
        return cls._published("first-block", "hold", threshold, protect_first=warm_up, front=front, back=back)

    @classmethod
    def seacache(cls, threshold: float = 0.25) -> StepCache:
        """SeaCache as in diffusers: the line through the last two residuals, at most two skips in a row."""
        return cls._published("sea", "linear", threshold, protect_last=1, max_skips=2)

    @classmethod
    def taylorseer(cls, interval: int = 5, order: int = 1, warm_up: float = 0.1) -> StepCache:
        """TaylorSeer in its lite form: every ``interval``-th step is computed; order 0 is FORA on the whole stack.

        Divided differences over the timesteps instead of step numbers, which a shifted schedule does not space evenly.
        """
        if order not in (0, 1, 2):
            raise PlanError(f"StepCache.taylorseer has order 0, 1 or 2, got {order!r}")
        forecast = ("hold", "linear", "quadratic")[order]
        return cls._published("interval", forecast, protect_first=warm_up, max_skips=max(interval - 1, 1))

    @classmethod
    def _published(cls, policy: str, forecast: str, threshold: float = 1.0, **settings: Any) -> StepCache:
        """On the stack, with nothing protected that ``settings`` do not name."""
        freely = {"protect_first": 0.0, "protect_last": 0, "max_skips": 1000, "min_steps": 1}
        return cls(policy=policy, granularity="stack", forecast=forecast, threshold=threshold, **freely | settings)

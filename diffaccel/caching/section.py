"""Settings of step caching. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from diffaccel.errors import PlanError
from diffaccel.plan import Section, section_type

POLICIES = ("easy", "mag", "sea", "first-block", "interval", "schedule", "smooth", "modulated")
FORECASTS = ("hold", "residual", "linear", "quadratic", "trend", "fitted")
GRANULARITIES = ("root", "stack", "sites", "deep")


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
            how many), ``smooth`` (SmoothCache: each kind of module while its calibrated error is at most the threshold,
            arXiv:2411.10510; granularity ``sites``; needs `diffaccel.calibrate`) or ``modulated`` (TeaCache,
            arXiv:2411.19108, without coefficients: by how far what the first attention is given, scaled and shifted by
            the timestep, has moved since a computed step; granularity ``stack`` with a first block in ``front``).
        granularity: what a skip leaves out: ``root``, the whole call; ``stack``, the repeated blocks (embeddings and
            the final projection then see the step's own latents and timestep); ``sites``, the outputs of single modules
            (FORA, SmoothCache, PAB); ``deep``, of a UNet all but its outermost layers (DeepCache, arXiv:2312.00858).
        front: with ``stack``, blocks at the beginning that always run. back: likewise at the end; with ``deep``, up
            layers at the end that always run, with what feeds them on the way down.
        sites: with ``sites``, which modules, by the roles ``attn``, ``cross``, ``ff`` and ``block``, or by name.
        every: with ``sites`` and ``interval``, on every how-manieth step each kind is computed, such as
            ``"attn=2 *temporal*=3 cross=5"`` (PAB, arXiv:2408.12588); others as ``max_skips`` says.
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
        protect_last: number of last steps that are always computed; below 1, a share of the schedule.
        max_skips: most consecutive skipped steps.
        memory: most bytes that are kept for all denoisers together; what does not fit is computed on every step.
        min_steps: schedules with fewer steps are left alone; step-distilled models have nothing to spare.

    Raises:
        PlanError: a value that cannot be, or ``first-block`` without the granularity that has a first block.
    """

    technique: ClassVar[str] = "caching"

    policy: str = "easy"
    granularity: str = "root"
    front: int = 0
    back: int = 0
    sites: str = "attn cross ff"
    every: str = ""
    forecast: str = "trend"
    psnr: float | None = None
    share: float | None = None
    threshold: float = 0.05
    protect_first: float = 0.1
    protect_last: float = 1
    max_skips: int = 3
    min_steps: int = 9
    memory: int | None = None

    def __post_init__(self) -> None:
        self._check_choice("policy", POLICIES)
        self._check_choice("forecast", FORECASTS)
        self._check_choice("granularity", GRANULARITIES)
        self._check_number("front", 0, 1000, whole=True)
        self._check_number("back", 0, 1000, whole=True)
        self._check_granularity()
        if self.looks_inside and (self.granularity != "stack" or not self.front):
            raise PlanError(
                f"StepCache(policy={self.policy!r}) decides after the first blocks: it needs granularity='stack' and "
                f"front of 1 or more, got {self.granularity!r} and {self.front}"
            )
        self._check_schedule()
        self._check_number("threshold", 0, 100, open_low=True)
        self._check_number("protect_first", 0, 1)
        self._check_number("protect_last", 0, 1000, whole=not self._is_share(self.protect_last))
        self._check_number("max_skips", 1, 1000, whole=True)
        self._check_number("min_steps", 1, 1000, whole=True)
        if self.memory is not None:
            self._check_number("memory", 0, 1 << 50, whole=True)

    def _check_granularity(self) -> None:
        if self.front and self.granularity != "stack":
            raise PlanError(f"StepCache.front are blocks of granularity='stack', got granularity={self.granularity!r}")
        if self.back and self.granularity not in ("stack", "deep"):
            raise PlanError(
                "StepCache.back are blocks of granularity='stack' or layers of granularity='deep', got "
                f"granularity={self.granularity!r}"
            )
        if self.granularity == "deep" and not self.back:
            raise PlanError("StepCache(granularity='deep') needs back >= 1: the up layers that always run")
        self._check_sites(self.sites)
        if self.every and (self.granularity, self.policy) != ("sites", "interval"):
            raise PlanError(
                "StepCache.every belongs to granularity='sites' and policy='interval', got "
                f"{self.granularity!r} and {self.policy!r}"
            )
        if self.granularity == "sites" and self.forecast == "residual":
            raise PlanError(
                "StepCache(forecast='residual') is for whole calls; modules have hold, linear, quadratic, trend"
            )
        if self.policy == "smooth" and self.granularity != "sites":
            raise PlanError(
                f"StepCache(policy='smooth') decides for kinds of modules: it needs granularity='sites', got "
                f"{self.granularity!r}"
            )
        self.intervals()

    def intervals(self) -> dict[str, int]:
        """``every`` as numbers by glob."""
        found = {}
        for word in self.every.split():
            glob, _, number = word.rpartition("=")
            if not glob or not number.isdecimal() or int(number) < 1:
                raise PlanError(
                    f"StepCache.every={self.every!r}: {word!r} is no glob with a number of steps, such as 'attn=2'"
                )
            found[glob] = int(number)
        return found

    def is_protected(self, step: int, steps: int) -> bool:
        """Whether a step of a schedule of so many is always computed."""
        last = self.protect_last * steps if self._is_share(self.protect_last) else self.protect_last
        return step < math.ceil(self.protect_first * steps) or step >= steps - math.ceil(last)

    @staticmethod
    def _is_share(value: object) -> bool:
        return isinstance(value, float) and value < 1

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
        return self.policy in ("mag", "schedule", "smooth") or self.forecast == "fitted"

    @property
    def looks_inside(self) -> bool:
        """Whether it is decided inside the call, after the first blocks."""
        return self.policy in ("first-block", "modulated")

    @classmethod
    def scheduled(
        cls, psnr: float | None = None, share: float | None = None, forecast: str = "hold", max_skips: int = 4
    ) -> StepCache:
        """The steps that cost least by calibrated trajectories, within ``psnr`` or ``share``; see the class.

        With one calibration ``forecast`` may be hold, linear or fitted; which is best differs between models.
        """
        return cls(
            policy="schedule",
            forecast=forecast,
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
    def fora(cls, interval: int = 3) -> StepCache:
        """FORA: attention and feed-forward outputs on every ``interval``-th step (arXiv:2407.01425)."""
        return cls._modules("attn cross ff", "hold", max_skips=max(interval - 1, 1))

    @classmethod
    def taylorseer_full(cls, interval: int = 5, order: int = 1, warm_up: float = 0.1) -> StepCache:
        """TaylorSeer on every attention and feed-forward, as published; memory for order + 1 outputs of each."""
        return cls._modules(
            "attn cross ff",
            cls.taylorseer(interval, order).forecast,
            max_skips=max(interval - 1, 1),
            protect_first=warm_up,
        )

    @classmethod
    def pab(cls, spatial: int = 2, temporal: int = 3, cross: int = 5) -> StepCache:
        """Pyramid Attention Broadcast (arXiv:2408.12588): attention outputs in the middle of the schedule, the kinds
        that change less on fewer steps."""
        every = f"attn={spatial} *temporal*={temporal} *motion*={temporal} cross={cross}"
        return cls._modules("attn cross", "hold", every=every, protect_first=0.2, protect_last=0.1)

    @classmethod
    def smoothcache(cls, threshold: float = 0.15, max_skips: int = 3) -> StepCache:
        """SmoothCache (arXiv:2411.10510): each kind of module by its calibrated error, first and last step computed."""
        return cls._published("smooth", "hold", threshold, granularity="sites", protect_last=1, max_skips=max_skips)

    @classmethod
    def teacache(cls, threshold: float = 0.2) -> StepCache:
        """TeaCache's signal (arXiv:2411.19108) without its polynomial; the first block runs on every step."""
        return cls._published("modulated", "hold", threshold, front=1, protect_last=1)

    @classmethod
    def deepcache(cls, interval: int = 3, back: int = 1) -> StepCache:
        """DeepCache (arXiv:2312.00858): ``back`` is the branch id plus one."""
        return cls._published("interval", "hold", granularity="deep", back=back, max_skips=max(interval - 1, 1))

    @classmethod
    def step_rehash(cls, share: float = 0.5, back: int = 3) -> StepCache:
        """Step Rehash of Streamlined Inference (arXiv:2411.01171): what reaches the last up block (of ``back`` layers)
        is reused on the steps on which it changes least by measurement; needs `diffaccel.calibrate`."""
        return cls._published("schedule", "hold", granularity="deep", back=back, share=share, max_skips=4)

    @classmethod
    def _modules(cls, sites: str, forecast: str, **settings: Any) -> StepCache:
        """Outputs of modules by fixed intervals."""
        return cls._published("interval", forecast, granularity="sites", sites=sites, **settings)

    @classmethod
    def _published(cls, policy: str, forecast: str, threshold: float = 1.0, **settings: Any) -> StepCache:
        """On the stack, with nothing protected, unless ``settings`` say otherwise."""
        freely: dict[str, Any] = {"protect_first": 0.0, "protect_last": 0, "max_skips": 1000, "min_steps": 1}
        freely |= {"granularity": "stack"}
        return cls(policy=policy, forecast=forecast, threshold=threshold, **freely | settings)

"""What a tuned plan may cost in quality, or must gain. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from diffaccel.errors import PlanError, did_you_mean


@dataclass(frozen=True)
class Limit:
    """One number that has to hold.

    Args:
        name: as in `Budget`.
        measure: of `diffaccel.eval.measures` ("" for memory and speed).
        statistic: ``mean`` over prompts, mean of the ``worst`` tenth, ``drop`` below the reference, ``share`` of bytes,
            or ``gain`` in speed.
        bound: the limit. least: whether it is the least that is allowed, and not the most.
    """

    name: str
    measure: str
    statistic: str
    bound: float
    least: bool

    def loss(self, value: float) -> float:
        """``value`` on a scale on which independent changes add up, 0 for none: mean squared errors for decibels."""
        if self.measure == "psnr":
            return float(10 ** (-value / 10))
        if self.least:
            return max(1 - value, 0.0)  # a similarity
        return max(value, 0.0)

    def holds(self, value: float) -> bool:
        """Whether ``value`` is within the limit."""
        return value >= self.bound if self.least else value <= self.bound

    def __str__(self) -> str:
        return f"{self.name}{'>=' if self.least else '<='}{self.bound:g}"


_LIMITS: dict[str, tuple[str, str, bool, float, float]] = {
    # name -> measure, statistic, whether it is the least, lowest and highest sensible bound
    "psnr": ("psnr", "mean", True, 0.0, 100.0),
    "psnr_worst": ("psnr", "worst", True, 0.0, 100.0),
    "ssim": ("ssim", "mean", True, 0.0, 1.0),
    "perceptual": ("perceptual", "mean", False, 0.0, 10.0),
    "clip_drop": ("clip", "drop", False, 0.0, 100.0),
    "adherence_drop": ("adherence", "drop", False, 0.0, 1.0),
    "memory": ("", "share", False, 0.0, 1.0),
    "speedup": ("", "gain", True, 1.0, 1000.0),
}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What `diffaccel.tune` has to keep to.

    With a limit on quality it looks for the fastest plan within it; with none, for the plan nearest to the original
    that is as fast or as small as asked for.

    A limit holds when its 95 % bound over prompts does (one-sided), not when its estimate does.

    Args:
        psnr: least mean PSNR in dB against the original output of the same seed.
        psnr_worst: least PSNR of the worst tenth of the samples.
        ssim: least mean SSIM.
        perceptual: most perceptual distance in the mean (LPIPS; on bundled pipelines ``shapes_perceptual``).
        clip_drop: by how much the CLIP score may fall, in its points of 100.
        adherence_drop: by how much the share of samples that show what was asked for may fall (bundled world only).
        memory: most bytes of the denoisers' weights, as a share of the original's.
        speedup: least speed-up of the denoising loop.
        measures: how measures above are computed where the default will not do, such as ``clip=ViT-B-32:openai``.

    Raises:
        PlanError: no limit at all, or one that cannot be.
    """

    psnr: float | None = None
    psnr_worst: float | None = None
    ssim: float | None = None
    perceptual: float | None = None
    clip_drop: float | None = None
    adherence_drop: float | None = None
    memory: float | None = None
    speedup: float | None = None
    measures: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, (*_, low, high) in _LIMITS.items():
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and low <= value <= high):
                raise PlanError(f"Budget.{name} must be a number in [{low:g}, {high:g}], got {value!r}")
        if not self.limits:
            raise PlanError(f"a Budget needs a limit, such as Budget(psnr=36); it takes {', '.join(_LIMITS)}")
        if isinstance(self.measures, str):
            raise PlanError(f"Budget.measures must be a list of texts, got {self.measures!r}")
        object.__setattr__(self, "measures", tuple(self.measures))

    @property
    def limits(self) -> tuple[Limit, ...]:
        """Those that are set."""
        found = []
        for name, (measure, statistic, least, _, _) in _LIMITS.items():
            value = getattr(self, name)
            if value is not None:
                found.append(Limit(name, measure, statistic, float(value), least))
        return tuple(found)

    @property
    def of_quality(self) -> tuple[Limit, ...]:
        """Those on what comes out."""
        return tuple(limit for limit in self.limits if limit.measure)

    @property
    def wants_speed(self) -> bool:
        """Whether the fastest plan is looked for, and not the nearest to the original."""
        return bool(self.of_quality)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: what is set."""
        set_ = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) not in (None, ())}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in set_.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Budget:
        """The inverse of `to_dict`.

        Raises:
            PlanError: an unknown limit, or a bad one.
        """
        known = [f.name for f in fields(cls)]
        for name in data:
            if name not in known:
                raise PlanError(f"Budget has no limit {name!r}{did_you_mean(name, known)}")
        return cls(**data)

    def __str__(self) -> str:
        return " & ".join(str(limit) for limit in self.limits)

"""What a run can report of each sample beside its cost: measures by name, each a number per sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from diffaccel.errors import InputError, did_you_mean
from diffaccel.eval.checker import check_image, check_video
from diffaccel.eval.metrics.intervals import Interval, difference_interval, mean_interval, no_worse
from diffaccel.eval.metrics.psnr import PSNR_CAP, psnr
from diffaccel.eval.metrics.ssim import ssim
from diffaccel.eval.scenes import parse

FIDELITY = ("psnr", "ssim")
"""Reported of every run."""

_CORE = ("color", "shape", "place", "relation", "motion")


@dataclass(frozen=True)
class Measure:
    """One measure.

    Args:
        name: as users write it.
        compute: gets the sample and, for a fidelity, the reference of the same prompt and seed, both float32
            ``[F, H, W, C]`` in [0, 1], else the prompt; returns the value.
        higher_is_better: its direction.
        fidelity: whether it compares with the reference; the others judge a sample by itself, the reference's too.
        cap: what an infinite value counts as in a mean.
        check: raises InputError for a prompt that it cannot judge by.
    """

    name: str
    compute: Callable[[np.ndarray, Any], float]
    higher_is_better: bool = True
    fidelity: bool = False
    cap: float = math.inf
    check: Callable[[str], object] | None = None


@dataclass(frozen=True)
class Score:
    """A measure over all samples of a row.

    Attributes:
        mean: over prompts, low and high: its 95 % bootstrap interval over prompts.
        bound: what the mean surely reaches, with 95 % confidence, one-sided: at least where higher is better.
        worst_decile: mean of the worst tenth of the samples, rounded up.
        worst: of all samples.
        drop: by how much the row is worse than the reference, paired by prompt and seed, with its interval; None for a
            fidelity, and for the reference itself.
        drop_bound: with 95 % confidence, one-sided, it is worse by no more than this; likewise.
    """

    mean: float
    low: float
    high: float
    bound: float
    worst_decile: float
    worst: float
    drop: Interval | None = None
    drop_bound: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; bounds that one prompt leaves infinite are None."""
        body = dict(self.__dict__)
        body["drop"] = None if self.drop is None else self.drop._asdict()
        return {k: _finite(v) for k, v in body.items()}


def adherence(sample: np.ndarray, prompt: str) -> float:
    """1 where a sample of the drawn world shows every colour, shape, place, relation and motion asked for, else 0."""
    verdict = check_image(sample[0], prompt) if len(sample) == 1 else check_video(sample, prompt)
    return float(all(verdict[name] for name in _CORE if name in verdict))


MEASURES: Mapping[str, Measure] = MappingProxyType(
    {
        m.name: m
        for m in (
            Measure("psnr", lambda sample, ref: psnr([sample], [ref]).item(), fidelity=True, cap=PSNR_CAP),
            Measure("ssim", lambda sample, ref: ssim([sample], [ref]).item(), fidelity=True),
            Measure("adherence", adherence, check=parse),
        )
    }
)


def measures_of(names: Sequence[str], prompts: Sequence[Any]) -> list[Measure]:
    """`FIDELITY`, then the measures of these names.

    Raises:
        InputError: an unknown name, or a measure that cannot judge by one of these prompts.
    """
    chosen = []
    for name in dict.fromkeys((*FIDELITY, *names)):
        if name not in MEASURES:
            raise InputError(f"no measure {name!r}{did_you_mean(name, MEASURES)}")
        measure = MEASURES[name]
        for prompt in prompts if measure.check is not None else ():
            try:
                measure.check(text_of(prompt))  # type: ignore[misc]
            except InputError as error:
                raise InputError(f"{name} cannot judge by this prompt: {error}") from None
        chosen.append(measure)
    return chosen


def text_of(prompt: Any) -> str:
    """The prompt among the arguments of a call."""
    return prompt if isinstance(prompt, str) else str(prompt.get("prompt", ""))


def score(
    measure: Measure,
    values: Sequence[float],
    prompts: Sequence[int],
    reference: Sequence[float] | None = None,
) -> Score:
    """Sum up one value per sample; ``prompts`` says which samples belong to the same prompt.

    Args:
        reference: the reference's values of the same samples, for a measure that is no fidelity.
    """
    capped = [min(v, measure.cap) for v in values]
    interval, one_sided = (mean_interval(capped, prompts, level) for level in (0.95, 0.9))
    ordered = sorted(capped, reverse=not measure.higher_is_better)
    worst = ordered[: math.ceil(len(ordered) / 10)]
    drop, drop_bound = None, None
    if reference is not None:
        better, worse = (reference, capped) if measure.higher_is_better else (capped, reference)
        drop = difference_interval(better, worse, prompts)
        drop_bound = no_worse(capped, reference, 0, prompts, higher_is_better=measure.higher_is_better).bound
    return Score(
        mean=interval.value,
        low=interval.low,
        high=interval.high,
        bound=one_sided.low if measure.higher_is_better else one_sided.high,
        worst_decile=math.fsum(worst) / len(worst),
        worst=ordered[0],
        drop=drop,
        drop_bound=drop_bound,
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""What a run can report of each sample beside its cost: measures by name, each a number per sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from diffaccel.errors import InputError, MissingPackageError, did_you_mean
from diffaccel.eval.checker import check_image, check_video
from diffaccel.eval.extractors import imported
from diffaccel.eval.metrics.intervals import Interval, difference_interval, mean_interval, no_worse
from diffaccel.eval.metrics.psnr import PSNR_CAP, psnr
from diffaccel.eval.metrics.ssim import ssim
from diffaccel.eval.scenes import parse
from diffaccel.eval.sets import SETS, finite

FIDELITY = ("psnr", "ssim")
"""Reported of every run."""

_CORE = ("color", "shape", "place", "relation", "motion")


Compute = Callable[[np.ndarray, Any], float]
"""Gets a sample, float32 ``[F, H, W, C]`` in [0, 1], and the reference of the same prompt and seed, or the prompt."""


@dataclass(frozen=True)
class Measure:
    """One measure.

    Args:
        name: as users write it, before any ``=``.
        make: loads what it needs, told which by what stands after ``=`` (None where nothing does), and returns what
            computes it.
        higher_is_better: its direction.
        fidelity: whether it compares with the reference; the others judge a sample by itself, the reference's too.
        of_video: whether it needs several frames.
        of_latents: whether it gets latents, of any shape and range, in place of samples; such a measure is a fidelity.
        cap: what an infinite value counts as in a mean.
        check: raises InputError for a prompt that it cannot judge by.
    """

    name: str
    make: Callable[[str | None], Compute]
    higher_is_better: bool = True
    fidelity: bool = False
    of_video: bool = False
    of_latents: bool = False
    cap: float = math.inf
    check: Callable[[str], object] | None = None


@dataclass(frozen=True)
class Chosen:
    """A measure that is ready: what it needs is loaded."""

    measure: Measure
    compute: Compute


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
        drop = None if self.drop is None else {k: finite(v) for k, v in self.drop._asdict().items()}
        return {**{k: finite(v) for k, v in self.__dict__.items()}, "drop": drop}


def adherence(sample: np.ndarray, prompt: str) -> float:
    """1 where a sample of the drawn world shows every colour, shape, place, relation and motion asked for, else 0."""
    verdict = check_image(sample[0], prompt) if len(sample) == 1 else check_video(sample, prompt)
    return float(all(verdict[name] for name in _CORE if name in verdict))


def _plain(compute: Compute) -> Callable[[str | None], Compute]:
    """For measures that load nothing."""

    def make(setting: str | None) -> Compute:
        if setting is not None:
            raise ValueError(f"it takes no setting, got {setting!r}")
        return compute

    return make


def _clip(setting: str | None) -> Any:
    """``local-dir:FOLDER``, ``hf-hub:NAME`` or ``ARCHITECTURE:WEIGHTS``; the bundled evaluator where none is named."""
    from diffaccel.assets import path
    from diffaccel.eval.metrics.clip import load_clip

    if setting is None:
        try:
            setting = f"local-dir:{path('shapes-clip')}"
        except FileNotFoundError:
            raise ValueError("no model named, and none ships: write for example clip=ViT-B-32:openai") from None
    if setting.startswith(("local-dir:", "hf-hub:")):
        return load_clip(setting)
    return load_clip(*setting.split(":", 1))


def _clip_score(setting: str | None) -> Compute:
    from diffaccel.eval.metrics.clip_score import clip_score

    clip = _clip(setting)
    return lambda sample, prompt: clip_score(clip, [sample], [prompt]).item()


def _clip_temporal(setting: str | None) -> Compute:
    from diffaccel.eval.metrics.clip_score import clip_temporal_consistency

    clip = _clip(setting)
    return lambda sample, prompt: clip_temporal_consistency(clip, [sample]).item()


def _perceptual(setting: str | None) -> Compute:
    from diffaccel.eval.metrics.perceptual import shapes_perceptual

    clip = _clip(setting)
    return lambda sample, reference: shapes_perceptual(clip, [sample], [reference]).item()


def _lpips(setting: str | None) -> Compute:
    from diffaccel.eval.metrics.lpips import Lpips

    lpips = Lpips(setting or "alex")  # type: ignore[arg-type]
    return lambda sample, reference: lpips([sample], [reference]).item()


def _preference(make: Callable[[str | None], Any]) -> Callable[[str | None], Compute]:
    """A score of people's choices, by a scorer ``(picture, prompt) -> number``."""

    def compute(setting: str | None) -> Compute:
        from diffaccel.eval.metrics.preference import preference

        scorer = make(setting)
        return lambda sample, prompt: preference(scorer, [sample], [prompt]).item()

    return compute


def _image_reward(setting: str | None) -> Any:
    from diffaccel.eval.metrics.preference import image_reward

    return image_reward() if setting is None else image_reward(setting)


def _hpsv2(setting: str | None) -> Any:
    from diffaccel.eval.metrics.preference import hpsv2

    return hpsv2() if setting is None else hpsv2(setting)


def _own_scorer(setting: str | None) -> Any:
    if setting is None or not setting.startswith("python:"):
        raise ValueError("name a function that returns a scorer: preference=python:package.module:function")
    return imported(setting.removeprefix("python:"))


def _latent_cosine(latents: np.ndarray, reference: np.ndarray) -> float:
    from diffaccel.eval.metrics.cosine import latent_cosine

    return latent_cosine(*(torch.from_numpy(x).flatten()[None] for x in (latents, reference))).item()


def _flicker(sample: np.ndarray, reference: np.ndarray) -> float:
    from diffaccel.eval.metrics.flicker import temporal_difference_error

    return temporal_difference_error([sample], [reference]).item()


MEASURES: Mapping[str, Measure] = MappingProxyType(
    {
        m.name: m
        for m in (
            Measure("psnr", _plain(lambda sample, ref: psnr([sample], [ref]).item()), fidelity=True, cap=PSNR_CAP),
            Measure("ssim", _plain(lambda sample, ref: ssim([sample], [ref]).item()), fidelity=True),
            Measure("lpips", _lpips, higher_is_better=False, fidelity=True),
            Measure("shapes_perceptual", _perceptual, higher_is_better=False, fidelity=True),
            Measure("flicker", _plain(_flicker), higher_is_better=False, fidelity=True, of_video=True),
            Measure("latent_cosine", _plain(_latent_cosine), fidelity=True, of_latents=True),
            Measure("clip", _clip_score),
            Measure("clip_temporal", _clip_temporal, of_video=True),
            Measure("image_reward", _preference(_image_reward)),
            Measure("hpsv2", _preference(_hpsv2)),
            Measure("preference", _preference(_own_scorer)),
            Measure("adherence", _plain(adherence), check=parse),
        )
    }
)


def measures_of(names: Sequence[str], prompts: Sequence[Any], *, video: bool = True) -> list[Chosen]:
    """`FIDELITY`, then the measures of these names, with what they need loaded.

    Args:
        names: such as ``adherence`` or ``clip=ViT-B-32:openai``.
        prompts: of the run.
        video: whether the pipeline makes clips.

    Raises:
        InputError: an unknown name, a measure that cannot judge by one of these prompts or this kind of sample, or one
            whose model cannot be had.
        MissingPackageError: a measure's package is not installed.
    """
    chosen: list[Chosen] = []
    for text in dict.fromkeys((*FIDELITY, *names)):
        name, sign, setting = text.partition("=")
        if name not in MEASURES:
            raise InputError(f"no measure {name!r}{did_you_mean(name, [*MEASURES, *SETS])}")
        measure = MEASURES[name]
        if any(one.measure is measure for one in chosen):
            raise InputError(f"measure {name!r} twice; one run takes one model for it")
        if measure.of_video and not video:
            raise InputError(f"measure {name!r} needs clips, but this pipeline makes images")
        for prompt in prompts if measure.check is not None else ():
            try:
                measure.check(text_of(prompt))  # type: ignore[misc]
            except InputError as error:
                raise InputError(f"{name} cannot judge by this prompt: {error}") from None
        try:
            chosen.append(Chosen(measure, measure.make(setting if sign else None)))
        except ImportError as error:
            raise MissingPackageError(f"measure {name!r}: {error}") from None
        except ValueError as error:
            raise InputError(f"measure {text!r}: {error}") from None
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

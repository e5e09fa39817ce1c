"""Measures of a whole row: Frechet distances, CMMD and Inception score, each one number for all samples of a row.

A distance is taken to the reference's samples of the same prompts and seeds, or to a folder of pictures or clips.
Samples are rounded to 8 bits first, as for published numbers. Intervals are those of
`diffaccel.eval.metrics.jackknife`: prompts are left out of both sides; a folder is taken as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from diffaccel.errors import InputError, MissingPackageError, did_you_mean
from diffaccel.eval.extractors import bundled_tower, dimensions, extractor_of, features_of
from diffaccel.eval.metrics.cmmd import cmmd
from diffaccel.eval.metrics.features import Extractor
from diffaccel.eval.metrics.frechet import distance, fit
from diffaccel.eval.metrics.inception_score import inception_score
from diffaccel.eval.metrics.intervals import Interval
from diffaccel.eval.metrics.jackknife import Jackknife, jackknife
from diffaccel.eval.sample_files import to_bytes

Statistic = Callable[[Any, Any], float]
"""Gets what `SetMeasure.prepare` made of the row's features, and of those of what it is compared with."""


@dataclass(frozen=True)
class SetMeasure:
    """One measure.

    Args:
        name: as users write it, before any ``=``.
        words: what it is, for people.
        statistic: computes it.
        prepare: what it needs of features ``[N, D]``, however few; done once for what is not resampled.
        default: the extractor of published numbers, used where none is named; None where there is no such.
        whole_clips: whether the extractor takes clips, not pictures.
        more_than_features: whether it needs more samples than there are features.
        compares: whether it is a distance to something; Inception score judges a row by itself.
        floor: its least value.
    """

    name: str
    words: str
    statistic: Statistic
    default: str | None
    whole_clips: bool = False
    more_than_features: bool = True
    compares: bool = True
    floor: float = 0.0
    prepare: Callable[[np.ndarray], Any] = np.asarray

    @property
    def higher_is_better(self) -> bool:
        return not self.compares


SETS = MappingProxyType(
    {
        m.name: m
        for m in (
            SetMeasure("fid", "Frechet distance", distance, "inception", prepare=fit),
            SetMeasure("cmmd", "CMMD", cmmd, "ViT-L-14-336:openai", more_than_features=False),
            SetMeasure("fvd", "Frechet video distance", distance, None, whole_clips=True, prepare=fit),
            SetMeasure(
                "inception_score",
                "Inception score of all samples in one part",
                lambda p, _: inception_score(p, splits=1).mean,
                "inception",
                more_than_features=False,
                compares=False,
                floor=1.0,
            ),
        )
    }
)


@dataclass(frozen=True)
class ChosenSet:
    """A measure of a row that is ready: its network is loaded.

    Attributes:
        setting: the extractor, as users write it.
        extractor: the network.
        features: how many it gives.
    """

    measure: SetMeasure
    setting: str
    extractor: Extractor
    features: int

    @property
    def key(self) -> str:
        """Names the features: measures that use the same share them."""
        what = "clips" if self.measure.whole_clips else "pictures" if self.measure.compares else "probabilities"
        return f"{what}:{self.setting}"

    def extract(self, sample: np.ndarray) -> np.ndarray:
        """Features ``[D]`` of a sample ``[F, H, W, C]``, floats in [0, 1] or uint8."""
        sample = sample if sample.dtype == np.uint8 else to_bytes(sample)
        return features_of(self.extractor, sample, video=self.measure.whole_clips)


@dataclass(frozen=True)
class SetScore:
    """A measure of a row.

    Attributes:
        value: the measure of all samples, with the bias that this many samples have.
        low, high: its 95 % interval; infinite from one prompt.
        bound: what it surely reaches, with 95 % confidence, one-sided: at most where lower is better.
        samples, reference: how many are compared; reference is 0 for a measure that compares with nothing.
        against: what they are compared with, in words.
        extractor: whose features.
        drop: by how much the row is worse than the reference, paired, with its interval; None for a distance to the
            reference, and for the reference itself.
        drop_bound: with 95 % confidence, one-sided, it is worse by no more than this; likewise.
    """

    value: float
    low: float
    high: float
    bound: float
    samples: int
    reference: int
    against: str
    extractor: str
    drop: Interval | None = None
    drop_bound: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; bounds that one prompt leaves infinite are None."""
        drop = None if self.drop is None else {k: finite(v) for k, v in self.drop._asdict().items()}
        return {**{k: finite(v) for k, v in self.__dict__.items()}, "drop": drop}


def finite(value: Any) -> Any:
    """JSON has no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sets_of(
    names: Sequence[str], samples: int, against: int | None = None, *, bundled: bool = False, video: bool = False
) -> list[ChosenSet]:
    """The measures of these names, with their networks loaded.

    Args:
        names: such as ``fid`` or ``cmmd=local-dir:my-clip``.
        samples: of each row.
        against: samples of the folder that rows are compared with; None to compare with the reference's.
        bundled: whether a bundled pipeline runs: its extractor is then the bundled evaluator where none is named.
        video: whether the pipeline makes clips.

    Raises:
        InputError: an unknown name, one that does not go with these samples, too few of them, or a network that cannot
            be had.
        MissingPackageError: a network's package is not installed.
    """
    chosen: list[ChosenSet] = []
    for text in dict.fromkeys(names):
        name, sign, setting = text.partition("=")
        if name not in SETS:
            raise InputError(f"no measure {name!r}{did_you_mean(name, SETS)}")
        measure = SETS[name]
        if any(one.measure is measure for one in chosen):
            raise InputError(f"measure {name!r} twice; one run takes one network for it")
        if measure.whole_clips and not video:
            raise InputError(f"measure {name!r} needs clips, but this pipeline makes images")
        if video and not measure.compares:
            raise InputError(f"measure {name!r} needs images, but this pipeline makes clips")
        try:
            one = _ready(measure, setting if sign else _default(measure, bundled))
        except ImportError as error:
            raise MissingPackageError(f"measure {name!r}: {error}") from None
        except ValueError as error:
            raise InputError(f"measure {text!r}: {error}") from None
        _require_enough(one, samples, against)
        chosen.append(one)
    return chosen


def _default(measure: SetMeasure, bundled: bool) -> str:
    if measure.default is None:
        raise ValueError(f"name its network: {measure.name}=torchscript:FILE or {measure.name}=python:module:function")
    if not (bundled and measure.compares):
        return measure.default
    try:
        return bundled_tower()
    except FileNotFoundError:
        raise ValueError(
            f"no extractor named, and this install has none of its own; write for example {measure.name}="
            "local-dir:FOLDER (an open_clip model), inception:FILE or torchscript:FILE behind the ="
        ) from None


def _ready(measure: SetMeasure, setting: str) -> ChosenSet:
    if measure.compares:
        extractor = extractor_of(setting)
    else:
        network = extractor_of(setting)
        if not hasattr(network, "probabilities"):
            raise ValueError("it takes the Inception network only: inception or inception:FILE")
        extractor = network.probabilities
    return ChosenSet(measure, setting, extractor, dimensions(extractor, video=measure.whole_clips))


def _require_enough(one: ChosenSet, samples: int, against: int | None) -> None:
    if not one.measure.more_than_features:
        return
    for count, whose in ((samples, "each row has"), (against, "the folder holds")):
        if count is not None and count <= one.features:
            raise InputError(
                f"measure {one.measure.name!r} needs more samples than features: {one.setting} gives {one.features}, "
                f"{whose} {count}. Take at least {one.features + 1} (more prompts or seeds), an extractor of fewer "
                "features, or cmmd, which needs no covariance"
            )


def score_set(
    one: ChosenSet,
    row: np.ndarray,
    reference: np.ndarray | None,
    prompts: Sequence[int],
    folder: tuple[np.ndarray, str] | None = None,
) -> SetScore | None:
    """The measure of one row.

    Args:
        row: features of its samples, ``[N, D]``.
        reference: of the reference's samples, in the same order; None for the reference's own row.
        prompts: ``[N]``, to which prompt each sample belongs.
        folder: features of the folder to compare with and what to call it; None to compare with the reference.

    Returns:
        None where there is nothing to compare with: the reference with itself.
    """
    measure = one.measure

    fixed = None if folder is None or not measure.compares else measure.prepare(folder[0])

    def of(features: np.ndarray) -> Jackknife:
        def statistic(kept: np.ndarray) -> float:
            paired = reference is not None and measure.compares and folder is None
            other = measure.prepare(reference[kept]) if paired else fixed  # type: ignore[index]
            return measure.statistic(measure.prepare(features[kept]), other)

        return jackknife(statistic, prompts)

    alone = not measure.compares or folder is not None
    if reference is None and not alone:
        return None
    mine = of(row)
    (low, high), one_sided = mine.interval(), mine.interval(0.9)
    worse = None
    if alone and reference is not None:
        other = of(reference)
        worse = other - mine if measure.higher_is_better else mine - other
    count = 0 if not measure.compares else len(row) if folder is None else len(folder[0])
    return SetScore(
        value=mine.value,
        low=max(low, measure.floor) if math.isfinite(low) else low,
        high=high,
        bound=max(one_sided[0], measure.floor) if measure.higher_is_better else one_sided[1],
        samples=len(row),
        reference=count,
        against="nothing" if not measure.compares else "the reference's samples" if folder is None else folder[1],
        extractor=one.setting,
        drop=None if worse is None else Interval(worse.value, *worse.interval(), len(set(prompts))),
        drop_bound=None if worse is None else worse.interval(0.9)[1],
    )

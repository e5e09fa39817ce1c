"""Requirements that a run must meet: ``psnr>=36 & adherence_drop<=0.03 & speedup>=1.5``.

Each holds only where the bound of the number does, not its mean: with 95 % confidence (one-sided) over prompts. So a
requirement that is missed by little, or tried on few prompts, is not met.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from diffaccel.errors import InputError, did_you_mean
from diffaccel.eval.measures import FIDELITY, MEASURES, Score
from diffaccel.eval.result import Row
from diffaccel.eval.sets import SETS

_CLAUSE = re.compile(r"\s*([a-z_]+)\s*(>=|<=)\s*([-+]?[\d.]+(?:e[-+]?\d+)?)\s*", re.IGNORECASE)
_DROP = "_drop"
_COSTS = ("speedup", "memory")


@dataclass(frozen=True)
class Requirement:
    """``name`` is at least, or at most, ``limit``, whichever is the better side of it.

    Args:
        name: a measure; a measure of samples by themselves with ``_drop`` (how much worse than the reference, paired);
            ``speedup`` of the denoising loop; ``memory``, the denoisers' weights in bytes over those of the reference.
    """

    name: str
    limit: float

    @property
    def least(self) -> bool:
        """Whether ``limit`` is the least that is allowed, and not the most."""
        measure = MEASURES.get(self.name) or SETS.get(self.name)
        return self.name == "speedup" or (measure is not None and measure.higher_is_better)

    def __str__(self) -> str:
        return f"{self.name} {'>=' if self.least else '<='} {self.limit:g}"


@dataclass(frozen=True)
class Verdict:
    """Whether a requirement is met: ``bound`` is what the number surely reaches, ``value`` its estimate."""

    requirement: Requirement
    value: float
    bound: float

    @property
    def holds(self) -> bool:
        r = self.requirement
        return self.bound >= r.limit if r.least else self.bound <= r.limit

    def __str__(self) -> str:
        told = "met" if self.holds else "NOT met"
        bound = "no bound from one prompt" if math.isinf(self.bound) else f"95 % bound {self.bound:.4g}"
        return f"{self.requirement}: {told} ({bound}, estimate {self.value:.4g})"


def parse_requirements(text: str, measures: Sequence[str], *, against: bool = False) -> list[Requirement]:
    """Read a list of requirements joined by ``&``.

    Args:
        text: such as ``psnr>=36 & adherence_drop<=0.03``.
        measures: names of those that the run reports beside PSNR and SSIM, with or without their settings.
        against: whether rows are compared with a folder, so that distances have a drop as well.

    Raises:
        InputError: not of that form, of a number that this run does not have, or with its worse side required.
    """
    reported = dict.fromkeys((*FIDELITY, *(name.partition("=")[0] for name in measures)))
    judged = [name for name in reported if name in MEASURES and not MEASURES[name].fidelity]
    judged += [name for name in reported if name in SETS and (against or not SETS[name].compares)]
    known = [*reported, *(name + _DROP for name in judged), *_COSTS]
    found = []
    for clause in text.split("&"):
        match = _CLAUSE.fullmatch(clause)
        if not match:
            raise InputError(f"requirements look like 'psnr>=36 & speedup>=1.5', got {clause.strip()!r}")
        name, sign, limit = match.groups()
        if name not in known:
            measure = name.removesuffix(_DROP)
            unasked = measure not in reported and (measure in MEASURES or measure in SETS)
            more = "; ask for that measure too" if unasked else did_you_mean(name, known)
            raise InputError(f"requirement {clause.strip()!r}: this run has no {name!r}{more}")
        try:
            requirement = Requirement(name, float(limit))
        except ValueError:
            raise InputError(f"requirement {clause.strip()!r}: {limit!r} is no number") from None
        if requirement.least != (sign == ">="):
            raise InputError(f"requirement {clause.strip()!r} bounds the good side; write {requirement}")
        found.append(requirement)
    return found


def judge(requirement: Requirement, row: Row, reference: Row) -> Verdict:
    """Whether ``row`` meets ``requirement``; ``reference`` is the unaccelerated row of the same run.

    The bound of a speed-up is the lower end of its two-sided interval, which is on the safe side.
    """
    name = requirement.name
    if name == "memory":
        assert row.model_bytes is not None and reference.model_bytes is not None  # of plans it is known
        ratio = row.model_bytes / reference.model_bytes
        return Verdict(requirement, ratio, ratio)
    if name == "speedup":
        return Verdict(requirement, row.speedup.value, row.speedup.low)
    measure = name.removesuffix(_DROP)
    score = row.sets[measure] if measure in SETS else row.scores[measure]
    if name.endswith(_DROP):
        assert score.drop is not None and score.drop_bound is not None
        return Verdict(requirement, score.drop.value, score.drop_bound)
    return Verdict(requirement, score.mean if isinstance(score, Score) else score.value, score.bound)

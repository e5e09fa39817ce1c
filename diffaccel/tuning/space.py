"""What the tuner may choose from: for each technique (a knob), families of settings from mild to strong."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from diffaccel.attention.section import BlockSparse
from diffaccel.caching.section import StepCache
from diffaccel.denoiser import Denoiser
from diffaccel.errors import PlanError
from diffaccel.exact.section import ExactReuse
from diffaccel.guidance.section import GuidanceReuse
from diffaccel.plan import Artefacts, Plan
from diffaccel.quantization.section import Quantize
from diffaccel.quantization.worth import worth_it
from diffaccel.tokens.section import MergeTokens
from diffaccel.tuning.budget import Budget
from diffaccel.tuning.calibrations import Calibrated


@dataclass(frozen=True)
class Family:
    """Settings of one kind.

    Args:
        name: short, for people and records.
        knob: the plan's field that they fill; a plan has at most one option of a knob.
        make: strength -> a plan with this alone.
        strengths: those tried first, rising: each faster or smaller than the one before, and further from the original.
        continuous: whether strengths between them mean something too.
    """

    name: str
    knob: str
    make: Callable[[float], Plan] = field(compare=False, repr=False)
    strengths: tuple[float, ...]
    continuous: bool = False

    def option(self, strength: float) -> Option:
        """The setting of this strength."""
        return Option(self, strength)

    def between(self, milder: float | None, stronger: float | None) -> float | None:
        """A strength between two that are known, of which the outer ones may be missing; None where there is none."""
        if not self.continuous or (milder is None and stronger is None):
            return None
        if milder is None or stronger is None:
            return (stronger or milder or 0.0) * (0.7 if milder is None else 1.4)
        middle = (milder * stronger) ** 0.5
        return middle if stronger / milder > 1.08 else None  # closer than a measurement can tell


@dataclass(frozen=True)
class Option:
    """One setting of one technique."""

    family: Family
    strength: float

    @property
    def knob(self) -> str:
        return self.family.knob

    @property
    def label(self) -> str:
        return f"{self.family.name} {self.strength:.4g}"

    @property
    def plan(self) -> Plan:
        """With this alone."""
        return self.family.make(self.strength)


Choice = frozenset[Option]
"""At most one option of a knob."""


def name_of(choice: Iterable[Option]) -> str:
    """A choice in words, the same whatever its order: the name of its row in the records."""
    return " + ".join(sorted(option.label for option in choice)) or "original"


def compose(choice: Iterable[Option], **extra: Any) -> Plan:
    """One plan of all of these.

    Raises:
        PlanError: they exclude each other.
    """
    fields: dict[str, Any] = {}
    artefacts: dict[str, Any] = {}
    for option in sorted(choice, key=lambda o: o.label):
        plan = option.plan
        artefacts |= plan.artefacts
        fields[option.knob] = getattr(plan, option.knob)
    return Plan(**fields, artefacts=Artefacts(artefacts), **extra)


def excludes(one: Option, other: Option) -> bool:
    """Whether two options cannot stand in one plan."""
    if one.knob == other.knob:
        return True
    try:
        compose((one, other))
    except PlanError:
        return True
    return False


def families_for(
    denoisers: Iterable[Denoiser], budget: Budget, calibrated: Calibrated
) -> tuple[list[Family], list[str]]:
    """The families worth trying on these denoisers under this budget, and what was left out and why.

    Only what structure and kernels can tell is decided here; all else is for the trials to find out.

    Args:
        denoisers: of the pipeline.
        budget: of the tuning.
        calibrated: calibrates a plan when one of its options is first tried.
    """
    denoisers = tuple(denoisers)
    easy = _step_cache("cache", (0.03, 0.05, 0.08, 0.12, 0.18, 0.27), granularity="root", policy="easy")
    families = [_schedule("hold", calibrated), _schedule("fitted", calibrated), easy, _guidance()]
    notes = []
    if all(denoiser.blocks for denoiser in denoisers):
        thresholds = (0.1, 0.15, 0.2, 0.27, 0.36, 0.5)
        families.append(_step_cache("block-stack cache", thresholds, granularity="stack", policy="sea"))
    else:
        notes.append("no cache of the block stack: a denoiser here has no repeated blocks")
    if budget.memory is not None:
        families.append(_small_weights())
    else:
        faster = []
        for denoiser in denoisers:
            worth, reason = worth_it(denoiser)
            if worth:
                faster.append(denoiser.component)
            else:
                notes.append(f"no int8 linears on {denoiser.component}: {reason}")
        if faster:
            families.append(_fast_linears(tuple(faster)))
    families += [_exact(), _windows(), _merged()]
    return families, notes


def _step_cache(name: str, thresholds: tuple[float, ...], **settings: Any) -> Family:
    def make(threshold: float) -> Plan:
        return Plan(caching=StepCache(threshold=threshold, **settings))

    return Family(name, "caching", make, thresholds, continuous=True)


def _schedule(forecast: str, calibrated: Calibrated) -> Family:
    """Steps chosen beforehand, of which a compiled denoiser knows no more than that it is called less often."""
    section = StepCache(policy="schedule", forecast=forecast, share=0.5)

    def make(skipped: float) -> Plan:
        plan = calibrated(f"schedule {forecast}", Plan(caching=section))
        return replace(plan, caching=replace(section, share=1 - skipped), key=None, name="")

    return Family(f"schedule {forecast}", "caching", make, (0.3, 0.4, 0.5, 0.6, 0.7), continuous=True)


def _guidance() -> Family:
    levels = ((2, 0.6), (2, 0.4), (3, 0.4), (4, 0.4), (4, 0.25), (6, 0.2))

    def make(level: float) -> Plan:
        every, begin = levels[int(level) - 1]
        return Plan(guidance=GuidanceReuse(every=every, steps=(begin, 1.0)))

    return Family("guidance", "guidance", make, tuple(float(i) for i in range(1, len(levels) + 1)))


def _fast_linears(components: tuple[str, ...]) -> Family:
    """Int8 where it measures faster, on late steps first: rounding shows most where the picture takes form."""
    sites = " ".join(f"{component}:{glob}" for component in components for glob in Quantize.sites.split())

    def make(share: float) -> Plan:
        return Plan(quantization=(Quantize(sites=sites, steps=(1 - share, 1.0)),))

    return Family("int8", "quantization", make, (0.5, 1.0))


def _small_weights() -> Family:
    """Fewer and fewer bytes: int8, then int4 in groups with a low-rank part, first on the feed-forwards."""
    small = Quantize(weights="int4", group=64, rotate=True, low_rank=16)
    levels = (
        (Quantize(),),
        (Quantize(), replace(small, sites="ff.*")),
        (small,),
        (replace(small, low_rank=0),),
    )

    def make(level: float) -> Plan:
        return Plan(quantization=levels[int(level) - 1])

    return Family("small weights", "quantization", make, tuple(float(i) for i in range(1, len(levels) + 1)))


def _exact() -> Family:
    return Family("exact", "exact", lambda _: Plan(exact=ExactReuse()), (1.0,))


def _merged() -> Family:
    def make(ratio: float) -> Plan:
        return Plan(tokens=(MergeTokens(ratio=ratio),))

    return Family("merged keys", "tokens", make, (0.25, 0.5, 0.75))


def _windows() -> Family:
    def make(sparsity: float) -> Plan:
        return Plan(attention=(BlockSparse(density=1 - sparsity),))

    return Family("sparse attention", "attention", make, (0.3, 0.5, 0.65, 0.75))

"""The plan: a frozen, comparable, serialisable description of everything that is applied. Needs no torch.

A plan has one field per technique; what stands in a field are *sections*, frozen dataclasses that the technique's
folder defines (``quantization/section.py`` and so on). On disk a plan is a folder with ``plan.json`` and, when it holds
calibrated tensors, ``artefacts.safetensors``.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from diffaccel.errors import PlanError, did_you_mean
from diffaccel.frontier import pick
from diffaccel.sites import SitePattern

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Section:
    """Base of all sections. A subclass names its plan field in ``technique`` and checks its values when built."""

    technique: ClassVar[str]

    def conflict(self, plan: Plan) -> str | None:
        """Why this section cannot be in ``plan`` beside the others, or None."""
        return None

    def _check_steps(self, steps: object) -> None:
        ok = isinstance(steps, tuple) and len(steps) == 2 and all(isinstance(s, int | float) for s in steps)
        if not ok or not 0 <= steps[0] < steps[1] <= 1:  # type: ignore[index]
            raise PlanError(
                f"{type(self).__name__}.steps must be (begin, end) as fractions of the schedule with "
                f"0 <= begin < end <= 1, got {steps!r}; for example steps=(0.2, 1.0)"
            )

    def _check_sites(self, sites: str) -> None:
        SitePattern(sites)

    def _check_choice(self, name: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise PlanError(f"{type(self).__name__}.{name} is {value!r}{did_you_mean(str(value), allowed)}")

    def _check_number(self, name: str, low: float, high: float, *, whole: bool = False, open_low: bool = False) -> None:
        value = getattr(self, name)
        kind = int if whole else (int, float)
        if (
            not isinstance(value, kind)
            or isinstance(value, bool)
            or not low <= value <= high
            or (open_low and value == low)
        ):
            bounds = f"{'(' if open_low else '['}{low:g}, {high:g}]"
            raise PlanError(
                f"{type(self).__name__}.{name} must be a {'whole ' if whole else ''}number in {bounds}, got {value!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the type's name and every field."""
        return {"type": type(self).__name__, **_jsonable(dataclasses.asdict(self))}


SECTIONS: dict[str, type[Section]] = {}
"""Section types by class name, filled by `section_type`; what a plan file may hold."""


def section_type(cls: type[Section]) -> type[Section]:
    """Class decorator: makes a section type known to plan files."""
    SECTIONS[cls.__name__] = cls
    return cls


class Artefacts(Mapping[str, "Tensor"]):
    """Calibrated tensors of a plan by name; compared by content."""

    def __init__(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        self._tensors = dict(tensors or {})

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Artefacts) or set(self) != set(other):
            return False
        return all(
            self[n].dtype == other[n].dtype and self[n].shape == other[n].shape and bool((self[n] == other[n]).all())
            for n in self
        )

    def __hash__(self) -> int:
        return hash(frozenset(self))

    def __repr__(self) -> str:
        return f"Artefacts({', '.join(f'{n}{list(t.shape)}' for n, t in self.items())})"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What happens at which site of the denoiser on which step.

    Args:
        pruning: a `Pruning` section with what it removes among the artefacts, and `LowRank` sections.
        quantization: `Quantize` sections; where several match a site at a step, the last one wins.
        attention: `BlockSparse` sections; likewise.
        tokens: `MergeTokens` sections; likewise.
        exact: one `ExactReuse`, or None.
        caching: one `StepCache`, or None.
        guidance: one `GuidanceReuse`, or None.
        artefacts: calibrated tensors that the sections refer to.
        key: what the plan was calibrated on (see `diffaccel.plan_key`); None for a plan that fits any model.
        name: a label for reports, such as the preset it came from.

    Raises:
        PlanError: a field holds something else than its sections, or sections that exclude each other.
    """

    pruning: tuple[Section, ...] = ()
    quantization: tuple[Section, ...] = ()
    attention: tuple[Section, ...] = ()
    tokens: tuple[Section, ...] = ()
    exact: Section | None = None
    caching: Section | None = None
    guidance: Section | None = None
    artefacts: Artefacts = field(default_factory=Artefacts)
    key: Mapping[str, Any] | None = field(default=None, hash=False)
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for name in ("pruning", "quantization", "attention", "tokens"):
            value = getattr(self, name)
            sections = (value,) if isinstance(value, Section) else value
            if not isinstance(sections, list | tuple):
                raise PlanError(f"Plan.{name} must be a list of sections, got {value!r}")
            object.__setattr__(self, name, tuple(sections))
        if not isinstance(self.artefacts, Artefacts):
            object.__setattr__(self, "artefacts", Artefacts(self.artefacts))
        for technique in TECHNIQUES:
            for section in self.sections(technique):
                if getattr(section, "technique", None) != technique:
                    expected = ", ".join(n for n, t in SECTIONS.items() if t.technique == technique)
                    raise PlanError(f"Plan.{technique} holds {section!r}; expected {expected}")
        for section in (s for technique in TECHNIQUES for s in self.sections(technique)):
            if reason := section.conflict(self):
                raise PlanError(reason)

    def sections(self, technique: str) -> tuple[Section, ...]:
        """The sections of one technique, as a tuple even where the field holds one or None."""
        value = getattr(self, technique)
        return value if isinstance(value, tuple) else () if value is None else (value,)

    @property
    def is_empty(self) -> bool:
        """True when nothing would be applied."""
        return not any(self.sections(technique) for technique in TECHNIQUES)

    def without(self, technique: str) -> Plan:
        """The same plan with the field of one technique empty."""
        nothing: dict[str, Any] = {technique: None if technique in _SINGLE else ()}
        return dataclasses.replace(self, **nothing)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, without the artefacts' contents."""
        body: dict[str, Any] = {
            technique: [s.to_dict() for s in self.sections(technique)]
            for technique in TECHNIQUES
            if self.sections(technique)
        }
        body |= {name: getattr(self, name).to_dict() for name in _SINGLE if self.sections(name)}
        extras = {k: v for k, v in (("name", self.name), ("key", self.key)) if v}
        return {"schema": SCHEMA_VERSION, "diffaccel": version("diffaccel"), **extras, "plan": body}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], artefacts: Mapping[str, Tensor] | None = None) -> Plan:
        """The inverse of `to_dict`.

        Raises:
            PlanError: unknown schema, key, section type or field (with the closest known name), or a bad value.
        """
        _check_keys("a plan file", data, ("schema", "diffaccel", "name", "key", "plan", "artefacts"))
        if data.get("schema") != SCHEMA_VERSION:
            raise PlanError(
                f"plan schema {data.get('schema')!r}: this diffaccel reads schema {SCHEMA_VERSION}; "
                "save the plan again with this version, or install the one that wrote it"
            )
        if not isinstance(data.get("key"), Mapping | None):
            raise PlanError(f"'key' must be an object, got {data['key']!r}; copy or calibrate the plan again")
        body = data.get("plan", {})
        if not isinstance(body, Mapping):
            raise PlanError(f"'plan' must be an object, got {body!r}")
        _check_keys("Plan", body, TECHNIQUES)
        sections: dict[str, Any] = {}
        for technique, value in body.items():
            if technique in _SINGLE:
                sections[technique] = _section_from(value)
            elif isinstance(value, list):
                sections[technique] = tuple(_section_from(v) for v in value)
            else:
                raise PlanError(f"Plan.{technique} must be a list of sections, got {value!r}")
        return cls(**sections, artefacts=Artefacts(artefacts), key=data.get("key"), name=data.get("name", ""))

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``plan.json`` (and ``artefacts.safetensors``) into ``folder``; returns the folder.

        Each file is replaced as a whole, so an interrupted save leaves the previous plan readable.

        Raises:
            PlanError: ``folder`` cannot be made.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PlanError(f"no folder can be made at {str(folder)!r} ({error.strerror}); choose another") from None
        data = self.to_dict()
        if self.artefacts:
            from safetensors.torch import save as save_tensors

            _replace(
                folder / "artefacts.safetensors", save_tensors({n: t.contiguous() for n, t in self.artefacts.items()})
            )
            data["artefacts"] = sorted(self.artefacts)
        _replace(folder / "plan.json", json.dumps(data, indent=2).encode())
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str], at: str | None = None) -> Plan:
        """Read a plan that `save` wrote; ``folder`` may also be the path of the plan.json itself.

        Args:
            folder: of the plan.
            at: of a tuned plan's folder, another plan on its frontier, such as ``psnr>=38`` or ``speedup>=2``.

        Raises:
            PlanError: no plan there, none that meets ``at``, or a file is damaged or holds something unknown.
        """
        path = Path(folder) if at is None else pick(Path(folder), at)
        file = path / "plan.json" if path.is_dir() else path
        try:
            data = json.loads(file.read_text())
        except FileNotFoundError:
            raise PlanError(f"no plan at {str(folder)!r}: expected a folder with a plan.json") from None
        except (OSError, ValueError) as error:
            raise PlanError(f"{file} cannot be read as JSON: {error}") from None
        if not isinstance(data, dict):
            raise PlanError(f"{file} must hold a JSON object, got {type(data).__name__}")
        return cls.from_dict(data, _load_artefacts(file.parent / "artefacts.safetensors", data.get("artefacts", [])))


TECHNIQUES = ("pruning", "quantization", "attention", "tokens", "exact", "caching", "guidance")
"""The plan's technique fields in order of attachment."""
_SINGLE = ("exact", "caching", "guidance")  # fields of one section, not a list


def in_steps(progress: float, steps: tuple[float, float]) -> bool:
    """Whether ``progress`` in [0, 1] lies in the range [begin, end); an end of 1.0 is inclusive."""
    return steps[0] <= progress < steps[1] or (progress == 1 == steps[1])


def _load_artefacts(file: Path, names: list[str]) -> dict[str, Tensor]:
    if not names:
        return {}
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except FileNotFoundError:
        raise PlanError(
            f"the plan needs {file.name}, which is missing beside its plan.json; copy the whole folder"
        ) from None
    except (SafetensorError, OSError, ValueError) as error:
        raise PlanError(f"{file} is damaged ({error}); copy or calibrate the plan again") from None
    missing = sorted(set(names) - set(tensors))
    if missing:
        raise PlanError(
            f"{file} lacks {', '.join(missing)}, which its plan.json names; copy or calibrate the plan again"
        )
    return tensors


def _section_from(data: object) -> Section:
    if not isinstance(data, Mapping) or not isinstance(data.get("type"), str):
        raise PlanError(f"a section must be an object with a 'type', got {data!r}")
    kind = data["type"]
    if kind not in SECTIONS:
        raise PlanError(f"unknown section type {kind!r}{did_you_mean(kind, SECTIONS)}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "type"}
    _check_keys(kind, values, [f.name for f in dataclasses.fields(SECTIONS[kind])])
    try:
        return SECTIONS[kind](**values)
    except TypeError as error:  # a value of a type that the section's own checks cannot compare
        raise PlanError(f"{kind}: {error}") from None


def _check_keys(owner: str, data: Mapping[str, Any], known: tuple[str, ...] | list[str]) -> None:
    for key in data:
        if key not in known:
            raise PlanError(f"{owner} has no field {key!r}{did_you_mean(str(key), known)}")


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _jsonable(v) for k, v in value.items()}
    return [_jsonable(v) for v in value] if isinstance(value, tuple | list) else value


def _replace(file: Path, content: bytes) -> None:
    partial = file.with_name(file.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, file)

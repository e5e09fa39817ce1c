"""Settings of exact reuse. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffaccel.errors import PlanError
from diffaccel.plan import Section, section_type


@section_type
@dataclass(frozen=True, kw_only=True)
class ExactReuse(Section):
    """Do not compute again what cannot have changed. The output stays the same: to the bit, with ``trim`` to rounding.

    Args:
        constants: what depends on the prompt or the timestep alone is computed once for each: keys and values of
            cross-attention, embedded text, modulation where a timestep comes again (two-call guidance, second-order
            schedulers).
        encoders: a text encoder that is given the same tokens as in an earlier call gives what it gave then.
        trim: padding at the end of the text is cut off where the denoiser is given a mask that hides it; that this
            changes nothing is tried once for each shape.

    Raises:
        PlanError: nothing is on.
    """

    technique: ClassVar[str] = "exact"

    constants: bool = True
    encoders: bool = True
    trim: bool = True

    def __post_init__(self) -> None:
        for name in ("constants", "encoders", "trim"):
            if not isinstance(getattr(self, name), bool):
                raise PlanError(f"ExactReuse.{name} must be True or False, got {getattr(self, name)!r}")
        if not (self.constants or self.encoders or self.trim):
            raise PlanError("ExactReuse with everything off does nothing; leave it out of the plan")

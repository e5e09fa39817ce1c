"""``quantization_config.runtime.diffusion_step_policy``: first and last steps whose activations stay in 16 bits.

By this field a checkpoint tells its engine so: NVIDIA's Cosmos3 models have it; diffusers, vLLM-Omni, SGLang and
TensorRT-LLM read it (schema version 1, type ``first_last_n``). Steps are iterations of the denoising loop. ``native``
is what the weights were made for, such as W8A8; ``a16`` multiplies the same weights with activations as they come.
Whatever else a plan's step ranges say, such as other weights at other steps, has no words there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from diffaccel.errors import PlanError, did_you_mean
from diffaccel.plan import in_steps
from diffaccel.quantization.schedule import Phase, Schedule, Steps

if TYPE_CHECKING:
    from diffaccel.clock import Call
    from diffaccel.quantization.stored import Run

_FIELD = "diffusion_step_policy"
_WORDS = {
    "schema_version": 1,
    "type": "first_last_n",
    "index_space": "denoising_loop_iteration",
    "scope": ["transformer"],
    "default_mode": "native",
}
_MODES = ("a16", "native")
NATIVE, A16 = 0, 1
"""Indices of a layer's runs where it follows a policy."""


@dataclass(frozen=True)
class StepPolicy:
    """Activations stay in 16 bits for the ``first`` and ``last`` steps of a run, and where both hold if ``overlap``."""

    first: int
    last: int
    overlap: bool = True

    def high(self, index: int, steps: int) -> bool:
        """Whether they do in step ``index`` of ``steps``; a run of one step is native, as in the other engines."""
        in_first, in_last = index < self.first, index >= steps - self.last
        if steps <= 1:
            return False
        return self.overlap if in_first and in_last else in_first or in_last

    def to_dict(self) -> dict[str, Any]:
        """The field ``runtime``, JSON-ready."""
        body = {
            **_WORDS,
            "first_steps": {"count": self.first, "mode": "a16"},
            "last_steps": {"count": self.last, "mode": "a16"},
            "overlap": "a16" if self.overlap else "native",
            "reasoner": "native",  # a second network of Cosmos3's, which others do not have
        }
        return {_FIELD: body}


def read_policy(runtime: Mapping[str, Any] | None) -> StepPolicy | None:
    """The policy in the field ``runtime``, None where it has none.

    Raises:
        PlanError: it says what this cannot run; never passed over, since the steps would run in another precision.
    """
    if runtime is None:
        return None
    if not isinstance(runtime, Mapping):
        raise PlanError(f"quantization_config.runtime must be an object, got {runtime!r}")
    policy = runtime.get(_FIELD)
    if policy is None:
        return None
    known = (*_WORDS, "first_steps", "last_steps", "overlap", "reasoner")
    if not isinstance(policy, Mapping):
        raise PlanError(f"{_FIELD} must be an object with {', '.join(known)}, got {policy!r}")
    for name in policy:
        if name not in known:
            raise PlanError(f"{_FIELD} has an unknown field {name!r}{did_you_mean(str(name), known)}")
    if missing := [name for name in known if name not in policy]:
        raise PlanError(f"{_FIELD} lacks {', '.join(missing)}")
    for name, only in _WORDS.items():
        if policy[name] != only:
            raise PlanError(f"{_FIELD}.{name} is {policy[name]!r}, but only {only!r} can be run")
    if policy["overlap"] not in _MODES:
        raise PlanError(f"{_FIELD}.overlap is {policy['overlap']!r}{did_you_mean(str(policy['overlap']), _MODES)}")
    if policy["reasoner"] != "native":
        raise PlanError(
            f"{_FIELD}.reasoner is {policy['reasoner']!r}: what a second network runs is said by float_activations= "
            "(the patterns of its layers), so only 'native' can be run"
        )
    return StepPolicy(_count(policy, "first_steps"), _count(policy, "last_steps"), policy["overlap"] == "a16")


def _count(policy: Mapping[str, Any], name: str) -> int:
    window = policy[name]
    if not isinstance(window, Mapping) or window.get("mode") not in _MODES or set(window) != {"count", "mode"}:
        raise PlanError(f"{_FIELD}.{name} must be {{'count': ..., 'mode': 'a16' or 'native'}}, got {window!r}")
    count = window["count"]
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise PlanError(f"{_FIELD}.{name}.count must be a whole number of steps, got {count!r}")
    return count if window["mode"] == "a16" else 0


def policy_of(schedules: Iterable[Schedule], steps: int | None) -> tuple[StepPolicy | None, str]:
    """The policy that does what these layers do over a schedule of ``steps``, or None and why there is none.

    Layers that do the same at all steps do not count; (None, "") where all are so.
    """
    changing = {schedule for schedule in schedules if len(schedule) > 1}
    if not changing:
        return None, ""
    if steps is None:
        return None, "the number of steps is unknown until the pipeline has run once"
    found = {_counted(schedule, steps) for schedule in changing}
    if None in found or len(found) > 1:
        return None, "only 16-bit activations for the first and last steps, the same in all layers, can be written"
    return found.pop(), ""


def _counted(schedule: Schedule, steps: int) -> StepPolicy | None:
    forms = {form for _, form in schedule}
    native = {form for form in forms if form is not None and form.scheme.activations != "float"}
    if None in forms or len(native) != 1:
        return None
    (form,) = native
    if forms != {form, replace(form, scheme=replace(form.scheme, activations="float"))}:
        return None
    at = (i / (steps - 1) if steps > 1 else 0.0 for i in range(steps))
    high = [next(f for s, f in schedule if in_steps(progress, s)) != form for progress in at]
    if False not in high:
        return None
    first, last = high.index(False), high[::-1].index(False)
    return StepPolicy(first, last) if sum(high) == first + last else None


def runs_under(policy: StepPolicy | None, run: Run) -> tuple[Run, ...]:
    """``run`` alone, or with its twin for the steps of the policy, in the order of `NATIVE` and `A16`."""
    if policy is None or run.scheme.activations == "float":
        return (run,)
    return run, replace(run, scheme=replace(run.scheme, activations="float"))


class LoadedPhase(Phase):
    """Of layers that were loaded with other runs at other steps: rests until something tells it of the steps.

    Args:
        pieces: see `Phase`.
        resting: the run that is active until then.
    """

    def __init__(self, pieces: Sequence[tuple[Steps, int]], resting: int) -> None:
        super().__init__(pieces)
        self.active = self._resting = resting

    @property
    def words(self) -> str:
        """What it does, for a report."""
        return "its bits at each step are as saved"

    def follow(self, call: Call, arguments: Mapping[str, Any], compute: Any) -> None:
        """Listens at the denoiser's root."""
        self.at(call.progress)

    def release(self) -> None:
        """As if it had never followed."""
        self.active = self._resting


class PolicyPhase(LoadedPhase):
    """Which of two runs is active under a policy; native while it rests."""

    def __init__(self, policy: StepPolicy) -> None:
        super().__init__((((0.0, 1.0), NATIVE),), NATIVE)
        self._policy = policy
        self._begin = 0

    @property
    def words(self) -> str:
        return f"activations in 16 bits in the first {self._policy.first} and last {self._policy.last} steps"

    def follow(self, call: Call, arguments: Mapping[str, Any], compute: Any) -> None:
        """Steps count from where this run began (later than 0 for img2img)."""
        if call.first_step:
            self._begin = call.step
        high = call.steps is not None and self._policy.high(call.step - self._begin, call.steps - self._begin)
        self.active = A16 if high else NATIVE

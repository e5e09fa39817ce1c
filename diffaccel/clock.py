"""Where the denoising loop stands: step, progress and branch of each denoiser call.

A step ends when this pipeline's scheduler steps, or where the pipeline says so by its cache context. The clock never
reads a device tensor during the loop: the schedule is copied to the host when it is set, and a timestep handed to the
denoiser is located by where it lies in the schedule's memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks.hooks import CacheContext
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.watch import watch_method

_ORDINALS = ("cond", "uncond")
_MOST_TEXTS = 8


@dataclass(frozen=True)
class Call:
    """One call of a denoiser.

    Args:
        run: number of the trajectory since the clock started; state of an earlier run is stale.
        step: index in the full schedule (before img2img truncation), 0 is the noisiest. A second-order scheduler that
            needs the denoiser twice per interval has an index for each call.
        steps: length of the full schedule; None while unknown (a bare denoiser in a loop of the user's).
        progress: step / (steps - 1), or estimated from the timestep where ``steps`` is unknown.
        timestep: the schedule's value at this step; None when only a device tensor knows it.
        branch: ``cond``, ``uncond``, ``batched`` or what the pipeline's cache context says; a repetition within one
            step is numbered, such as ``cond.2``. Pipelines that guide in one batch and have no
            ``do_classifier_free_guidance`` to tell so are seen as ``cond`` alone.
        first_in_step: False for the second call of two-call guidance.
        first_step: True in the first step that this run computes (later than 0 for img2img).
    """

    run: int
    step: int
    steps: int | None
    progress: float
    timestep: float | None
    branch: str
    first_in_step: bool
    first_step: bool


class Clock:
    """Follows the schedulers of ``pipeline``; without one, the user's `start` and `advance` or the timestep argument.

    With a bare denoiser::

        accel.clock.start(30)
        for t in timesteps:
            model(latents, t)
            accel.clock.advance()
    """

    _begin: int | None  # index of the run's first call
    _last_value: float | None  # of the timestep

    def __init__(self, pipeline: Any = None) -> None:
        self._pipeline = pipeline
        self._undo = ExitStack()
        self._schedulers: dict[str, Any] = {}
        self._active: Any = None
        self.run = 0
        self._begin_run([], None)

    @property
    def schedule(self) -> tuple[float | None, ...]:
        """The timesteps of the run at hand, None where they are unknown; empty where even their number is."""
        return tuple(self._schedule)

    # --- attaching ---

    def attach(self) -> None:
        """Watch every scheduler of the pipeline; undone by `detach`."""
        for name, component in getattr(self._pipeline, "components", {}).items():
            if hasattr(component, "set_timesteps") and hasattr(component, "step"):
                self._watch(name, component)

    def detach(self) -> None:
        """Take the watch off; the schedulers are as they were."""
        self._undo.close()
        self._schedulers.clear()
        self._active = None

    def start(self, steps: int, begin: int = 0) -> None:
        """Begin a trajectory of ``steps`` steps by hand, at index ``begin``."""
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (steps, begin))
        if not whole or not 0 <= begin < steps:
            raise DiffAccelError(
                f"clock.start needs whole numbers, steps >= 1 and 0 <= begin < steps, got {steps!r} and {begin!r}"
            )
        self._active = None
        self._begin_run([None] * steps, None)
        self._begin = self._index = begin

    def advance(self) -> None:
        """End the current step by hand."""
        self._driven = True
        self._end_step()

    @property
    def steps(self) -> int | None:
        """Length of the full schedule of the latest run; None before the first, or where only the loop knows it."""
        return len(self._schedule) or None

    # --- the loop ---

    def call(self, arguments: Mapping[str, Any], timestep: Any, context: CacheContext | None, caller: str = "") -> Call:
        """Note one denoiser call and say where it stands.

        Args:
            arguments: the forward's arguments by parameter name.
            timestep: the timestep argument, as given.
            context: the pipeline's cache context, if it opened one.
            caller: which denoiser; several may share the trajectory, even a step.
        """
        self._follow_replaced_schedulers()
        value = _host_value(timestep)
        self._find_step(timestep, value, context, caller)
        self._last_value = value
        branches = self._branches.setdefault(caller, [])
        branch = self._branch(arguments, context, branches)
        branches.append(branch)
        steps = len(self._schedule) or (context.num_inference_steps if context is not None else None)
        known = self._schedule[self._index] if self._index < len(self._schedule) else None
        value = value if known is None else known
        return Call(
            run=self.run,
            step=self._index,
            steps=steps,
            progress=self._progress(steps, value),
            timestep=value,
            branch=branch,
            first_in_step=len(branches) == 1,
            first_step=self._index == self._begin,
        )

    def _begin_run(self, schedule: list[float | None], tensor: Tensor | None) -> None:
        self.run += 1
        self._schedule = schedule
        self._timesteps = tensor
        self._index = 0
        self._begin = None
        self._driven = False  # whether somebody ends our steps
        self._branches: dict[str, list[str]] = {}  # of this step, by caller
        self._texts: dict[int, tuple[str, Tensor]] = {}
        self._last_value = None
        self._rising: bool | None = None  # direction of the timesteps

    def _end_step(self) -> None:
        self._index += 1
        self._branches = {}

    def _find_step(self, timestep: Any, value: float | None, context: CacheContext | None, caller: str) -> None:
        """Bring the index to where this call stands."""
        place = _offset_in(timestep, self._timesteps)
        if self._begin is None:
            self._begin = self._index = self._begin_index(place, value)
        if context is not None and context.step_index is not None:
            place = self._begin + int(context.step_index)
        if place is not None:
            if place != self._index:
                self._index, self._branches = place, {}
        elif not self._driven and self._last_value is not None and value is not None:
            self._follow_values(self._last_value, value)
        elif not self._driven and context is not None and context.name in self._branches.get(caller, ()):
            self._end_step()  # the loop steps a copy of the scheduler, and the timestep is on the device

    def _follow_values(self, last: float, value: float) -> None:
        """Nobody ends our steps: another timestep is another step, and a turn back is another trajectory."""
        if value == last:
            return
        rising = value > last
        if self._rising is not None and rising != self._rising:
            begin = self._begin
            self._begin_run(self._schedule, self._timesteps)
            self._begin = self._index = begin or 0
        else:
            self._rising = rising
            self._end_step()

    def _begin_index(self, place: int | None, value: float | None) -> int:
        """Index of the run's first call: later than 0 for img2img, which leaves out the noisiest part."""
        if place is not None:
            return place
        begin = getattr(self._active, "_begin_index", None)
        if isinstance(begin, int):
            return begin
        return self._schedule.index(value) if value is not None and value in self._schedule else 0

    def _progress(self, steps: int | None, value: float | None) -> float:
        if steps is not None:
            return min(self._index / (steps - 1), 1.0) if steps > 1 else 0.0
        if value is None:
            return 0.0
        return min(max(1 - value / (1000.0 if value > 1 else 1.0), 0.0), 1.0)

    # --- branches ---

    def _branch(self, arguments: Mapping[str, Any], context: CacheContext | None, earlier: list[str]) -> str:
        """The cache context's name, else by the identity of the text embedding, else by order within the step.

        Pipelines with two calls per step run the conditional one first.
        """
        if context is not None:
            name = "batched" if context.name == "cond_uncond" else context.name
        else:
            texts = (v for k, v in arguments.items() if "encoder_hidden_states" in k and isinstance(v, Tensor))
            name = self._name_by_text(next(texts, None), len(earlier))
        repeated = sum(1 for e in earlier if e.split(".")[0] == name)
        return f"{name}.{repeated + 1}" if repeated else name

    def _name_by_text(self, text: Tensor | None, ordinal: int) -> str:
        address = None if text is None or isinstance(text, torch._subclasses.FakeTensor) else text.data_ptr()
        if address in self._texts:
            return self._texts[address][0]
        name = _ORDINALS[ordinal] if ordinal < len(_ORDINALS) else f"branch{ordinal}"
        guided = getattr(self._pipeline, "do_classifier_free_guidance", False) is True
        if guided and ordinal == 0 and text is not None and text.shape[0] % 2 == 0:
            name = "batched"
        if address is not None and text is not None and self._index == self._begin and len(self._texts) < _MOST_TEXTS:
            self._texts[address] = name, text  # held, so that its address is not given to another
        return name

    # --- schedulers ---

    def _watch(self, name: str, scheduler: Any) -> None:
        if not any(scheduler is known for known in self._schedulers.values()):
            self._undo.callback(watch_method(scheduler, "set_timesteps", self._schedule_set))
            self._undo.callback(watch_method(scheduler, "step", self._stepped))
        self._schedulers[name] = scheduler

    def _follow_replaced_schedulers(self) -> None:
        """The user may replace ``pipe.scheduler`` at any time: watch the new one, whose schedule is already set."""
        for name, known in tuple(self._schedulers.items()):
            scheduler = getattr(self._pipeline, name, None)
            if scheduler is not known and scheduler is not None:
                self._watch(name, scheduler)
                if isinstance(getattr(scheduler, "timesteps", None), Tensor):
                    self._schedule_set(scheduler)

    def _schedule_set(self, scheduler: Any) -> None:
        self._active = scheduler
        timesteps = getattr(scheduler, "timesteps", None)
        if isinstance(timesteps, torch._subclasses.FakeTensor):
            self._begin_run([None] * timesteps.numel(), None)
        elif isinstance(timesteps, Tensor):
            self._begin_run([float(t) for t in timesteps.detach().cpu().reshape(-1)], timesteps)
        else:
            self._begin_run([float(t) for t in (timesteps if timesteps is not None else [])], None)

    def _stepped(self, scheduler: Any) -> None:
        if self._branches:  # several schedulers may step at the end of one step
            self._driven = True
            self._end_step()


def _offset_in(part: Any, whole: Tensor | None) -> int | None:
    """Index of ``part`` (an element or its expansion) in the 1-D ``whole`` when it is a view of it; reads no data."""
    if whole is None or type(part) is not Tensor or type(whole) is not Tensor or whole.ndim != 1:
        return None
    if part.device != whole.device or part.dtype != whole.dtype:
        return None
    if part.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
        return None
    if any(stride != 0 and size > 1 for stride, size in zip(part.stride(), part.shape, strict=True)):
        return None
    return int(part.storage_offset() - whole.storage_offset()) // max(whole.stride(0), 1)


def _host_value(timestep: Any) -> float | None:
    """The timestep's value where reading it costs no device sync: a number, or the largest element of a CPU tensor.

    Per-token timesteps (Wan TI2V) hold zeros for the tokens of the given image.
    """
    if isinstance(timestep, Tensor):
        if timestep.device.type != "cpu" or isinstance(timestep, torch._subclasses.FakeTensor) or not timestep.numel():
            return None
        return float(timestep.max())
    return float(timestep) if isinstance(timestep, int | float) else None

"""Where the denoising loop stands: step, progress and branch of each denoiser call.

A step ends when this pipeline's scheduler steps, or where the pipeline says so by its cache context. The clock never reads
a device tensor during the loop: the schedule is copied to the host when it is set, and a timestep handed to the denoiser is
located by where it lies in the schedule's memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks.hooks import CacheContext
from torch import Tensor

from diffaccel.errors import DiffAccelError


@dataclass(frozen=True)
class Call:
    """One call of a denoiser.

    Args:
        run: number of the trajectory since the clock started; state of an earlier run is stale.
        step: index in the full schedule (before img2img truncation), 0 is the noisiest.
        steps: length of the full schedule; None while unknown (a bare denoiser in a loop of the user's).
        progress: step / (steps - 1), or estimated from the timestep where ``steps`` is unknown.
        timestep: the schedule's value at this step; None when only a device tensor knows it.
        branch: ``cond``, ``uncond`` or ``batched``.
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

    @property
    def last_step(self) -> bool:
        return self.steps is not None and self.step >= self.steps - 1


class Clock:
    """Follows the schedulers of ``pipeline``; without one, the user's `start` and `advance` or the timestep argument.

    With a bare denoiser::

        accel.clock.start(30)
        for t in timesteps:
            model(latents, t)
            accel.clock.advance()
    """

    def __init__(self, pipeline: Any = None) -> None:
        self._pipeline = pipeline
        self._undo = ExitStack()
        self._watched: list[Any] = []
        self._manual = False
        self.run = 0
        self._begin_run([], None)

    # --- attaching ---

    def attach(self) -> None:
        """Watch every scheduler of the pipeline; undone by `detach`."""
        for scheduler in self._schedulers():
            self._watch(scheduler)

    def detach(self) -> None:
        """Take the watch off; the schedulers are as they were."""
        self._undo.close()
        self._watched.clear()

    def start(self, steps: int, begin: int = 0) -> None:
        """Begin a trajectory of ``steps`` steps by hand, at index ``begin``."""
        if steps < 1 or not 0 <= begin < steps:
            raise DiffAccelError(f"clock.start needs steps >= 1 and 0 <= begin < steps, got {steps} and {begin}")
        self._manual = True
        self._begin_run([None] * steps, None)
        self._begin = self._index = begin

    def advance(self) -> None:
        """End the current step by hand."""
        self._end_step()

    # --- the loop ---

    def call(self, arguments: Mapping[str, Any], timestep: Any, context: CacheContext | None) -> Call:
        """Note one denoiser call and say where it stands.

        Args:
            arguments: the forward's arguments by parameter name.
            timestep: the timestep argument, as given.
            context: the pipeline's cache context, if it opened one.
        """
        self._notice_new_scheduler()
        self._locate(timestep, context)
        branch = context.name if context is not None else self._branch(arguments)
        if branch in self._branches_in_step and not self._scheduler_steps and self._moved(timestep):
            self._end_step()  # loops whose scheduler we cannot see, such as those that copy it
        first = not self._branches_in_step
        self._branches_in_step.add(branch)
        self._last_timestep = _host_value(timestep)
        steps = len(self._schedule) or None
        value = self._schedule[self._index] if self._index < len(self._schedule) else None
        if value is None:
            value = self._last_timestep
        return Call(
            self.run, self._index, steps, self._progress(steps, value), value, branch, first, self._index == self._begin
        )

    def _begin_run(self, schedule: list[float | None], tensor: Tensor | None) -> None:
        self.run += 1
        self._schedule = schedule
        self._timesteps = tensor
        self._begin = self._index = 0
        self._scheduler_steps = 0
        self._located = False
        self._branches_in_step: set[str] = set()
        self._texts: dict[int, tuple[str, Tensor]] = {}
        self._last_timestep: float | None = None

    def _end_step(self) -> None:
        self._index += 1
        self._branches_in_step = set()

    def _locate(self, timestep: Any, context: CacheContext | None) -> None:
        """Correct the index where something better than counting is at hand."""
        index = None
        if context is not None and context.step_index is not None:
            index = self._begin + int(context.step_index)
        elif self._timesteps is not None and isinstance(timestep, Tensor):
            index = _offset_in(timestep, self._timesteps)
        elif not self._schedule and self._timestep_rose(timestep):
            self._begin_run([], None)  # a bare denoiser: the noise went up, so a new trajectory began
        if not self._located:
            self._located = True
            self._begin = self._begin_index(timestep) if index is None else index
            if context is not None and context.step_index is not None:
                self._begin = self._begin_index(timestep)
                index = self._begin + int(context.step_index)
            self._index = max(self._index, self._begin) if index is None else index
        elif index is not None and index != self._index:
            self._index, self._branches_in_step = index, set()

    def _begin_index(self, timestep: Any) -> int:
        """Index of the first step: later than 0 for img2img, which skips the noisiest part."""
        if self._manual:
            return self._begin
        begins = [b for s in self._watched if isinstance(b := getattr(s, "_begin_index", None), int)]
        if begins:
            return begins[0]
        value = _host_value(timestep)
        return self._schedule.index(value) if value in self._schedule else 0

    def _timestep_rose(self, timestep: Any) -> bool:
        value = _host_value(timestep)
        return value is not None and self._last_timestep is not None and value > self._last_timestep

    def _moved(self, timestep: Any) -> bool:
        value = _host_value(timestep)
        return value is None or value != self._last_timestep

    def _progress(self, steps: int | None, value: float | None) -> float:
        if steps is not None:
            return min(self._index / (steps - 1), 1.0) if steps > 1 else 0.0
        if value is None:
            return 0.0
        return min(max(1 - value / (1000.0 if value > 1 else 1.0), 0.0), 1.0)

    def _branch(self, arguments: Mapping[str, Any]) -> str:
        """Name of the branch by the identity of its text embedding; pipelines with two calls run ``cond`` first."""
        text = next((v for k, v in arguments.items() if "encoder_hidden_states" in k and isinstance(v, Tensor)), None)
        ordinal = ("cond", "uncond")[len(self._branches_in_step)] if len(self._branches_in_step) < 2 else None
        ordinal = ordinal or f"branch{len(self._branches_in_step)}"
        if getattr(self._pipeline, "do_classifier_free_guidance", False) is True and self._guides_in_one_batch(text):
            return "batched"
        if text is None:
            return ordinal if self._pipeline is not None or self._manual else "cond"
        known = self._texts.get(text.data_ptr())
        if known is not None:
            return known[0]
        if self._index == self._begin and self._pipeline is not None:
            self._texts[text.data_ptr()] = (ordinal, text)  # held, so that its address is not given to another
            return ordinal
        return ordinal if self._pipeline is not None else "cond"

    def _guides_in_one_batch(self, text: Tensor | None) -> bool:
        return text is not None and text.shape[0] % 2 == 0 and len(self._branches_in_step) == 0

    # --- schedulers ---

    def _schedulers(self) -> list[Any]:
        components = getattr(self._pipeline, "components", {})
        return [c for c in components.values() if hasattr(c, "set_timesteps") and hasattr(c, "step")]

    def _notice_new_scheduler(self) -> None:
        """The user may replace ``pipe.scheduler`` at any time: then watch the new one, whose schedule is already set."""
        for scheduler in self._schedulers():
            if not any(scheduler is known for known in self._watched):
                self._watch(scheduler)
                if isinstance(getattr(scheduler, "timesteps", None), Tensor):
                    self._schedule_set(scheduler)

    def _watch(self, scheduler: Any) -> None:
        self._watched.append(scheduler)
        for method, then in (("set_timesteps", self._schedule_set), ("step", self._stepped)):
            self._undo.callback(watch_method(scheduler, method, then))

    def _schedule_set(self, scheduler: Any) -> None:
        self._manual = False
        tensor = getattr(scheduler, "timesteps", None)
        if isinstance(tensor, Tensor):
            self._begin_run([float(t) for t in tensor.detach().cpu().reshape(-1)], tensor)
        else:
            self._begin_run([None if t is None else float(t) for t in (tensor if tensor is not None else [])], None)

    def _stepped(self, scheduler: Any) -> None:
        self._scheduler_steps += 1
        self._end_step()


def watch_method(owner: Any, name: str, then: Callable[[Any], None]) -> Callable[[], None]:
    """Call ``then(owner)`` after each call of ``owner``'s method ``name``, on this instance only; returns the undo."""
    had = owner.__dict__.get(name)
    setattr(owner, name, _Watched(owner, name, then))
    return functools.partial(_restore, owner, name, had)


class _Watched:
    """Stands for a scheduler's method on this instance and tells the clock after each call.

    A deep copy of the scheduler (some pipelines make one) gets its own plain method back.
    """

    def __init__(self, scheduler: Any, name: str, then: Callable[[Any], None]) -> None:
        self._scheduler, self._name, self._then = scheduler, name, then
        self._method = getattr(scheduler, name)
        functools.update_wrapper(self, self._method)  # pipelines inspect the signature for `sigmas`

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._method(*args, **kwargs)
        self._then(self._scheduler)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._scheduler), self._scheduler)
        return functools.partial(getattr(type(copied), self._name), copied)

    def __reduce__(self) -> Any:
        return getattr, (self._scheduler, self._name)


def _restore(scheduler: Any, method: str, had: Any) -> None:
    if had is None:
        scheduler.__dict__.pop(method, None)
    else:
        setattr(scheduler, method, had)


def _offset_in(part: Tensor, whole: Tensor) -> int | None:
    """Index of ``part`` (an element or its expansion) in the 1-D ``whole`` when it is a view of it; reads no data."""
    if isinstance(part, torch._subclasses.FakeTensor) or part.device != whole.device or whole.ndim != 1:
        return None
    if part.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr() or part.dtype != whole.dtype:
        return None
    if any(stride != 0 and size > 1 for stride, size in zip(part.stride(), part.shape, strict=True)):
        return None
    return (part.storage_offset() - whole.storage_offset()) // max(whole.stride(0), 1)


def _host_value(timestep: Any) -> float | None:
    """The timestep's value where reading it costs no device sync: a number, or a tensor on the CPU (its largest element)."""
    if isinstance(timestep, Tensor):
        if timestep.device.type != "cpu" or isinstance(timestep, torch._subclasses.FakeTensor) or not timestep.numel():
            return None
        return float(timestep.max())
    return float(timestep) if isinstance(timestep, int | float) else None

"""Peers that have to measure a model before they can skip anything: MagCache of diffusers, SmoothCache.

Each is calibrated by one run of the unaccelerated pipeline, with the first prompt and a seed that no table reports on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from diffaccel.denoiser import Denoiser
from diffaccel.errors import InputError
from diffaccel.eval.peer_hooks import attach_cache, restored, state_managers
from diffaccel.watch import watch_method

_LONGEST = 3  # steps that SmoothCache may skip in a row


def mag_ratios(pipe: Any, denoiser: Denoiser, run: Callable[[], Any], steps: int) -> list[float]:
    """MagCache's ratios by diffusers' calibration mode, one per step.

    Raises:
        InputError: it measured something else than one ratio per step.
    """
    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    with ExitStack() as undo:
        undo.callback(restored(denoiser.module))
        # One step more than there are: after the last one the hook would print what it measured, and forget it.
        config = MagCacheConfig(calibrate=True, num_inference_steps=steps + 1)
        attach_cache(pipe, denoiser, apply_mag_cache, config, undo)
        run()
        states = [state for manager in state_managers(denoiser.module) for state in manager._state_cache.values()]
        measured = [list(state.calibration_ratios) for state in states if state.calibration_ratios]
    if not measured or len(measured[0]) != steps:
        raise InputError(f"calibration gave {len(measured[0]) if measured else 0} ratios for {steps} steps")
    return measured[0]


def put_mag_cache(pipe: Any, denoiser: Denoiser, value: float, undo: ExitStack, calibrated: Sequence[float]) -> None:
    """MagCache with its ratios; ``value`` is its threshold."""
    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    config = MagCacheConfig(threshold=value, num_inference_steps=len(calibrated), mag_ratios=list(calibrated))
    attach_cache(pipe, denoiser, apply_mag_cache, config, undo)


def smooth_errors(pipe: Any, denoiser: Denoiser, run: Callable[[], Any], steps: int) -> list[list[float]]:
    """How much attention outputs change over 1, 2 and 3 steps: ``[step][k - 1]``, relative L1, mean over blocks
    (arXiv:2411.10510, sec. 3). The package's own generator of schedules is not in its wheel.

    Raises:
        InputError: no blocks that SmoothCache knows.
    """
    from SmoothCache import DiffuserCacheHelper

    helper = DiffuserCacheHelper(denoiser.module, schedule={})
    parts = [
        getattr(block, name)
        for block in denoiser.module.modules()
        if isinstance(block, tuple(helper.block_classes))
        for name in helper.components_to_wrap
        if hasattr(block, name)
    ]
    if not parts:
        raise InputError("it finds no block that it knows in this model")
    found: list[list[list[float]]] = []
    with ExitStack() as undo:
        for part in parts:
            last: deque[Tensor] = deque(maxlen=_LONGEST)
            found.append([])
            hook = part.register_forward_hook(lambda _m, _i, out, last=last, to=found[-1]: _note(out, last, to))
            undo.callback(hook.remove)
        run()
    if any(len(errors) != steps for errors in found):
        raise InputError(f"its blocks are not called once a step ({len(found[0])} calls in {steps} steps)")
    return [[sum(e[step][k] for e in found) / len(found) for k in range(_LONGEST)] for step in range(steps)]


def _note(out: Tensor, last: deque[Tensor], errors: list[list[float]]) -> None:
    """The error of the newest output against each of the last ones; infinite where there is none."""
    earlier = list(last)[::-1]
    found = [((out - e).abs().sum() / e.abs().sum()).item() for e in earlier]
    errors.append(found + [torch.inf] * (_LONGEST - len(found)))
    last.append(out.detach().clone())


def schedule_of(errors: Sequence[Sequence[float]], threshold: float) -> list[int]:
    """1 where a step computes, 0 where it takes what the last computed step gave: as long as the error stays below
    ``threshold``, at most 3 steps in a row."""
    schedule: list[int] = []
    skipped = _LONGEST
    for row in errors:
        skipped = skipped + 1 if skipped < _LONGEST and row[skipped] < threshold else 0
        schedule.append(0 if skipped else 1)
    return schedule


def put_smooth_cache(
    pipe: Any, denoiser: Denoiser, value: float, undo: ExitStack, calibrated: Sequence[Sequence[float]]
) -> None:
    """SmoothCache with the schedule that its rule gives for ``value``, the error it may make."""
    from SmoothCache import DiffuserCacheHelper, smooth_cache_helper

    helper = DiffuserCacheHelper(denoiser.module, schedule={"attn1": schedule_of(calibrated, value)})
    smooth_cache_helper.print = lambda *_: None  # it prints a line for each block and step
    undo.callback(delattr, smooth_cache_helper, "print")
    helper.enable()
    undo.callback(helper.disable)
    undo.callback(watch_method(pipe.scheduler, "set_timesteps", lambda _: helper.reset_state()))

"""Runs the teacher's pipeline and keeps what its denoiser was asked and gave."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from diffaccel.denoiser import Denoiser, timestep_parameter
from diffaccel.distillation.states import State, save_run
from diffaccel.errors import InputError, PlanError
from diffaccel.key import plan_key
from diffaccel.latents import latent_tensors, output_tensors
from diffaccel.recording import run_pipeline


def record_teacher(
    pipe: Any,
    denoiser: Denoiser,
    requests: Sequence[Mapping[str, Any]],
    call: Mapping[str, Any],
    folder: Path,
    *,
    runs: int,
    guidance: bool,
    seed: int,
    notify: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[list[Path], str]:
    """A file for each of ``runs`` runs, the requests taken in turn and each time with other noise.

    With ``guidance`` a step is one state: the arguments of the conditional branch, and as target what the pipeline made
    of both branches. Runs that are there already are kept.

    Returns:
        The files, and the identity that they carry.

    Raises:
        PlanError: the denoiser is never called, or with ``guidance`` no step has two branches.
    """
    told = [plan_key([denoiser])["denoisers"], list(requests), {k: v for k, v in call.items() if k != "generator"}]
    identity = hashlib.sha256(json.dumps([*told, guidance, seed], sort_keys=True, default=str).encode()).hexdigest()
    files = [folder / f"run-{i:05d}.safetensors" for i in range(runs)]
    for i, file in enumerate(files):
        notify(i, runs)
        if file.exists():
            continue
        steps = Steps(denoiser)
        request = {**call, **requests[i % len(requests)]}
        with torch.no_grad():
            steps.follow(pipe, partial(run_pipeline, pipe, request, seed + i))
        states = steps.guided() if guidance else steps.plain()
        if not states:
            raise PlanError(f"{type(pipe).__name__} never called {denoiser.component}; check the call's arguments")
        save_run(file, states, identity[:16])
    notify(runs, runs)
    return files, identity[:16]


class _Enough(Exception):
    """Ends a run whose rest nobody looks at."""


class Steps:
    """The denoiser's calls in one run, and what the scheduler was given after each of them."""

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser
        self._signature = inspect.signature(denoiser.module.forward)
        self._calls: list[tuple[dict[str, Any], list[Tensor]]] = []
        self._steps: list[tuple[int, Tensor]] = []  # calls made so far, and the prediction
        self._most: int | None = None

    def follow(self, pipe: Any, run: Callable[[], Any], calls: int | None = None) -> None:
        """Watch a run, or only its first so many ``calls``."""
        self._most = calls
        hook = self._denoiser.module.register_forward_hook(self._keep, with_kwargs=True)
        scheduler = pipe.scheduler
        step, own = scheduler.step, scheduler.__dict__.get("step")
        signature = inspect.signature(step)

        @functools.wraps(step)  # pipelines inspect the signature
        def watched(*args: Any, **kwargs: Any) -> Any:
            prediction = signature.bind(*args, **kwargs).arguments["model_output"]
            self._steps.append((len(self._calls), prediction.detach().clone()))
            return step(*args, **kwargs)

        scheduler.step = watched
        try:
            run()
        except _Enough:
            pass
        finally:
            hook.remove()
            del scheduler.step
            if own is not None:
                scheduler.step = own

    def _keep(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        bound = self._signature.bind(*args, **kwargs)
        arguments = dict(bound.arguments)
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments |= arguments.pop(name, {})
            elif parameter.kind is parameter.VAR_POSITIONAL and arguments.get(name):
                raise InputError(f"{type(module).__name__} takes arguments without names, which cannot be recorded")
        arguments = pytree.tree_map_only(Tensor, lambda t: t.detach().cpu().clone(), arguments)
        self._calls.append((arguments, [t.detach().cpu().clone() for t in output_tensors(output)]))
        if self._most is not None and len(self._calls) >= self._most:
            raise _Enough

    @property
    def first_arguments(self) -> dict[str, Any]:
        """Of the first call."""
        return self._calls[0][0]

    def plain(self) -> list[State]:
        time = timestep_parameter(self._denoiser.module)
        return [State(arguments, outputs, time) for arguments, outputs in self._calls]

    def guided(self) -> list[State]:
        """One state for each step of the scheduler."""
        time = timestep_parameter(self._denoiser.module)
        states, done = [], 0
        for upto, prediction in self._steps:
            calls, done = self._calls[done:upto], upto
            if not calls:
                continue  # a step of another denoiser
            prediction = prediction.cpu()
            arguments, outputs = calls[0]  # with two calls, the conditional one comes first
            if len(calls) == 1:
                rows = outputs[0].shape[0]
                if rows != 2 * prediction.shape[0] or not _halves_equal(arguments):
                    raise PlanError(
                        "no step has two branches: call with the guidance that the student is to learn, such as "
                        "guidance_scale=4.5"
                    )
                arguments = {n: second_half(v, rows) for n, v in arguments.items()}
                outputs = [t.chunk(2)[1] for t in outputs]
            states.append(State(arguments, _as_output(prediction, outputs), time))
        return states


def _as_output(prediction: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
    """What the denoiser would have to give for the scheduler to be given ``prediction``."""
    (output,) = outputs
    used, rest = output, output[:, :0]
    if output.ndim > 2 and output.shape[1] == 2 * prediction.shape[1]:  # learned variances come after
        used, rest = output.chunk(2, 1)
    if prediction.shape != used.shape:
        raise PlanError(
            f"the scheduler is given {tuple(prediction.shape)} where the denoiser gives {tuple(output.shape)}; "
            "guidance cannot be distilled into this model"
        )
    sign = -1.0 if float((prediction.float() * used.float()).sum()) < 0 else 1.0  # some pipelines turn it round
    return [torch.cat([(sign * prediction).to(output.dtype), rest], 1)]


def _halves_equal(arguments: Mapping[str, Any]) -> bool:
    latents = latent_tensors(arguments)
    return bool(latents) and all(t.shape[0] % 2 == 0 and torch.equal(*t.chunk(2)) for t in latents)


def second_half(value: Any, rows: int) -> Any:
    """Of all tensors in ``value`` that have ``rows`` rows, the second half: the conditional branch."""

    def half(tensor: Tensor) -> Tensor:
        return tensor.chunk(2)[1].clone() if tensor.ndim and tensor.shape[0] == rows else tensor

    return pytree.tree_map_only(Tensor, half, value)

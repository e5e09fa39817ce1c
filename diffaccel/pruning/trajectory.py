"""A pipeline's whole sampling run as one differentiable function, in memory that hardly grows with its steps.

Each denoiser call is checkpointed: what is kept of a step are latents, and the call is made again when gradients come
by. This is EcoDiff's time-step gradient checkpointing (arXiv:2412.02852, sec. 3.3), but scheduler, guidance and
whatever else the pipeline does between calls are the pipeline's own, and the gradient is that of full back-propagation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffaccel.denoiser import timestep_parameter
from diffaccel.errors import PlanError
from diffaccel.latents import output_tensors
from diffaccel.pruning.masks import Masks
from diffaccel.recording import run_pipeline

Sample = Callable[[int], dict[str, Tensor]]
"""The masks of a step, by group; the same whenever it is asked for the same step."""


class Trajectory:
    """What a pipeline (or one call of a bare denoiser) makes of a request.

    Args:
        model: the pipeline, or the denoiser itself.
        denoiser: the denoiser whose units are masked.
        call: arguments of every call.
        checkpointed: False keeps all activations, to compare with.
    """

    def __init__(self, model: Any, denoiser: nn.Module, call: Mapping[str, Any], *, checkpointed: bool = True) -> None:
        self._model, self._denoiser, self._call = model, denoiser, call
        self._checkpointed = checkpointed
        self._timestep = timestep_parameter(denoiser)

    def plain(self, request: Mapping[str, Any], seed: int) -> list[Tensor]:
        """Without masks and gradients."""
        with torch.no_grad():
            return [t.detach() for t in output_tensors(self._run(request, seed))]

    def masked(self, request: Mapping[str, Any], seed: int, masks: Masks, sample: Sample) -> list[Tensor]:
        """With the masks that ``sample`` gives for each step, and gradients with respect to them.

        Call it, and go back through what it gives, with the weights `frozen`.

        Raises:
            PlanError: the pipeline cuts the gradient off.
        """
        forward, signature = self._denoiser.forward, inspect.signature(self._denoiser.forward)
        step, last = -1, None

        def run(values: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
            masks.set(values)  # also when the call is made again, after others have set theirs
            return forward(*args, **kwargs)

        def replaced(*args: Any, **kwargs: Any) -> Any:
            nonlocal step, last
            time = signature.bind(*args, **kwargs).arguments.get(self._timestep) if self._timestep else None
            time = time.detach().clone() if isinstance(time, Tensor) else time
            if step < 0 or not _same(time, last):  # both calls of a step with guidance have the same masks
                step, last = step + 1, time
            values = sample(step)
            if not self._checkpointed:
                return run(values, *args, **kwargs)
            return checkpoint(run, values, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        had = self._denoiser.__dict__.get("forward")
        self._denoiser.__dict__["forward"] = replaced
        try:
            with torch.enable_grad():
                outputs = output_tensors(self._run(request, seed))
        finally:
            del self._denoiser.__dict__["forward"]
            if had is not None:
                self._denoiser.__dict__["forward"] = had
        if not any(t.requires_grad for t in outputs):
            raise PlanError(
                f"{type(self._model).__name__} computes without gradients inside its call, so masks cannot be learnt "
                "through it; use method='taylor' or 'evolution'"
            )
        return outputs

    def _run(self, request: Mapping[str, Any], seed: int) -> Any:
        if isinstance(self._model, nn.Module):
            return self._model(**request)
        return run_pipeline(self._model, {**self._call, **request}, seed, call=_with_gradients(self._model))


def _with_gradients(pipe: Any) -> Callable[..., Any]:
    """The pipeline's call without the ``torch.no_grad`` that decorates it."""
    return inspect.unwrap(type(pipe).__call__).__get__(pipe)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return a is b


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """No weight of any network in ``model`` asks for gradients meanwhile."""
    components = [model] if isinstance(model, nn.Module) else list(getattr(model, "components", {}).values())
    parameters = [p for c in components if isinstance(c, nn.Module) for p in c.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)

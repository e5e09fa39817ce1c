"""Calls of the denoisers as a pipeline really makes them, kept so that they can be made again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffaccel.denoiser import Denoiser
from diffaccel.errors import InputError, PlanError


@dataclass(frozen=True)
class Recorded:
    """The arguments of one call of a denoiser."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, module: nn.Module) -> Any:
        """The call again, with the gradients that the caller wants."""
        return module(*self.args, **self.kwargs)


def requests_of(prompts: Any) -> list[dict[str, Any]]:
    """Arguments of pipeline calls from prompts: a text, an object of arguments, or a list of either.

    Raises:
        InputError: there are none, or they are something else.
    """
    items = [prompts] if isinstance(prompts, str | Mapping) else list(prompts) if isinstance(prompts, Sequence) else []
    if not items or not all(isinstance(item, str | Mapping) for item in items):
        raise InputError(f"prompts must be one text or more (or the arguments of a call each), got {prompts!r:.200}")
    return [dict(item) if isinstance(item, Mapping) else {"prompt": item} for item in items]


def record(
    model: Any,
    denoisers: Sequence[Denoiser],
    requests: Sequence[Mapping[str, Any]],
    call: Mapping[str, Any],
    steps: int,
) -> dict[str, list[Recorded]]:
    """By component, calls spread evenly over the schedule: at most ``steps`` of each request.

    For a bare denoiser each request is the keyword arguments of one call.

    Raises:
        PlanError: a denoiser that is never called.
    """
    if isinstance(model, nn.Module):
        return {denoisers[0].component: [Recorded((), dict(request)) for request in requests]}
    found: dict[str, list[Recorded]] = {d.component: [] for d in denoisers}
    for i, request in enumerate(requests):
        seen: dict[str, list[Recorded]] = {d.component: [] for d in denoisers}
        handles = [
            d.module.register_forward_pre_hook(_keep(seen[d.component]), with_kwargs=True, prepend=True)
            for d in denoisers
        ]
        try:
            run_pipeline(model, {**call, **request}, seed=i)
        finally:
            for handle in handles:
                handle.remove()
        for component, calls in seen.items():
            stride = max(1, len(calls) / steps)
            found[component] += [calls[int(k * stride)] for k in range(min(steps, len(calls)))]
    idle = [component for component, calls in found.items() if not calls]
    if idle:
        raise PlanError(f"{type(model).__name__} never called {', '.join(idle)}; check the call's arguments")
    return found


def run_pipeline(pipe: Any, arguments: Mapping[str, Any], seed: int, call: Callable[..., Any] | None = None) -> Any:
    """One call with its noise fixed, latents as output where the pipeline offers that, and without a progress bar.

    ``call`` is what is called; by default the pipeline itself.
    """
    takes = inspect.signature(pipe.__call__).parameters
    arguments = dict(arguments)
    if "generator" in takes and "generator" not in arguments:
        arguments["generator"] = torch.Generator("cpu").manual_seed(seed)
    if "output_type" in takes:
        arguments.setdefault("output_type", "latent")
    own = pipe.__dict__.get("_progress_bar_config")
    pipe._progress_bar_config = {**(own or {}), "disable": True}
    try:
        return (call or pipe)(**arguments)
    finally:
        pipe.__dict__.pop("_progress_bar_config")
        if own is not None:
            pipe._progress_bar_config = own


def _keep(calls: list[Recorded]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Schedulers may change latents in place, so tensors that vary are copied.
        calls.append(Recorded(*pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (args, dict(kwargs)))))

    return hook

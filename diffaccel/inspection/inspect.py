"""`inspect_model`: structure, and where parameters, operations and time of a real short call go."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from diffaccel.denoiser import Denoiser, find_denoisers
from diffaccel.errors import InputError
from diffaccel.inspection.layouts import Layouts, learning_layouts
from diffaccel.inspection.measure import Ledger
from diffaccel.inspection.quiet import quiet
from diffaccel.inspection.structure import AttentionCalls, Inspection, component_share, denoiser_info

_STEPS = 2
_PROMPT = "a photo of a red ball on a table"


def inspect_model(model: Any, call: Mapping[str, Any] | None = None, *, run: bool = True) -> Inspection:
    """What a pipeline or denoiser consists of.

    A run is one call of the pipeline with two steps, or one forward of a bare denoiser, done three times: for layouts
    and warm-up, for operations, for time. Compiled parts run as plain Python meanwhile, and layers are waited for, so
    shares of time are meant, not the total. All hooks are on instances and gone afterwards.

    Args:
        model: a diffusers pipeline, what `diffaccel.pipelines.load` returns, or a denoiser module.
        call: arguments of the pipeline's call, over the loaded pipeline's defaults and a prompt; two steps in any case.
            For a bare denoiser those of its forward: without them it is not run.
        run: False for structure and parameters only.

    Raises:
        ModelError: no denoiser in ``model``.
        InputError: ``call`` was given and the run failed with it.
    """
    pipe = getattr(model, "pipe", model)
    denoisers = find_denoisers(pipe)
    bare = isinstance(pipe, nn.Module)
    networks = _networks(pipe, denoisers)
    arguments = dict(call or {}) if bare else short_call(pipe, {**getattr(model, "defaults", {}), **(call or {})})
    notes: list[str] = []
    measured = None
    if run and bare and not arguments:
        notes.append("not run: a bare denoiser needs the arguments of a forward; structure and parameters only")
    elif run:
        try:
            measured = _measure(pipe, denoisers, networks, arguments, notes)
        except Exception as error:  # whatever the pipeline raises on arguments that it cannot take
            if call is not None:
                raise InputError(f"{type(pipe).__name__} cannot be run with these arguments: {error}") from error
            notes.append(f"not run ({type(error).__name__}: {error}); structure and parameters only; give call=")
    if measured is None:
        infos = tuple(denoiser_info(d) for d in denoisers)
        shares = tuple(component_share(n, m) for n, m in networks.items())
        return Inspection(type(pipe).__name__, infos, shares, {}, None, tuple(notes))
    counted, timed, layouts, phases = measured
    infos = tuple(
        denoiser_info(
            d,
            _roles(counted.flops, d.component),
            _roles(timed.seconds, d.component),
            _attention(counted, layouts, d),
            timed.calls[d.component],
        )
        for d in denoisers
    )
    shares = tuple(
        component_share(
            name,
            module,
            sum(n for (component, _), n in counted.flops.items() if component == name),
            sum(s for (component, _), s in timed.seconds.items() if component == name),
        )
        for name, module in networks.items()
    )
    return Inspection(type(pipe).__name__, infos, shares, phases, _in_words(arguments), tuple(notes))


def _measure(
    pipe: Any,
    denoisers: tuple[Denoiser, ...],
    networks: Mapping[str, nn.Module],
    arguments: Mapping[str, Any],
    notes: list[str],
) -> tuple[Ledger, Ledger, Layouts, dict[str, float]]:
    others = {n: m for n, m in networks.items() if n not in {d.component for d in denoisers}}
    device = next(denoisers[0].module.parameters()).device
    bare = isinstance(pipe, nn.Module)

    def once() -> None:
        more = {} if bare or "generator" in arguments else {"generator": torch.Generator().manual_seed(0)}
        with torch.no_grad(), quiet(pipe):
            pipe(**arguments, **more)

    layouts: Layouts = {}
    if any("_diffaccel" in d.module.__dict__ for d in denoisers):
        notes.append("accelerated: the plan's own hooks are on, layouts are in the acceleration's report")
        once()
    else:
        with learning_layouts(denoisers, None if bare else pipe) as layouts:
            once()
    counted = Ledger(denoisers, others, device, timed=False)
    with counted.watching():
        once()
    timed = Ledger(denoisers, others, device, timed=True)
    with timed.watching():
        started = timed.now()
        once()
        ended = timed.now()
    phases = {}
    if not bare and timed.entered is not None and timed.left is not None:
        spans = (timed.entered - started, timed.left - timed.entered, ended - timed.left)
        phases = dict(zip(("text encoding", "denoising", "decoding"), spans, strict=True))
    return counted, timed, layouts, phases


def _networks(pipe: Any, denoisers: tuple[Denoiser, ...]) -> dict[str, nn.Module]:
    if isinstance(pipe, nn.Module):
        return {denoisers[0].component: denoisers[0].module}
    return {n: c for n, c in pipe.components.items() if isinstance(c, nn.Module)}


def short_call(pipe: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a short call: those given, a prompt where one is taken and no embeddings are given, two steps."""
    known = inspect.signature(type(pipe).__call__).parameters
    arguments = dict(given)
    if "num_inference_steps" in known:
        arguments["num_inference_steps"] = _STEPS
    if "prompt" in known and "prompt" not in given and not any("embeds" in name for name in given):
        arguments["prompt"] = _PROMPT
    return arguments


def _roles(counts: Mapping[tuple[str, str], Any], component: str) -> dict[str, Any]:
    return {role: n for (owner, role), n in counts.items() if owner == component}


def _attention(ledger: Ledger, layouts: Layouts, denoiser: Denoiser) -> tuple[AttentionCalls, ...]:
    """Calls of one shape together, per call of the denoiser."""
    roles = {site.name: site.role for site in denoiser.attentions}
    runs = max(ledger.calls[denoiser.component], 1)
    kinds: dict[tuple[Any, ...], tuple[list[str], int]] = {}
    for seen, count in ledger.attention.items():
        if seen.component == denoiser.component:
            role = "cross" if seen.queries != seen.keys else roles.get(seen.site, "attn")
            key = (role, seen.batch, seen.heads, seen.queries, seen.keys, seen.width, seen.masked)
            sites, total = kinds.get(key, ([], 0))
            kinds[key] = ([*sites, seen.site], total + count)
    found = []
    for (role, batch, heads, queries, keys, width, masked), (sites, total) in kinds.items():
        layout = layouts.get((denoiser.component, queries), "") if role != "cross" else ""
        found.append(
            AttentionCalls(tuple(sites), role, round(total / runs), batch, heads, queries, keys, width, masked, layout)
        )
    return tuple(found)


def _in_words(arguments: Mapping[str, Any]) -> str:
    def short(value: Any) -> str:
        return f"tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else f"{value!r:.60}"

    return ", ".join(f"{name}={short(value)}" for name, value in arguments.items())

"""How much the output suffers when one site is quantized: by site, candidate scheme and range of steps.

Three ways, each dearer and truer than the one before. ``local``: the error of the site's own output. ``scaled``: the
coarsest candidate is put in place at one site after the other and the denoiser's output compared; the others follow by
their local errors, since the way from a site to the output is the same for all. ``full``: every candidate in place.
Errors of independent roundings add up as energies, which is what allocation counts on.

Where both halves of guidance share a call, errors are those of what guidance makes of them: rounded weights err alike
in both halves, rounded activations do not, and are amplified (25 times at a scale of 4).

How much an error at some of the steps shows in the picture is measured on the pipeline's own final latents: with the
coarsest candidate at all sites in one range of steps after the other, as mean of decibels over requests. Measured with
the finest, the last steps of the bundled image pipeline seemed to count 200 times as much as the others: what plans
then kept for them was missing earlier, where trajectories tip over into other pictures.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.clock import Call
from diffaccel.denoiser import Site, select
from diffaccel.errors import PlanError
from diffaccel.plan import Artefacts, in_steps
from diffaccel.quantization.channels import channels_of
from diffaccel.quantization.eligible import form_at, parameter_users, why_not
from diffaccel.quantization.linear import QuantizedLinear, become_plain, become_quantized
from diffaccel.quantization.prepare import prepare, runs_of
from diffaccel.quantization.replay import Recorded, Recorder, at_work, errors, guided
from diffaccel.quantization.schedule import Schedule, Steps
from diffaccel.quantization.section import Quantize
from diffaccel.quantization.sensitivities import Sensitivities
from diffaccel.technique import Context

WAYS = ("local", "scaled", "full")
_ROWS = 512
"""Tokens of a site's input that its local error is taken from."""
Advance = Callable[[str], None]


@dataclass
class _Local:
    """Of one site: sums over calls, by candidate and range."""

    error: Tensor
    energy: Tensor
    macs: float = 0.0
    seconds: list[list[float]] = field(default_factory=list)


@torch.no_grad()
def measure(
    pipe: Any,
    candidates: Sequence[Quantize],
    requests: Sequence[Mapping[str, Any]],
    *,
    sites: str = Quantize.sites,
    ranges: int = 4,
    way: str = "scaled",
    calls_per_range: int = 1,
    artefacts: Artefacts | None = None,
    in_the_end: bool = True,
    advance: Advance = lambda what: None,
) -> Sensitivities:
    """Try the candidates on a live pipeline, which is left as it was.

    Args:
        candidates: `Quantize` sections whose ``sites`` and ``steps`` do not count.
        requests: arguments of pipeline calls, with a generator each.
        sites: which linears.
        ranges: equal parts of the schedule.
        way: see above.
        calls_per_range: denoiser calls that are made again, per range and request.
        artefacts: of a calibrated plan, for candidates that need it.
        in_the_end: whether to measure how much each range of steps shows in the final latents; else all count alike.
        advance: told of every piece of work done.

    Raises:
        PlanError: no candidate, no linear that can be quantized, or the pipeline made no denoiser call.
    """
    if not candidates or way not in WAYS or ranges < 1:
        raise PlanError(f"measure needs candidates, a way of {', '.join(WAYS)} and ranges >= 1, got {way!r}, {ranges}")
    ordered = tuple(sorted((replace(c, sites=sites, steps=(0.0, 1.0)) for c in candidates), key=_fineness))
    parts = tuple((i / ranges, (i + 1) / ranges) for i in range(ranges))
    artefacts = artefacts or Artefacts()
    with at_work(pipe, artefacts=artefacts) as context:
        users = parameter_users(context.denoisers)
        linears = [s for s in select(context.denoisers, sites, "layers") if isinstance(s.module, nn.Linear)]
        chosen = [s for s in linears if why_not(s.module, users) is None]
        if not chosen:
            raise PlanError(f"sites={sites!r} matches no linear that can be quantized")
        calls, latents = _record(pipe, context, requests, parts, calls_per_range)
        batched = all(len(call.output[0]) == 2 * len(latents[0]) for call in calls)
        guidance = _guidance(pipe, requests) if batched else 1.0
        advance("recorded")
        local = _measure_local(chosen, ordered, calls, context, parts, artefacts, advance, guidance)
        share = torch.stack([local[s].error / local[s].energy.clamp(min=1e-300) for s in chosen])
        error, text = share.clone(), torch.full_like(share, torch.nan)
        tried = {"local": 0, "scaled": 1, "full": len(ordered)}[way]
        for i, site in enumerate(chosen):
            for c in range(tried):
                real, of_text = in_place(
                    site, ordered[c], calls, context, parts, artefacts, batched=batched, guidance=guidance
                )
                if way == "scaled":
                    gain = real / share[i, 0].clamp(min=1e-300)
                    error[i], text[i] = share[i] * gain, share[i] * of_text / share[i, 0].clamp(min=1e-300)
                else:
                    error[i, c], text[i, c] = real, of_text
            advance(site.full_name)
    stored = [[_stored_bytes(s, c, artefacts) for c in ordered] for s in chosen]
    found = Sensitivities(
        tuple(s.full_name for s in chosen),
        tuple(s.role for s in chosen),
        torch.tensor([_weight(s).numel() for s in chosen], dtype=torch.float64),
        ordered,
        parts,
        error,
        text,
        torch.ones(ranges, dtype=torch.float64),
        torch.tensor(stored, dtype=torch.float64),
        torch.tensor([_weight(s).nbytes for s in chosen], dtype=torch.float64),
        torch.tensor([local[s].macs for s in chosen], dtype=torch.float64),
        torch.tensor([[min(t) for t in zip(*local[s].seconds, strict=True)] for s in chosen], dtype=torch.float64),
        way,
    )
    return (
        found
        if ranges == 1 or not in_the_end
        else replace(found, shows=_shows(pipe, found, requests, latents, artefacts, advance))
    )


def in_place(
    site: Site,
    candidate: Quantize,
    calls: Sequence[Recorded],
    context: Context,
    ranges: Sequence[Steps],
    artefacts: Artefacts,
    *,
    batched: bool = False,
    guidance: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Mean errors (output, text) by range, float64 [ranges] each, with one site quantized."""
    with _quantized(site, _schedule(site, candidate), artefacts):
        found = list(errors(calls, context, batched=batched, guidance=guidance))
    return tuple(  # type: ignore[return-value]
        torch.tensor([_mean(values, calls, part) for part in ranges], dtype=torch.float64)
        for values in ([e.output for e in found], [e.text for e in found])
    )


def _mean(values: Sequence[float], calls: Sequence[Recorded], part: Steps) -> float:
    inside = [v for v, call in zip(values, calls, strict=True) if in_steps(call.progress, part)]
    return sum(inside) / len(inside) if inside else float("nan")


def _fineness(candidate: Quantize) -> tuple[float, int, int]:
    scheme = candidate.form().scheme
    return scheme.bits, -(scheme.group or 1 << 20), candidate.low_rank


def _schedule(site: Site, candidate: Quantize) -> Schedule:
    return (((0.0, 1.0), form_at(candidate, site)),)


def _weight(site: Site) -> Tensor:
    weight = site.module._parameters["weight"]
    assert weight is not None
    return weight


@contextmanager
def _quantized(site: Site, schedule: Schedule, artefacts: Artefacts) -> Iterator[QuantizedLinear]:
    layer = site.module
    assert isinstance(layer, nn.Linear)
    weight, forward = layer.weight, layer.__dict__.get("forward")
    tensors = prepare(weight, layer.bias, schedule, channels_of(artefacts, site))
    become_quantized(layer, runs_of(schedule, weight.shape)[0], tensors, weight.dtype)
    assert isinstance(layer, QuantizedLinear)
    try:
        yield layer
    finally:
        become_plain(layer, weight)  # type: ignore[arg-type]
        if forward is not None:
            layer.__dict__["forward"] = forward


def _stored_bytes(site: Site, candidate: Quantize, artefacts: Artefacts) -> int:
    with _quantized(site, _schedule(site, candidate), artefacts) as layer:
        return layer.stored_bytes


def _record(
    pipe: Any, context: Context, requests: Sequence[Mapping[str, Any]], ranges: Sequence[Steps], per_range: int
) -> tuple[list[Recorded], list[Tensor]]:
    """A few calls of each range and request, and the final latents."""
    steps: dict[int, set[int]] = {}  # length of the schedule -> steps that are recorded

    def wanted(call: Call) -> bool:
        assert call.steps is not None
        if call.steps not in steps:
            middle = [
                (a + (b - a) * (i + 0.5) / per_range) * (call.steps - 1) for a, b in ranges for i in range(per_range)
            ]
            steps[call.steps] = {round(m) for m in middle}
        return call.step in steps[call.steps]

    recorder = Recorder(context, wanted)
    try:
        latents = [_latents(pipe, request) for request in requests]
    finally:
        recorder.remove()
    if not recorder.calls:
        raise PlanError(f"{type(pipe).__name__} never called its denoiser; check the call's arguments")
    return recorder.calls, latents


def _guidance(pipe: Any, requests: Sequence[Mapping[str, Any]]) -> float:
    """The scale that the requests ask for, or the pipeline's own; 1 where there is none."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get("guidance_scale")
    default = 1.0 if parameter is None or not isinstance(parameter.default, int | float) else parameter.default
    scales = [float(request.get("guidance_scale", default)) for request in requests]
    return sum(scales) / len(scales)


def _latents(pipe: Any, request: Mapping[str, Any]) -> Tensor:
    request = dict(request)
    if isinstance(generator := request.get("generator"), torch.Generator):
        request["generator"] = torch.Generator(generator.device)
        request["generator"].set_state(generator.get_state())
    output = pipe(**{**request, "output_type": "latent", "return_dict": False})
    return output[0].detach().float()


def _measure_local(
    sites: Sequence[Site],
    candidates: Sequence[Quantize],
    calls: Sequence[Recorded],
    context: Context,
    ranges: Sequence[Steps],
    artefacts: Artefacts,
    advance: Advance,
    guidance: float,
) -> dict[Site, _Local]:
    """Errors of every site's own output, all sites in one pass over the calls."""
    shape = (len(candidates), len(ranges))
    found = {s: _Local(torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)) for s in sites}
    inputs: dict[Site, list[tuple[int, Tensor]]] = {s: [] for s in sites}
    now = 0

    def keep(site: Site) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            halves = 1 if guidance == 1 or args[0].shape[0] % 2 else 2
            rows = args[0].detach().reshape(halves, -1, args[0].shape[-1])
            found[site].macs = max(found[site].macs, float(rows[..., 0].numel() * _weight(site).numel()))
            inputs[site].append((now, rows[:, :: max(1, halves * rows.shape[1] // _ROWS)].clone()))

        return hook

    handles = [site.module.register_forward_pre_hook(keep(site)) for site in sites]
    try:
        for call in calls:
            now = next(i for i, part in enumerate(ranges) if in_steps(call.progress, part))
            list(errors([call], context))
    finally:
        for handle in handles:
            handle.remove()
    for site in sites:
        layer, of = site.module, found[site]
        expected = [layer(rows) for _, rows in inputs[site]]
        for c, candidate in enumerate(candidates):
            with _quantized(site, _schedule(site, candidate), artefacts):
                layer(inputs[site][0][1])  # measures its kernels
                seconds = []
                for (part, rows), y in zip(inputs[site], expected, strict=True):
                    begun = _now(rows)
                    got = layer(rows)
                    seconds.append(_now(rows) - begun)
                    scale = guidance if len(rows) == 2 else 1.0
                    of.error[c, part] += float(guided(got.double() - y.double(), scale).square().sum())
                    of.energy[c, part] += float(guided(y.double(), scale).square().sum())
            of.seconds = [[*row, s] for row, s in zip(of.seconds or [[] for _ in seconds], seconds, strict=True)]
        inputs[site].clear()
        advance(site.full_name)
    return found


def _now(on: Tensor) -> float:
    if on.is_cuda:
        torch.cuda.synchronize(on.device)
    return time.perf_counter()


def _shows(
    pipe: Any,
    found: Sensitivities,
    requests: Sequence[Mapping[str, Any]],
    latents: Sequence[Tensor],
    artefacts: Artefacts,
    advance: Advance,
) -> Tensor:
    """Error of the final latents over that of the denoiser's outputs, for each range of steps."""
    coarsest = 0
    ratios = []
    for r, part in enumerate(found.ranges):
        with at_work(pipe, [replace(found.candidates[coarsest], steps=part)], artefacts):
            after = [_latents(pipe, request) for request in requests]
        shares = [float((a - b).square().sum() / a.square().sum()) for a, b in zip(latents, after, strict=True)]
        share = math.exp(sum(math.log(max(share, 1e-30)) for share in shares) / len(shares))
        ratios.append(share / max(float(found.error[:, coarsest, r].nan_to_num().sum()), 1e-300))
        advance(f"steps {part[0]:g} to {part[1]:g}")
    return torch.tensor(ratios, dtype=torch.float64)

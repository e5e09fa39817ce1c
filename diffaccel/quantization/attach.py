"""Puts quantized linears in place of a denoiser's linears, and the originals back."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.clock import Call
from diffaccel.denoiser import Site, select
from diffaccel.errors import PlanError
from diffaccel.kernels._candidates import choices
from diffaccel.originals import Originals, Parked
from diffaccel.quantization.channels import channels_of
from diffaccel.quantization.eligible import form_at, parameter_users, refuse_fused_lora, refuse_group_offload, why_not
from diffaccel.quantization.layer import QuantizedLayer, refuse_loading
from diffaccel.quantization.linear import become_plain, become_quantized
from diffaccel.quantization.policy import LoadedPhase, StepPolicy, policy_of
from diffaccel.quantization.prepare import learnt_key, prepare, runs_of
from diffaccel.quantization.quantizer import mark_quantized
from diffaccel.quantization.rotation import block_size
from diffaccel.quantization.saved import saved_steps
from diffaccel.quantization.schedule import Phase, Schedule, Steps, schedule_of
from diffaccel.quantization.scheme import Form, Scheme
from diffaccel.quantization.section import Quantize
from diffaccel.quantization.skips import skip_boundaries
from diffaccel.quantization.static import follow_limits
from diffaccel.quantization.worth import speedup, typical_tokens
from diffaccel.report import TechniqueReport
from diffaccel.root import Compute
from diffaccel.technique import Context

_ALWAYS: Steps = (0.0, 1.0)


@dataclass
class Resolved:
    """Which linears are quantized, in which form at which steps, and what is left alone: reason -> full names."""

    sections: Sequence[Quantize]
    sites: dict[Site, Schedule]
    skipped: dict[str, list[str]]


def resolve(sections: Sequence[Quantize], context: Context) -> Resolved:
    """Find the plain linears that the sections mean; where several match a site, the last one wins at its steps.

    Raises:
        PlanError: a pattern matches no layer, or none that can be quantized, or group offloading is on, or what
            calibration measures is missing.
    """
    for denoiser in context.denoisers:
        refuse_group_offload(denoiser)
        refuse_fused_lora(denoiser)
    users = parameter_users((*context.denoisers, *context.encoders))
    boundaries = {
        f"{denoiser.component}.{name}": channels
        for denoiser in context.denoisers
        for name, channels in skip_boundaries(denoiser.module).items()
    }
    matches: defaultdict[Site, list[tuple[Steps, Form]]] = defaultdict(list)
    skipped: defaultdict[str, list[str]] = defaultdict(list)
    for section in sections:
        usable = False
        for site in select(context.denoisers, section.sites, "layers", context.encoders):
            _check_encoder(section, site, context)
            reason = why_not(site.module, users, section)
            if reason is None:
                _check_calibrated(section, site, context)
                matches[site].append((section.steps, form_at(section, site, boundaries)))
                usable = True
            elif site.full_name not in skipped[reason]:
                skipped[reason].append(site.full_name)
        if not usable:
            reasons = "; ".join(f"{reason} ({len(names)})" for reason, names in skipped.items())
            raise PlanError(f"Quantize(sites={section.sites!r}) matches no linear that can be quantized: {reasons}")
    return Resolved(sections, {site: schedule_of(found) for site, found in matches.items()}, dict(skipped))


def _check_encoder(section: Quantize, site: Site, context: Context) -> None:
    encoder = next((encoder for encoder in context.encoders if encoder.component == site.component), None)
    if encoder is None:
        return
    if section.steps != _ALWAYS:
        raise PlanError(
            f"Quantize(sites={section.sites!r}, steps={section.steps}) matches {site.full_name}, which runs before the "
            "first step; give it a section of its own without steps"
        )
    refuse_group_offload(encoder)
    refuse_fused_lora(encoder)


def _check_calibrated(section: Quantize, site: Site, context: Context) -> None:
    form = form_at(section, site)
    static = form.scheme.activations == "static"
    if form.conditioning.learnt:
        known = channels_of(context.artefacts, site)
        if known is None or not known.learnt(learnt_key(form)):
            raise PlanError(
                f"Quantize(rounding='learnt'): this plan holds no such weight of {site.full_name}; get it by "
                "plan = diffaccel.learn_rounding(pipe, plan, prompts=[...]), or use rounding='nearest'"
            )
    if not section.needs_calibration or not (static or isinstance(site.module, nn.Linear)):
        return
    channels = channels_of(context.artefacts, site)
    if static and (channels is None or not channels.limited):
        raise PlanError(
            f"Quantize(activations='static') needs the range of {site.full_name}'s input, which this plan has not; get "
            "it by plan = diffaccel.calibrate(pipe, plan, prompts=[...]), or use activations='int8'"
        )
    if not isinstance(site.module, nn.Linear):
        return
    turned = section.balance is not None and section.rotate and section.first == "rotate"
    unturned = turned and channels is not None and not channels.rotated and block_size(site.module.in_features)
    if channels is None or not channels.measured or unturned:
        raise PlanError(
            f"Quantize(balance=..., protect=...) needs what calibration measures, which this plan has none of for "
            f"{site.full_name}; get it by plan = diffaccel.calibrate(pipe, plan, prompts=[...])"
        )


def attach(resolved: Resolved, context: Context) -> QuantizedLinears:
    """Convert one layer at a time."""
    originals = Originals(context.originals, context.undo)
    phases = _follow_phases(resolved, context)
    notes = _slower(resolved, context)
    layers: dict[Site, QuantizedLayer] = {}
    facts: Counter[str] = Counter()
    for site, schedule in resolved.sites.items():
        layer: Any = site.module
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        facts["bytes_before"] += weight.nbytes
        keep = any(form is None for _, form in schedule)
        parked = originals.claim(weight, stay=keep)
        with torch.no_grad():
            finite = _is_finite({"weight": weight})  # what is not cannot be decomposed
            tensors = prepare(weight, layer.bias, schedule, channels_of(context.artefacts, site)) if finite else {}
            if not finite or not _is_finite(tensors):
                raise PlanError(
                    f"{site.full_name} holds weights that are not finite; exclude it by sites='... !{site.full_name}'"
                )
            context.undo.callback(_restore, layer, parked, layer.__dict__.get("forward"))
            phase = phases.get((site.component, schedule))
            runs, _ = runs_of(schedule, weight.shape)
            become_quantized(layer, runs, tensors, weight.dtype, parked, phase, keep_original=keep)
            parked.store()
        assert isinstance(layer, QuantizedLayer)
        layers[site] = layer
        facts["bytes_after"] += layer.stored_bytes
    for network in (*context.denoisers, *context.encoders):
        own = {s.name: layer for s, layer in layers.items() if s.component == network.component}
        if own:
            handle = network.module.register_load_state_dict_pre_hook(_LoadGuard(own))
            context.undo.callback(handle.remove)
    follow_limits(layers, context)
    return QuantizedLinears(resolved, context, originals, layers, dict(facts), notes)


def follow_policies(context: Context) -> list[str]:
    """Make models that were loaded with other bits at other steps follow the clock; gives notes that say which."""
    notes = []
    for denoiser in context.denoisers:
        phases = {layer.phase for layer in denoiser.module.modules() if isinstance(layer, QuantizedLayer)}
        loaded = [phase for phase in phases if isinstance(phase, LoadedPhase)]
        for phase in loaded:
            context.undo.callback(phase.release)
            context.root(denoiser).listeners.append(phase.follow)
        notes += [f"{denoiser.component} follows its steps: {words}" for words in {phase.words for phase in loaded}]
    return notes


def _follow_phases(resolved: Resolved, context: Context) -> dict[tuple[str, Schedule], Phase]:
    """By component and schedule; each follows its denoiser's calls from now on."""
    phases: dict[tuple[str, Schedule], Phase] = {}
    for denoiser in context.denoisers:
        for schedule in {r for s, r in resolved.sites.items() if s.component == denoiser.component and len(r) > 1}:
            phase = Phase(runs_of(schedule, (0, 0))[1])  # which run is which does not depend on the width
            phases[denoiser.component, schedule] = phase
            context.root(denoiser).listeners.append(_follow(phase))
    return phases


class QuantizedLinears:
    """Quantized linears at work; see `diffaccel.technique.Attached`."""

    def __init__(
        self,
        resolved: Resolved,
        context: Context,
        originals: Originals,
        layers: dict[Site, QuantizedLayer],
        bytes_: dict[str, int],
        notes: list[str],
    ) -> None:
        self._resolved, self._context, self._originals = resolved, context, originals
        self._layers, self._bytes, self._notes = layers, bytes_, notes

    def report(self) -> TechniqueReport:
        """Sites, bytes of their weights before and after, activation bits, the kernel per shape with its speed."""
        notes = [*self._notes]
        for reason, names in self._resolved.skipped.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            notes.append(f"left alone: {', '.join(names[:3])}{more}: {reason}")
        ranged = sum(1 for layer in self._layers.values() if "original" in layer._buffers)
        if ranged:
            notes.append(f"{ranged} sites have a step range and keep their originals on the device, also after bake()")
        bits = sorted({layer.bits for layer in self._layers.values() if layer.integer_activations})
        if 7 in bits:
            notes.append("activations have 7 bits: without VNNI this CPU's int8 kernels saturate at 8")
        if self._lacks_fp8_product():
            notes.append("fp8 activations are not rounded: this device has no fp8 product, so weights are dequantised")
        facts: dict[str, Any] = {**self._bytes, "schemes": self._schemes()}
        if bits:
            facts["activation_bits"] = bits[0] if len(bits) == 1 else bits
        if weight_only := sum(layer.weight_only for layer in self._layers.values()):
            facts["weight_only"] = weight_only
        if kernels := self._kernels():
            facts["kernels"] = kernels
            if bits and any(choice.startswith("dense") for choice in kernels.values()):
                notes.append("where the kernel is dense, which is the fastest there, activations are not rounded")
        settings = "; ".join(_describe(s) for s in self._resolved.sections)
        return TechniqueReport("quantization", settings, len(self._layers), facts, notes)

    def bake(self) -> None:
        """Let the originals go, and make ``save_pretrained`` save what remains so that ``from_pretrained`` loads it."""
        for layer in self._layers.values():
            if "original" not in layer._buffers:
                layer.parked = None
        self._originals.discard()
        for network in (*self._context.denoisers, *self._context.encoders):
            if any(s.component == network.component and layer.parked is None for s, layer in self._layers.items()):
                mark_quantized(network.module, self._resolved.sections[-1], self._policy(network.component))

    def _policy(self, component: str) -> StepPolicy | None:
        """By which it is saved, with a note for the report."""
        steps = self._context.clock.steps
        schedules = [schedule for site, schedule in self._resolved.sites.items() if site.component == component]
        policy, reason = policy_of(schedules, steps)
        if policy is not None:
            self._notes.append(
                f"{component} is saved with a step policy: activations in 16 bits in the first {policy.first} and last "
                f"{policy.last} of {steps} steps"
            )
        elif reason:
            layers = [layer for site, layer in self._layers.items() if site.component == component]
            baked = [layer for layer in layers if layer.parked is None and layer.phase is not None]
            lost = sum(1 for layer in baked if not saved_steps(layer))
            kept = "the bits of its steps" if not lost else f"{lost} layers in their widest form for all steps"
            self._notes.append(f"{component} is saved with {kept}; a diffusion_step_policy would not fit: {reason}")
        return policy

    def _lacks_fp8_product(self) -> bool:
        layers = self._layers.values()
        devices = {x.device for x in layers if any(run.scheme.activations == "fp8" for run in x.runs)}
        if all(device.type == "cuda" for device in devices) and torch.cuda.is_available():
            return any(torch.cuda.get_device_capability(device) < (8, 9) for device in devices)
        return bool(devices)

    def _schemes(self) -> dict[str, int]:
        """Sites by what they run, such as W8A8; with "or" between what they run at different steps."""
        count: Counter[str] = Counter()
        for schedule in self._resolved.sites.values():
            count[" or ".join(dict.fromkeys("float" if form is None else form.label for _, form in schedule))] += 1
        return dict(count)

    def _kernels(self) -> dict[str, str]:
        """What runs, by operator (none named: int8_linear), tokens and sizes, with its speed beside the float layer."""
        shapes = {layer.weight_shape for layer in self._layers.values()}
        sizes = {(f"K{shape[1]}", f"N{shape[0]}") for shape in shapes if len(shape) == 2}
        used = {}
        for operator in ("int8_linear", "int8_static_linear", "int4_linear", "fp8_linear"):
            for choice in choices(operator):
                words = choice.shape.split()
                if any(K in words and N in words for K, N in sizes):
                    factor = "" if choice.speedup is None else f" {choice.speedup:.2f}x"
                    prefix = (
                        "" if operator == "int8_linear" else f"{operator.removesuffix('_linear').replace('_', ' ')} "
                    )
                    used[prefix + " ".join(words[1:4])] = f"{choice.name}{factor}"
        convolutions = {f"C{shape[1]}_N{shape[0]}_k{shape[2]}x{shape[3]}" for shape in shapes if len(shape) == 4}
        for choice in choices("int8_conv"):
            words = choice.shape.split()
            if any(words[2].startswith(kind) for kind in convolutions):
                factor = "" if choice.speedup is None else f" {choice.speedup:.2f}x"
                used[" ".join(words[1:3])] = f"{choice.name}{factor}"
        return used


def _describe(section: Quantize) -> str:
    steps = "" if section.steps == _ALWAYS else f" for progress {section.steps[0]:g} to {section.steps[1]:g}"
    group = f" in groups of {section.group}" if section.group else ""
    conditioning = section.form().conditioning.label
    after = f", {conditioning}," if conditioning else ""
    return f"{section.weights} weights{group}, {section.activations} activations{after} on {section.sites}{steps}"


def _slower(resolved: Resolved, context: Context) -> list[str]:
    """One warning, and a note for the report, where int8 measures slower than the float linears here."""
    notes = []
    for denoiser in (*context.denoisers, *context.encoders):
        linears = [
            s.module
            for s, schedule in resolved.sites.items()
            if s.component == denoiser.component and _runs_w8a8(schedule) and isinstance(s.module, nn.Linear)
        ]
        tokens = typical_tokens(denoiser)
        factor = None if not linears or _is_fake(linears) else speedup(linears, tokens)
        if factor is not None and factor < 1:
            note = f"{denoiser.component}: int8 linears measure {factor:.2f}x of the float speed here ({tokens} tokens)"
            warnings.warn(f"diffaccel: {note}; applied as asked", stacklevel=4)
            notes.append(note)
    return notes


def _runs_w8a8(schedule: Schedule) -> bool:
    return any(form is not None and form.scheme == Scheme() for _, form in schedule)


def _follow(phase: Phase) -> Any:
    def listener(call: Call, arguments: Mapping[str, Any], compute: Compute) -> None:
        phase.at(call.progress)

    return listener


def _restore(layer: nn.Module, parked: Parked, forward: Any) -> None:
    if isinstance(layer, QuantizedLayer):
        device, dtype = layer.device, layer.weight_dtype
        become_plain(layer, parked.restore(device, dtype))
        if forward is not None and "forward" not in layer.__dict__:
            layer.__dict__["forward"] = forward


def _is_fake(linears: Sequence[nn.Linear]) -> bool:
    return any(isinstance(m.weight, torch._subclasses.FakeTensor) for m in linears)


def _is_finite(tensors: Mapping[str, Tensor]) -> bool:
    floating = [t for t in tensors.values() if t.is_floating_point() and t.itemsize > 1]
    return all(isinstance(t, torch._subclasses.FakeTensor) or bool(t.isfinite().all()) for t in floating)


class _LoadGuard:
    """Refuses to load weights into quantized layers before the first weight of the model is loaded."""

    def __init__(self, layers: dict[str, QuantizedLayer]) -> None:
        self._layers = layers

    def __call__(self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        for name, layer in self._layers.items():
            for wrapped in ("", "base_layer."):  # LoRA may have come since
                refuse_loading(layer, state_dict, f"{prefix}{name}.{wrapped}")

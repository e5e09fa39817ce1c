"""Which linears can be quantized, and why the others cannot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from diffaccel.denoiser import Denoiser, Site
from diffaccel.errors import PlanError
from diffaccel.quantization.layer import QuantizedLayer
from diffaccel.quantization.scheme import Form
from diffaccel.quantization.section import Quantize
from diffaccel.sites import SitePattern

_MIN_FEATURES = 16
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def why_not(
    layer: nn.Module, users: Mapping[int, Sequence[str]], settings: Quantize | None = None, *, loaded: bool = True
) -> str | None:
    """Why a layer cannot be quantized, or None.

    Args:
        layer: any linear or convolution.
        users: from `parameter_users`.
        settings: what it is to become.
        loaded: False while a checkpoint is still to be read, when every weight is on the meta device.
    """
    if isinstance(layer, QuantizedLayer):
        return "already quantized by diffaccel"
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        return f"a {type(layer).__name__}: only linears and 2D convolutions are quantized"
    if type(layer) not in (nn.Linear, nn.Conv2d):
        return f"a {type(layer).__name__} instead of a plain nn.Linear or nn.Conv2d"
    if isinstance(layer, nn.Conv2d):
        if settings is not None and settings.weights != "int8":
            return "convolutions are quantized to int8 only"
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return f"a convolution with padding {layer.padding!r} of {layer.padding_mode}"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is computed at every call (weight_norm or a parametrization)"
    if not _is_ordinary(weight):
        return f"its weight is already quantized ({type(weight.data).__name__})"
    if loaded and weight.device.type == "meta":
        return (
            "its weight is not in memory (sequential offload): accelerate first, then enable_sequential_cpu_offload()"
        )
    if weight.dtype.is_floating_point and weight.dtype.itemsize == 1:
        return f"it is stored in {weight.dtype} (layerwise casting): load the model again without that"
    if weight.dtype not in _FLOATS:
        return f"its weight has dtype {weight.dtype}"
    if hooks := _hooks(layer):
        return f"its forward is already replaced ({hooks}); accelerate first, then add this"
    if len(sharing := users.get(id(weight), ())) > 1:
        return f"its weight is shared by {' and '.join(sharing)}"
    if min(_features(layer)) < _MIN_FEATURES:
        kind = "features" if isinstance(layer, nn.Linear) else "channels of a convolution"
        return f"fewer than {_MIN_FEATURES} input or output {kind}"
    return None


def form_at(settings: Quantize, site: Site, boundaries: Mapping[str, int] | None = None) -> Form:
    """What ``site`` gets. Conditioning is for linears.

    Args:
        boundaries: of `skips.skip_boundaries`, by full name, for settings that ask for ``split``.
    """
    form = settings.form(float_activations=keeps_activations(settings, site))
    if isinstance(site.module, nn.Linear):
        return form
    split = (boundaries or {}).get(site.full_name, 0) if settings.split else 0
    return Form(replace(form.scheme, split=split))


def _features(layer: nn.Linear | nn.Conv2d) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels // layer.groups, layer.out_channels


def keeps_activations(settings: Quantize, site: Site) -> bool:
    """Whether only the weights of ``site`` are quantized."""
    pattern = settings.float_activations
    return bool(pattern) and SitePattern(pattern).matches(site.role, site.component, site.name)


def _is_ordinary(weight: nn.Parameter) -> bool:
    return type(weight.data) in (torch.Tensor, torch._subclasses.FakeTensor) and type(weight) in (
        nn.Parameter,
        torch._subclasses.FakeTensor,
    )


def _hooks(layer: nn.Linear | nn.Conv2d) -> str:
    """Who replaced ``layer.forward``; empty where nobody did, or where removed hooks left the class's own behind."""
    forward = layer.__dict__.get("forward")
    if forward is None or getattr(forward, "__func__", None) is type(layer).forward:
        return ""
    registry = getattr(layer, "_diffusers_hook", None)
    names = list(getattr(registry, "hooks", {}))
    if hook := getattr(layer, "_hf_hook", None):
        names.append(type(hook).__name__)
    return ", ".join(names) or "by something unknown"


def refuse_group_offload(denoiser: Denoiser) -> None:
    """Raise PlanError where diffusers already moves this denoiser's weights to and fro."""
    for module in denoiser.module.modules():
        if any("group_offload" in name for name in getattr(getattr(module, "_diffusers_hook", None), "hooks", {})):
            raise PlanError(
                f"group offloading is already on for {denoiser.component}, and keeps lists of the weights that "
                "quantization replaces; accelerate first, then enable_group_offload()"
            )


def refuse_fused_lora(denoiser: Denoiser) -> None:
    """Raise PlanError where a LoRA is fused into a weight and still loaded: unfusing it later would fail halfway."""
    for name, module in denoiser.module.named_modules():
        if "base_layer" in module._modules and getattr(module, "merged", False):
            raise PlanError(
                f"{denoiser.component}.{name} has a LoRA that is fused and still loaded; call unload_lora_weights(), "
                "which keeps what is fused, or unfuse_lora(), then quantize"
            )


def parameter_users(denoisers: Sequence[Denoiser]) -> dict[int, list[str]]:
    """id of a parameter -> full names of the places that hold it."""
    users: defaultdict[int, list[str]] = defaultdict(list)
    for denoiser in denoisers:
        for name, module in denoiser.module.named_modules():
            for own, parameter in module._parameters.items():
                if parameter is not None:
                    users[id(parameter)].append(f"{denoiser.component}.{name}.{own}")
    return users

"""What a calibrated plan was made for, so that it is refused on another model and warned about on other weights."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from diffaccel.denoiser import Denoiser
from diffaccel.errors import PlanError

_SAMPLE_BYTES = 4096


def plan_key(denoisers: Sequence[Denoiser]) -> dict[str, Any]:
    """The identity of these denoisers: class, config, head counts and a weights fingerprint each, and the versions."""
    parameter = next(denoisers[0].module.parameters())
    return {
        "denoisers": {
            d.component: {
                "class": type(d.module).__name__,
                "config": config_digest(d.config),
                "heads": list(d.heads),
                "weights": weights_fingerprint(d.module),
            }
            for d in denoisers
        },
        "versions": {name: version(name) for name in ("torch", "diffusers", "diffaccel")},
        "device": parameter.device.type,
    }


def check_key(key: Mapping[str, Any], denoisers: Sequence[Denoiser]) -> list[str]:
    """Refuse a plan for another model; returns what differs without making the plan wrong.

    Raises:
        PlanError: another denoiser class, config or head count.
    """
    ours = plan_key(denoisers)
    notes = []
    for component, wanted in key.get("denoisers", {}).items():
        have = ours["denoisers"].get(component)
        if have is None:
            raise PlanError(
                f"the plan was made for a pipeline with {component} ({wanted['class']}); "
                f"this one has {', '.join(ours['denoisers'])}"
            )
        for field in ("class", "config", "heads"):
            if have[field] != wanted[field]:
                raise PlanError(
                    f"the plan was made for another model: {component}'s {field} was {wanted[field]}, here it is "
                    f"{have[field]}; calibrate or tune a plan for this one"
                )
        if have["weights"] != wanted["weights"]:
            notes.append(f"{component}'s weights differ from those the plan was calibrated on")
    for name, wanted in key.get("versions", {}).items():
        if ours["versions"].get(name) != wanted:
            notes.append(f"the plan was calibrated with {name} {wanted}, here is {ours['versions'].get(name)}")
    if key.get("device") != ours["device"]:
        notes.append(f"the plan was calibrated on {key.get('device')}, here is {ours['device']}")
    for note in notes:
        warnings.warn(f"diffaccel: {note}", stacklevel=3)
    return notes


def config_digest(config: Mapping[str, Any]) -> str:
    """Digest of a diffusers config without private keys and without what quantization adds."""
    public = {k: v for k, v in config.items() if not k.startswith("_") and k != "quantization_config"}
    return hashlib.sha256(json.dumps(public, sort_keys=True, default=str).encode()).hexdigest()[:16]


def weights_fingerprint(module: nn.Module) -> str:
    """Digest of every parameter's name, shape and dtype, and of its first 4 KiB where it has data."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        if parameter.device.type != "meta" and type(parameter.data) is torch.Tensor:
            sample = parameter.detach().reshape(-1)[: _SAMPLE_BYTES // parameter.element_size()]
            digest.update(sample.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]

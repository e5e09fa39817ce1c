"""LoRA adapters by peft: put on, and merged into the weights for good."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffaccel.denoiser import Denoiser, select
from diffaccel.errors import MissingPackageError
from diffaccel.reshape import put, role_of, set_role

_NAME = "distilled"


def add_lora(denoiser: Denoiser, rank: int, sites: str, seed: int) -> list[nn.Parameter]:
    """Adapters of ``rank`` on the linears that ``sites`` names; gives what is to be trained.

    They start as zero, so that nothing changes yet.

    Raises:
        MissingPackageError: peft is not installed.
        PlanError: ``sites`` matches nothing.
    """
    peft = _peft()
    names = [s.name for s in select([denoiser], sites, "layers") if type(s.module) is nn.Linear]
    denoiser.module.requires_grad_(False)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names, init_lora_weights=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, denoiser.module, adapter_name=_NAME)
    trained = [p for n, p in denoiser.module.named_parameters() if "lora_" in n]
    for parameter in trained:
        parameter.requires_grad_(True)
    return trained


def merge_lora(model: nn.Module) -> None:
    """Add every adapter to its linear, and leave no trace of it."""
    for _, layer in _adapted(model):
        layer.merge()
    drop_lora(model)


def drop_lora(model: nn.Module) -> None:
    """Put the linears back as they now are."""
    for name, layer in _adapted(model):
        base = layer.get_base_layer()
        set_role(base, role_of(layer) or role_of(base))
        put(model, name, base)
    model.__dict__.pop("peft_config", None)


def _adapted(model: nn.Module) -> list[tuple[str, Any]]:
    """The linears with adapters of ours, by name."""
    return [(n, m) for n, m in model.named_modules() if _NAME in getattr(m, "lora_A", {})]


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise MissingPackageError("LoRA needs peft: pip install 'diffaccel[lora]'") from None
    return peft

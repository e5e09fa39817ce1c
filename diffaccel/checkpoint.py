"""The state of an optimisation in one file, written so that a kill leaves the one before."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffaccel.errors import InputError


def save_state(
    file: Path,
    identity: str,
    step: int,
    parameters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    more: Mapping[str, Tensor] | None = None,
) -> None:
    """Write ``parameters``, in their order, what the optimizer (Adam) knows of each, and ``more``."""
    tensors = {f"more.{name}": tensor for name, tensor in (more or {}).items()}
    for i, parameter in enumerate(parameters):
        tensors[f"{i}.value"] = parameter.detach()
        tensors |= {f"{i}.{name}": value for name, value in optimizer.state[parameter].items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    copies = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}  # shared memory is refused
    save_file(copies, partial, {"state": json.dumps([identity, step])})
    os.replace(partial, file)


def load_state(
    file: Path, identity: str, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, Tensor]]:
    """Put back what `save_state` wrote; returns its step and ``more``, 0 and nothing where there is no file.

    Raises:
        InputError: the file is damaged, or was written for something else (another ``identity``).
    """
    if not file.exists():
        return 0, {}
    try:
        with safe_open(file, framework="pt") as content:
            found, step = json.loads((content.metadata() or {})["state"])
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(f"{file} is damaged ({error}); delete it to begin again") from None
    if found != identity:
        raise InputError(f"{file} was written with other settings, data or another model; choose another folder")
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.copy_(tensors.pop(f"{i}.value"))
            own = {n.partition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{i}.")}
            # Adam keeps its count of steps on the CPU.
            optimizer.state[parameter] = {n: t if n == "step" else t.to(parameter.device) for n, t in own.items()}
    return int(step), {n.removeprefix("more."): t for n, t in tensors.items() if n.startswith("more.")}

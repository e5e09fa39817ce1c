"""The state of a small optimisation in one file, written so that a kill leaves the one before."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffaccel.errors import PlanError


def save_state(
    file: Path, identity: str, step: int, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Write ``parameters``, in their order, and what the optimizer (Adam) knows of each."""
    tensors = {}
    for i, parameter in enumerate(parameters):
        tensors[f"{i}.value"] = parameter.detach()
        tensors |= {f"{i}.{name}": value for name, value in optimizer.state[parameter].items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    save_file({n: t.contiguous() for n, t in tensors.items()}, partial, {"state": json.dumps([identity, step])})
    os.replace(partial, file)


def load_state(file: Path, identity: str, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Put back what `save_state` wrote; returns its step, 0 where there is no file.

    Raises:
        PlanError: the file is damaged, or was written for something else (another ``identity``).
    """
    if not file.exists():
        return 0
    try:
        with safe_open(file, framework="pt") as content:
            found, step = json.loads((content.metadata() or {})["state"])
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise PlanError(f"{file} is damaged ({error}); delete it to begin again") from None
    if found != identity:
        raise PlanError(f"{file} was written with other settings, prompts or another model; choose another folder")
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.copy_(tensors.pop(f"{i}.value"))
            names = [n for n in tensors if n.startswith(f"{i}.")]
            optimizer.state[parameter] = {n.partition(".")[2]: tensors[n] for n in names}
    return int(step)

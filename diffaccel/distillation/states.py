"""Calls of a denoiser with what the teacher gave, on disk: what a student learns from.

A folder holds a file for each run of the teacher's pipeline. Runs that are there are not made again, so recording can
be interrupted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils import _pytree as pytree

from diffaccel.errors import InputError


@dataclass
class State:
    """One call: its keyword arguments, what is wanted of the student, and perhaps the data's own answer.

    ``timestep`` names the argument that carries the time.
    """

    arguments: dict[str, Any]
    targets: list[Tensor]
    timestep: str | None = None
    answers: list[Tensor] = field(default_factory=list)


def save_run(file: Path, states: Sequence[State], identity: str) -> None:
    """Write the states of one run; tensors that several have in common are written once.

    Raises:
        InputError: an argument is neither tensor, number, text, nor a list or dict of these.
    """
    tensors: dict[str, Tensor] = {}
    described = []
    for state in states:
        content = {"arguments": state.arguments, "targets": state.targets, "answers": state.answers}
        leaves, spec = pytree.tree_flatten(content)
        entry = [_place(leaf, tensors) for leaf in leaves]
        described.append({"leaves": entry, "spec": pytree.treespec_dumps(spec), "timestep": state.timestep})
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    save_file(tensors, partial, {"states": json.dumps(described), "identity": identity})
    os.replace(partial, file)


def load_run(file: Path, identity: str) -> list[State]:
    """What `save_run` wrote.

    Raises:
        InputError: the file is damaged or of another recording.
    """
    try:
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118  (not a dict)
        described = json.loads(metadata["states"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(f"{file} is damaged ({error}); delete it, and it is recorded again") from None
    if metadata["identity"] != identity:
        raise InputError(f"{file} was recorded with another teacher, prompts or settings; choose another folder")
    states = []
    for entry in described:
        leaves = [tensors[leaf["tensor"]] if "tensor" in leaf else leaf["value"] for leaf in entry["leaves"]]
        content = pytree.tree_unflatten(leaves, pytree.treespec_loads(entry["spec"]))
        states.append(State(content["arguments"], content["targets"], entry["timestep"], content["answers"]))
    return states


def collate(states: Sequence[State]) -> State:
    """Several calls as one: what has a row for each sample is joined, what is the same for all stays.

    Raises:
        InputError: arguments that differ and cannot be joined.
    """
    if len(states) == 1:
        return states[0]
    rows = [state.targets[0].shape[0] for state in states]
    arguments = {
        name: _joined(name, [_with_rows(s, name, n) for s, n in zip(states, rows, strict=True)], rows)
        for name in states[0].arguments
    }
    targets = [torch.cat(parts) for parts in zip(*(s.targets for s in states), strict=True)]
    answers = [torch.cat(parts) for parts in zip(*(s.answers for s in states), strict=True)]
    return State(arguments, targets, states[0].timestep, answers)


def _with_rows(state: State, name: str, rows: int) -> Any:
    """A time without rows gets one for each sample."""
    value = state.arguments[name]
    if name == state.timestep and isinstance(value, Tensor) and value.numel() == 1:
        return value.reshape(1).expand(rows)
    return value


def _joined(name: str, values: Sequence[Any], rows: Sequence[int]) -> Any:
    first = values[0]
    if isinstance(first, Mapping):
        return {key: _joined(f"{name}.{key}", [v[key] for v in values], rows) for key in first}
    if isinstance(first, list | tuple):
        return type(first)(_joined(name, parts, rows) for parts in zip(*values, strict=True))
    if isinstance(first, Tensor):
        if all(
            v.ndim and v.shape[0] == n and v.shape[1:] == first.shape[1:] for v, n in zip(values, rows, strict=True)
        ):
            return torch.cat(list(values))
        if all(torch.equal(v, first) for v in values):
            return first
    elif all(v == first for v in values):
        return first
    raise InputError(f"calls whose {name} differ cannot be learnt from together; use batch=1")


def _place(leaf: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if isinstance(leaf, Tensor):
        leaf = leaf.detach().cpu().contiguous()
        for name, known in tensors.items():
            if known.shape == leaf.shape and known.dtype == leaf.dtype and torch.equal(known, leaf):
                return {"tensor": name}
        name = str(len(tensors))
        tensors[name] = leaf.clone()
        return {"tensor": name}
    if leaf is None or isinstance(leaf, bool | int | float | str):
        return {"value": leaf}
    raise InputError(f"a call's argument is a {type(leaf).__name__}, which cannot be recorded")

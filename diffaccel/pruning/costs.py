"""What units cost: parameters, operations of a call, or seconds measured on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffaccel.denoiser import Denoiser
from diffaccel.originals import Originals
from diffaccel.pruning.budget import Costs
from diffaccel.pruning.groups import Group
from diffaccel.pruning.removal import remove_units

_REPEATS = 7


def costs_of(denoiser: Denoiser, groups: Sequence[Group], budget: str, call: Callable[[], Any]) -> Costs:
    """The costs of ``groups`` in the currency ``budget``; ``call`` runs the denoiser on typical arguments."""
    if budget == "parameters":
        total = sum(p.numel() for p in denoiser.module.parameters())
        return Costs({g.key: float(g.parameters_each) for g in groups}, float(total))
    measure = _operations if budget == "flops" else _seconds
    return _by_removal(denoiser, groups, lambda: measure(denoiser.module, call))


def _by_removal(denoiser: Denoiser, groups: Sequence[Group], measure: Callable[[], float]) -> Costs:
    """A unit costs what half of its group's units save when they are removed, divided by their number.

    Groups of the same kind and size are measured once: in all of them half of the units are removed together.
    """
    total = measure()
    alike: dict[tuple[Any, ...], list[Group]] = {}
    for group in groups:
        alike.setdefault((group.kind, group.units, group.parameters_each), []).append(group)
    each: dict[str, float] = {}
    for family in alike.values():
        # Two heads of every four, say; a block or sub-layer of each family at a time, so that some stay.
        members = family if family[0].stand_in is None else family[::2]
        kept = {g.key: torch.arange(g.units // 2) for g in members}
        lost = sum(g.units - g.units // 2 for g in members)
        with ExitStack() as undo:
            remove_units(denoiser, members, kept, Originals("device", undo), undo)
            saved = total - measure()
        each |= dict.fromkeys((g.key for g in family), max(saved, 0.0) / lost)
    return Costs(each, total)


def _operations(module: nn.Module, call: Callable[[], Any]) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def _seconds(module: nn.Module, call: Callable[[], Any]) -> float:
    """The median of a few calls, after two to warm up."""
    device = next(module.parameters()).device
    taken = []
    for i in range(_REPEATS + 2):
        _wait(device)
        started = time.perf_counter()
        with torch.no_grad():
            call()
        _wait(device)
        if i >= 2:
            taken.append(time.perf_counter() - started)
    return sorted(taken)[_REPEATS // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

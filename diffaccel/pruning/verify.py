"""Whether units can really be cut: tried on one call of the denoiser, with masks and by removal."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from diffaccel.denoiser import Denoiser
from diffaccel.latents import output_tensors
from diffaccel.originals import Originals
from diffaccel.pruning.groups import Group
from diffaccel.pruning.masks import Masks
from diffaccel.pruning.removal import remove_units

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
_COARSE = 5e-2  # for 16-bit models


def cuttable(
    denoiser: Denoiser, groups: Sequence[Group], call: Callable[[], Any]
) -> tuple[tuple[Group, ...], dict[str, str]]:
    """The groups from which units can be removed such that what is left computes what the masks say.

    Structure tells which rows and columns go together, but not what a forward does with sizes: a rotation over all
    heads at once (LTX), a mask made for a fixed number of them (Kandinsky's prior). So every kind of group is cut once.

    Args:
        groups: of ``denoiser``.
        call: runs the denoiser once on fixed arguments.

    Returns:
        Those that pass, and for the others, by key, what went wrong.
    """
    alike: defaultdict[tuple[Any, ...], list[Group]] = defaultdict(list)
    for group in groups:
        if group.units > 1 or group.stand_in is not None:
            alike[_likeness(group)].append(group)
    refused: dict[str, str] = {}
    fine: set[str] = set()

    def sort_out(families: list[list[Group]]) -> None:
        members = [g for family in families for g in family]
        one_less = {g.key: torch.arange(g.units - 1) for g in members}
        reason = mismatch(denoiser, members, one_less, call)
        if reason is None:
            fine.update(g.key for g in members)
        elif len(families) == 1:
            refused.update(dict.fromkeys((g.key for g in members), reason))
        else:
            middle = len(families) // 2
            sort_out(families[:middle])
            sort_out(families[middle:])

    if alike:
        sort_out(list(alike.values()))
    return tuple(g for g in groups if g.key in fine), refused


def _likeness(group: Group) -> tuple[Any, ...]:
    """Groups for which this is equal stand and fall together."""
    parts = (*group.rows, *group.norms, *group.columns)
    layers = tuple(re.sub(r"\d+", "#", p.layer.removeprefix(group.name)) for p in parts)
    name = group.name if group.kind == "block" else re.sub(r"\d+", "#", group.name)
    return group.kind, name, layers, group.parameters


def mismatch(
    denoiser: Denoiser, groups: Sequence[Group], kept: Mapping[str, Tensor], call: Callable[[], Any]
) -> str | None:
    """Why masking and removing all but the ``kept`` units of ``groups`` differ, or None."""
    dtype = next(denoiser.module.parameters()).dtype
    with torch.no_grad(), ExitStack() as undo:
        with Masks(denoiser.module, groups) as masks:
            masks.set({g.key: torch.zeros(g.units).index_fill(0, kept[g.key], 1.0) for g in groups})
            masked = output_tensors(call())
        try:
            remove_units(denoiser, groups, kept, Originals("device", undo), undo)
            removed = output_tensors(call())
        except Exception as error:  # whatever a forward makes of other sizes
            return f"its forward does not work with other sizes ({type(error).__name__}: {error})"[:300]
    distance = relative(removed, masked)
    if not distance <= TOLERANCE.get(dtype, _COARSE):
        return f"removing differs from masking by {distance:.1e}, relative"
    return None


def relative(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Relative Euclidean distance of ``a`` from ``b``; infinite where shapes differ."""
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    left, right = (torch.cat([t.detach().flatten().double() for t in ts]) for ts in (a, b))
    return float((left - right).norm() / right.norm())

"""Linears as products of two of lower rank, by singular value decomposition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from diffaccel.denoiser import Denoiser, select
from diffaccel.errors import PlanError
from diffaccel.originals import Originals, Parked
from diffaccel.pruning.removal import replace_module
from diffaccel.pruning.section import LowRank as Settings
from diffaccel.reshape import LowRank, Record, set_role


def ranks_of(section: Settings, denoisers: Sequence[Denoiser]) -> dict[str, dict[str, int]]:
    """Component -> linear -> rank, of the linears that get smaller.

    Raises:
        PlanError: the pattern matches no plain linear, or none would get smaller.
    """
    found: dict[str, dict[str, int]] = {}
    for site in select(denoisers, section.sites, "layers"):
        layer = site.module
        if type(layer) is not nn.Linear or not isinstance(layer._parameters.get("weight"), nn.Parameter):
            continue
        if type(layer.weight.data) is not Tensor or layer.weight.device.type == "meta":
            continue
        least = layer.weight.numel() // (layer.in_features + layer.out_features)  # here two cost as much as one
        rank = _rank(layer.weight, section, least)
        if 0 < rank < least:
            found.setdefault(site.component, {})[site.name] = rank
    if not found:
        raise PlanError(
            f"LowRank(sites={section.sites!r}) makes no linear smaller: keep less energy, a smaller ratio, or a "
            f"smaller multiple than {section.multiple}"
        )
    return found


def _rank(weight: Tensor, section: Settings, least: int) -> int:
    if section.energy is not None:
        squares = torch.linalg.svdvals(weight.detach().float()).square()
        enough = (squares.cumsum(0) / squares.sum() >= section.energy).nonzero()
        rank = int(enough[0]) + 1 if len(enough) else len(squares)
    else:
        assert section.ratio is not None
        rank = max(1, round(section.ratio * least))
    return -(-rank // section.multiple) * section.multiple


def factorise(
    denoiser: Denoiser, ranks: Mapping[str, int], originals: Originals, undo: ExitStack
) -> tuple[Record, dict[str, Parked]]:
    """Replace linears by their best approximation of a rank: name -> rank.

    Returns:
        The shape record and the original parameters by name. Linears that were removed meanwhile are left out.
    """
    record: Record = {"replaced": {}, "roles": {}}
    parked: dict[str, Parked] = {}
    reference = next(denoiser.module.parameters())
    roles = {site.name: site.role for site in denoiser.layers}
    present = dict(denoiser.module.named_modules())
    for name, rank in ranks.items():
        layer = present.get(name)
        if type(layer) is not nn.Linear:
            continue
        weight = layer.weight.detach()
        two = LowRank(layer.in_features, layer.out_features, rank, bias=layer.bias is not None)
        two.to(weight.device, weight.dtype)
        with torch.no_grad():
            u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
            root = s[:rank].sqrt()
            two.up.weight.copy_(u[:, :rank] * root)
            two.down.weight.copy_(v[:rank] * root[:, None])
            if layer.bias is not None:
                two.up.bias.copy_(layer.bias)
        two.requires_grad_(layer.weight.requires_grad)
        for part, child in (("down", two.down), ("up", two.up)):
            set_role(child, roles[name])
            record["roles"][f"{name}.{part}"] = roles[name]
        replace_module(denoiser.module, name, two, reference, originals, undo, parked)
        record["replaced"][name] = {"kind": two.kind, **two.arguments()}
    return {part: values for part, values in record.items() if values}, parked

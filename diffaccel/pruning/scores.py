"""How much units matter: by their weights, by what they put out, by what a call's output owes them, or by chance."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.denoiser import Denoiser
from diffaccel.latents import output_tensors
from diffaccel.pruning.groups import Group, Part
from diffaccel.pruning.masks import Masks
from diffaccel.recording import Recorded

Scores = dict[str, Tensor]
"""By group key, float32 [units]."""


def random_scores(groups: Sequence[Group], seed: int) -> Scores:
    """Any order is as good; in proportion to what units cost, so that no kind is preferred."""
    generator = torch.Generator().manual_seed(seed)
    return {g.key: torch.rand(g.units, generator=generator) * g.parameters_each for g in groups}


def magnitude_scores(groups: Sequence[Group]) -> Scores:
    """The mean square of a unit's weights, relative to its group's, times what it costs.

    Without the division whole layers would go that happen to have small weights.
    """
    scores = {}
    for group in groups:
        squares = torch.zeros(group.units)
        for part, axis in [(p, 0) for p in group.rows] + [(p, 1) for p in group.columns]:
            squares += _squares(part, axis)
        if group.module is not None:
            squares += sum(p.detach().float().square().sum().cpu() for p in group.module.parameters())
        scores[group.key] = squares / squares.mean().clamp(min=1e-30) * group.parameters_each
    return scores


def activation_scores(denoiser: Denoiser, groups: Sequence[Group], calls: Sequence[Recorded]) -> Scores:
    """The mean square of what a unit adds over ``calls``, relative to its group's, times what it costs.

    What it adds is what it puts out, times the weights that read it (as Wanda, arXiv:2306.11695, has it).
    """
    sums = {g.key: torch.zeros(g.units) for g in groups}

    def watch(group: Group, part: Part) -> Any:
        channels = 1 if isinstance(part.module, nn.modules.conv._ConvNd) else -1

        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().float().square().movedim(channels, -1)
            each = x.flatten(0, -2).mean(0).cpu() * _column_squares(layer)
            sums[group.key] += each[part.index].sum(1)

        return part.module.register_forward_pre_hook(hook)

    with torch.no_grad(), ExitStack() as hooks:
        for group in groups:
            for part in group.columns:
                hooks.callback(watch(group, part).remove)
        for call in calls:
            call.run(denoiser.module)
    return {g.key: sums[g.key] / sums[g.key].mean().clamp(min=1e-30) * g.parameters_each for g in groups}


def taylor_scores(denoiser: Denoiser, groups: Sequence[Group], calls: Sequence[Recorded], seed: int = 0) -> Scores:
    """To first order, by how much the output of ``calls`` changes without a unit: the squared derivative by its mask.

    The squared norm of the output's derivative is estimated by a random projection of the output.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = {g.key: torch.zeros(g.units) for g in groups}
    device = next(denoiser.module.parameters()).device
    with Masks(denoiser.module, groups) as masks:
        for call in calls:
            values = {g.key: torch.ones(g.units, device=device, requires_grad=True) for g in groups}
            masks.set(values)
            outputs = output_tensors(call.run(denoiser.module))
            projected: Any = 0
            for output in outputs:
                signs = torch.randn(output.shape, generator=generator).to(output.device)
                projected = projected + (output.float() * signs).sum() / output.numel() ** 0.5
            gradients = torch.autograd.grad(projected, list(values.values()), allow_unused=True)
            for key, gradient in zip(values, gradients, strict=True):
                if gradient is not None:
                    scores[key] += gradient.detach().float().square().cpu()
    return scores


def replacement_scores(denoiser: Denoiser, groups: Sequence[Group], calls: Sequence[Recorded]) -> Scores:
    """By how much the output changes when a unit alone is replaced by nothing, weighted by its position.

    HierarchicalPrune ranks by contribution and position, because early blocks decide what the picture becomes and late
    ones refine it: here the relative squared change of the output, times exp(1 - i / n) for block i of n.
    """
    scores: Scores = {}
    order = [name for name, _ in denoiser.blocks]
    with torch.no_grad(), Masks(denoiser.module, groups) as masks:
        whole = [output_tensors(call.run(denoiser.module)) for call in calls]
        for group in groups:
            changes = torch.zeros(group.units)
            for unit in range(group.units):
                masks.set({group.key: (torch.arange(group.units) != unit).float()})
                for call, before in zip(calls, whole, strict=True):
                    changes[unit] += change(output_tensors(call.run(denoiser.module)), before) / len(calls)
            masks.set({group.key: None})
            index = position(group, order)
            weight = 1.0 if index is None else float(torch.tensor(1 - index / max(len(order), 1)).exp())
            scores[group.key] = changes * weight
    return scores


def position(group: Group, order: Sequence[str]) -> int | None:
    """Index of the block that the group is in, or None."""
    return next((i for i, name in enumerate(order) if f"{group.name}.".startswith(f"{name}.")), None)


def _squares(part: Part, axis: int) -> Tensor:
    weight = getattr(part.module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim == 1:
        return torch.zeros(len(part.index))
    if axis == 1 and weight.shape[1] == 1:  # depthwise: its inputs are its outputs
        axis = 0
    squares = weight.detach().float().square().movedim(axis, 0).flatten(1).sum(1).cpu()
    return squares[part.index].sum(1)


def _column_squares(layer: nn.Module) -> Tensor:
    """Of the weights that read each input of ``layer``."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().float().square().movedim(1, 0).flatten(1).sum(1).cpu()


def change(after: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    """Relative squared distance."""
    distance = sum(float((a.float() - b.float()).square().sum()) for a, b in zip(after, before, strict=True))
    return distance / max(sum(float(b.float().square().sum()) for b in before), 1e-30)

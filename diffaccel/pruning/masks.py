"""Masks on units: what a unit contributes is multiplied, between 1 (as it was) and 0 (as if removed)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffaccel.pruning.groups import Group, Part


class Masks:
    """Hooks that multiply units of ``groups`` by masks; all are 1 until `set`.

    A mask acts on the inputs of the layers that read a unit. A norm over all units of a group (of queries and keys)
    gets its statistics from the units that are left. So a mask of zeros and ones computes what is left after removal.
    The masks may require gradients.
    """

    def __init__(self, module: nn.Module, groups: Sequence[Group]) -> None:
        self.groups = {group.key: group for group in groups}
        self._values: dict[str, Tensor] = {}
        self._wide: dict[tuple[str, str], Tensor] = {}  # by group and layer: the mask of each input of the layer
        with ExitStack() as undo:
            for group in groups:
                for part in group.columns:
                    undo.callback(part.module.register_forward_pre_hook(self._on_inputs(group, part)).remove)
                for part in group.norms:
                    undo.callback(part.module.register_forward_pre_hook(self._before_norm(group, part)).remove)
                    undo.callback(part.module.register_forward_hook(self._after_norm(group, part)).remove)
                for name in group.outputs:
                    layer = module.get_submodule(name)
                    undo.callback(layer.register_forward_hook(self._on_output(group)).remove)
                if group.flow is not None:
                    block = module.get_submodule(group.name)
                    hook = self._around_block(group)
                    undo.callback(block.register_forward_hook(hook, with_kwargs=True).remove)
            self._undo = undo.pop_all()

    def set(self, masks: Mapping[str, Tensor | None]) -> None:
        """Give groups, by key, their masks [units]; None makes all units of a group count again."""
        for key, mask in masks.items():
            group = self.groups[key]
            for part in (*group.columns, *group.norms):
                self._wide.pop((key, part.layer), None)
            self._values.pop(key, None)
            if mask is not None:
                self._values[key] = mask
                for part in (*group.columns, *group.norms):
                    index = part.index.to(mask.device)
                    wide = torch.ones(_size(part), dtype=mask.dtype, device=mask.device)
                    self._wide[key, part.layer] = wide.index_put(
                        (index.flatten(),), mask.repeat_interleave(index.shape[1])
                    )

    def remove(self) -> None:
        """Take the hooks off."""
        self._undo.close()

    def __enter__(self) -> Masks:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _on_inputs(self, group: Group, part: Part) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> Any:
            wide = self._wide.get((group.key, part.layer))
            if wide is None:
                return None
            return (_times(args[0], wide, isinstance(layer, nn.modules.conv._ConvNd)), *args[1:])

        return hook

    def _before_norm(self, group: Group, part: Part) -> Any:
        """Zero what is masked, and make up in scale for the zeros in the mean."""

        def hook(layer: nn.Module, args: tuple[Any, ...]) -> Any:
            wide = self._wide.get((group.key, part.layer))
            if wide is None:
                return None
            x = args[0].float()
            weight = wide.to(x.device)
            share = weight.square().sum() / weight.numel()
            if isinstance(layer, nn.LayerNorm):
                x = x - (x * weight).sum(-1, keepdim=True) / weight.sum()
            return (x * weight / share.sqrt()).to(args[0].dtype), *args[1:]

        return hook

    def _after_norm(self, group: Group, part: Part) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
            wide = self._wide.get((group.key, part.layer))
            if wide is None:
                return None
            weight = wide.to(output.device)
            scale = (weight.square().sum() / weight.numel()).sqrt().to(output.dtype)
            bias = getattr(layer, "bias", None)
            return output * scale if bias is None else (output - bias) * scale + bias

        return hook

    def _on_output(self, group: Group) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
            mask = self._values.get(group.key)
            return None if mask is None else output * mask.to(output.device, output.dtype)

        return hook

    def _around_block(self, group: Group) -> Any:
        """What a block adds to its streams is multiplied."""
        flow, names = group.flow, group.parameters
        assert flow is not None

        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            mask = self._values.get(group.key)
            if mask is None:
                return None
            given = dict(zip(names, args, strict=False)) | kwargs

            def mixed(path: Any, leaf: Any) -> Any:
                where = pytree.keystr(path)
                if where not in flow:
                    return leaf
                before = given[flow[where]]
                return before + (leaf - before) * mask.to(leaf.device, leaf.dtype)

            return pytree.tree_map_with_path(mixed, output)

        return hook


def _size(part: Part) -> int:
    module = part.module
    if isinstance(module, nn.Linear):
        return module.in_features
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.in_channels
    return math.prod(part.index.shape)


def _times(x: Tensor, wide: Tensor, channels_first: bool) -> Tensor:
    wide = wide.to(x.device, x.dtype)
    return x * (wide.view(-1, *[1] * (x.ndim - 2)) if channels_first else wide)

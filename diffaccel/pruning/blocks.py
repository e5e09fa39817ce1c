"""Whole sub-layers, blocks and UNet residual branches as groups of one unit: what a denoiser can do without."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffaccel.denoiser import Denoiser
from diffaccel.pruning.groups import Group, groups_of
from diffaccel.reshape import Pass, Shortcut, StandIn, Zeros

Flow = Mapping[str, str]


def whole_groups(
    denoiser: Denoiser, kinds: Sequence[str], flows: Mapping[str, Flow] | None = None
) -> tuple[Group, ...]:
    """Groups of one unit of the ``kinds`` ``sublayer``, ``resnet`` and ``block``.

    Args:
        flows: what blocks and attentions give, by name, from `flows_of`; without it there are no blocks.
    """
    found: list[Group] = []
    if "sublayer" in kinds:
        found += _sublayers(denoiser, flows or {})
    if "resnet" in kinds:
        found += _resnets(denoiser)
    if "block" in kinds:
        found += [_block(n, block, flows[n]) for n, block in denoiser.blocks if flows and n in flows]
    return tuple(found)


def flows_of(denoiser: Denoiser, call: Callable[[], Any]) -> dict[str, Flow]:
    """For each block whose output can be followed: where in it each argument of the block goes on.

    Of attention modules only where their outputs lie, which says how many there are.

    Args:
        call: runs the denoiser once. A block's output is followed by identity: the next block receives the very tensor
            as one of its arguments, and the one at hand gets that argument too; for a last block, by shape.
    """
    flows: dict[str, Flow] = {}
    calls: list[tuple[str, dict[str, Any], Any]] = []

    def watch(name: str, block: nn.Module) -> Any:
        names = _parameters(block)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls.append((name, dict(zip(names, args, strict=False)) | kwargs, output))

        return block.register_forward_hook(hook, with_kwargs=True)

    def count(name: str, attention: nn.Module) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            flows[name] = dict.fromkeys(_tensors(output), "")

        return attention.register_forward_hook(hook)

    names = {name for name, _ in denoiser.blocks}
    with torch.no_grad(), ExitStack() as hooks:
        for name, block in denoiser.blocks:
            hooks.callback(watch(name, block).remove)
        for site in denoiser.attentions:
            if site.name not in names:
                hooks.callback(count(site.name, site.module).remove)
        call()
    for i, (name, arguments, output) in enumerate(calls):
        leaves = _tensors(output)
        if not all(re.fullmatch(r"|\[\d+\]", where) for where in leaves) or [c[0] for c in calls].count(name) > 1:
            continue
        following = calls[i + 1][1] if i + 1 < len(calls) else {}
        flow = {}
        for where, value in leaves.items():
            by_identity = [n for n, v in following.items() if v is value and n in arguments]
            by_shape = [n for n, v in arguments.items() if isinstance(v, Tensor) and v.shape == value.shape]
            usual = [n for n in by_shape if n in ("hidden_states", "encoder_hidden_states", "x")]
            found = by_identity or (by_shape if len(by_shape) == 1 else usual if len(usual) == 1 else [])
            if found and arguments[found[0]].shape == value.shape:
                flow[where] = found[0]
        if leaves and len(flow) == len(leaves) and len(set(flow.values())) == len(flow):
            flows[name] = flow
    return flows


def _tensors(output: Any) -> dict[str, Tensor]:
    leaves, _ = pytree.tree_flatten_with_path(output)
    return {pytree.keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def _parameters(block: nn.Module) -> list[str]:
    return list(inspect.signature(block.forward).parameters)


def _block(name: str, block: nn.Module, flow: Flow) -> Group:
    parameters = _parameters(block)
    return Group(
        "block",
        name,
        1,
        flow=dict(flow),
        parameters=tuple(parameters),
        stand_in=lambda: Pass(parameters, flow),
        module=block,
    )


def _sublayers(denoiser: Denoiser, flows: Mapping[str, Flow]) -> Iterator[Group]:
    """Attentions and feed-forwards: what is removed adds zero to the residual."""
    blocks = {name for name, _ in denoiser.blocks}
    inner = groups_of(denoiser)
    joint = {s.name.rpartition(".added_q")[0] or s.name for s in denoiser.layers if s.role == "attn.added_q"}
    for group in inner:
        if group.name in blocks or len({p.layer for p in group.columns}) == 0:
            continue
        module = denoiser.module.get_submodule(group.name)
        inside = [p for p in group.columns if p.layer.startswith(group.name + ".")]
        readers = {p.layer: _features(p.module) for p in inside}
        if group.kind == "heads":
            cross = any(s.role.startswith("cross") for s in denoiser.layers if s.name.startswith(group.name + "."))
            added = {n: f for n, f in readers.items() if "add" in n.rpartition(".")[2] or n in joint}
            own = [f for n, f in readers.items() if n not in added]
            if readers and not own:
                continue
            width = own[0] if own else 0
            text = next(iter(added.values()), width)
            pair = len(flows[group.name]) > 1 if group.name in flows else not cross
            stand_in = _zeros(width, text, joint=pair)
        elif len(readers) == 1:
            conv = isinstance(inside[0].module, nn.modules.conv._ConvNd)
            stand_in = _zeros(next(iter(readers.values())), 0, joint=False, channels_first=conv)
        else:
            continue
        if not readers:  # its heads are read outside, where zeros stand for them
            continue
        yield Group("sublayer", group.name, 1, outputs=tuple(readers), stand_in=stand_in, module=module)


def _zeros(features: int, added: int, *, joint: bool, channels_first: bool = False) -> Callable[[], StandIn]:
    return lambda: Zeros(features, added, joint=joint, channels_first=channels_first)


def _features(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels  # type: ignore[return-value]


def _resnets(denoiser: Denoiser) -> Iterator[Group]:
    """UNet residual blocks, whose branch of two convolutions can go; the projection to other channels stays."""
    for name, module in denoiser.module.named_modules():
        children = dict(module.named_children())
        if not {"conv1", "conv2", "norm1", "norm2"} <= set(children) or not name:
            continue
        shortcut, last = children.get("conv_shortcut"), children["conv2"]
        resampled = getattr(module, "upsample", None) is not None or getattr(module, "downsample", None) is not None
        if resampled or not isinstance(last, nn.Conv2d) or (shortcut is None) == _widens(module):
            continue
        if shortcut is not None and (type(shortcut) is not nn.Conv2d or shortcut.kernel_size != (1, 1)):
            continue
        channels = None if shortcut is None else [shortcut.in_channels, shortcut.out_channels]
        scale = float(getattr(module, "output_scale_factor", 1.0))
        yield Group("resnet", name, 1, outputs=(f"{name}.conv2",), stand_in=_shortcut(channels, scale), module=module)


def _widens(module: nn.Module) -> bool:
    first, last = module.conv1, module.conv2
    return isinstance(first, nn.Conv2d) and isinstance(last, nn.Conv2d) and first.in_channels != last.out_channels


def _shortcut(channels: list[int] | None, scale: float) -> Callable[[], StandIn]:
    return lambda: Shortcut(channels, scale)

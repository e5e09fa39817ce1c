"""Caching of a UNet's deep part: the outermost layers run on every step, what is below them does not.

DeepCache (arXiv:2312.00858, sec. 3.3), and Step Rehash of Streamlined Inference (arXiv:2411.01171, sec. 3.4) with the
last up block as the outermost layers. The layers that run get the skip connections of the step itself: the last n
up layers are fed by the first n outputs of the way down, and these are computed; what the n-th last up layer gets from
below is forecast. Nothing of it is taken for granted: a partial call is made once and compared with the whole one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffaccel.caching.allowance import Allow
from diffaccel.denoiser import Denoiser
from diffaccel.errors import PlanError
from diffaccel.forecast import Forecast
from diffaccel.hooks import install
from diffaccel.latents import output_tensors
from diffaccel.technique import Context

_SAMPLERS = ("downsamplers", "upsamplers")
_TOLERANCE = 1e-3  # of the partial call, relative to the largest number, where its input is that of the whole one


@dataclass
class Kept:
    """The memory of one branch.

    Attributes:
        deep: what came from below.
        shapes: outputs of the modules that are left out, in tensors of their shapes without memory.
    """

    deep: Forecast
    shapes: dict[int, Any] = field(default_factory=dict)


@dataclass
class _Call:
    kept: Kept
    at: float
    skip: bool
    ran: list[int] = field(default_factory=list)
    below: Any = None


class Deep:
    """The part of one UNet that is left out.

    Args:
        layers: how many of the last up layers always run.
        forecast: how what comes from below goes on, see `Forecast`.

    Raises:
        PlanError: no UNet of diffusers' form, or one without so many layers.
    """

    def __init__(self, denoiser: Denoiser, layers: int, forecast: str) -> None:
        self._forecast = forecast
        self._modules = list(_left_out(denoiser, layers))
        self._last: int | None = None  # index of the module that runs last, whose output is what comes from below
        self._call: _Call | None = None
        self._tried = False
        self.refusal: str | None = None
        """Why nothing can be left out, once that is known."""

    def install(self, context: Context) -> None:
        """Put the hooks on the modules, and their removal on the undo stack."""
        for index, module in enumerate(self._modules):
            context.undo.callback(install(module, _DeepHook(self, index), "caching"))

    def memory(self) -> Kept:
        """A fresh one."""
        return Kept(Forecast(self._forecast))

    def call(self, kept: Kept, at: float, skip: bool, allow: Allow, compute: Callable[[], Any]) -> Any:
        """Run the denoiser, or its outer layers alone.

        Args:
            kept: what a whole call of the same branch left.
            skip: whether to leave the deep part out.
            allow: whether so many bytes may be kept.
        """
        output = self._made(kept, at, skip, allow, compute)
        if not skip and not self._tried and not kept.deep.empty:
            self._tried = True
            again = output_tensors(self._made(kept, at, True, allow, compute))
            if not all(map(_close, again, output_tensors(output))):
                self.refusal = "its outer layers with what came from below do not give its output"
        return output

    def _made(self, kept: Kept, at: float, skip: bool, allow: Allow, compute: Callable[[], Any]) -> Any:
        self._call = call = _Call(kept, at, skip)
        try:
            output = compute()
        finally:
            self._call = None
        if not skip and call.ran:
            if self._last is None:
                self._last = call.ran[-1]
            below, call.below = call.below, None
            if not kept.deep.empty or allow("", kept.deep.needs(output_tensors(below))):
                kept.deep.record([], below, at)
        return output

    def run(self, index: int, compute: Callable[[], Any]) -> Any:
        """A module's call, by its hook."""
        call = self._call
        if call is None:
            return compute()
        if call.skip:
            return call.kept.deep([], call.at) if index == self._last else call.kept.shapes[index]
        output = compute()
        call.ran.append(index)
        call.kept.shapes[index] = pytree.tree_map(_shape, output)
        if self._last is None or index == self._last:
            call.below = output
        return output


class _DeepHook(ModelHook):
    """Hands a module's call to the UNet's deep part."""

    _is_stateful = False

    def __init__(self, deep: Deep, index: int) -> None:
        super().__init__()
        self._deep, self._index = deep, index

    @torch.compiler.disable(
        recursive=False,
        reason="diffaccel decides outside the compiled region whether a module runs; compile without fullgraph=True",
    )
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self._deep.run(self._index, lambda: self.fn_ref.original_forward(*args, **kwargs))


def _left_out(denoiser: Denoiser, layers: int) -> Iterator[nn.Module]:
    """The modules that a partial call leaves out."""
    root = denoiser.module
    down, up = (list(getattr(root, name, None) or ()) for name in ("down_blocks", "up_blocks"))
    if not down or not up or not all(hasattr(block, "resnets") for block in (*down, *up)):
        raise PlanError(
            f"StepCache(granularity='deep') is for UNets, and {denoiser.component} ({type(root).__name__}) has no "
            "down_blocks and up_blocks of resnets; use granularity='root' or 'stack'"
        )
    total = sum(len(block.resnets) for block in up)
    if layers >= total:
        raise PlanError(f"StepCache.back={layers} leaves none of the {total} up layers of {denoiser.component} to skip")
    entry = 1  # of the list of skip connections; the first is the input convolution's
    for block in down:
        outputs = len(block.resnets) + bool(getattr(block, "downsamplers", None))
        if entry >= layers:
            yield block
        else:
            for layer in range(len(block.resnets)):
                if entry + layer >= layers:
                    yield from _layer(block, layer)
            if entry + outputs - 1 >= layers and isinstance(
                samplers := getattr(block, "downsamplers", None), nn.ModuleList
            ):
                yield from samplers
        entry += outputs
    if isinstance(middle := getattr(root, "mid_block", None), nn.Module):
        yield middle
    skipped = total - layers
    for block in up:
        if skipped >= len(block.resnets):
            yield block
        else:
            for layer in range(max(skipped, 0)):
                yield from _layer(block, layer)
        skipped -= len(block.resnets)


def _layer(block: nn.Module, layer: int) -> Iterator[nn.Module]:
    """The modules of one layer: its resnet, and attentions and convolutions beside it."""
    for name, modules in block.named_children():
        if isinstance(modules, nn.ModuleList) and name not in _SAMPLERS and layer < len(modules):
            yield modules[layer]


def _shape(leaf: Any) -> Any:
    return leaf.new_zeros(()).expand(leaf.shape) if isinstance(leaf, Tensor) else leaf


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= _TOLERANCE * b.abs().max())

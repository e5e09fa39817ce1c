"""Caching on the block stack: embeddings and the final projection run on every step, the blocks between them do not.

What the cached blocks added to each stream (image tokens, text tokens) is kept, and on a skipped step added to what
comes in (the residual of the stack: FirstBlockCache, DBCache, TeaCache and MagCache do this). Blocks may lie in several
lists, as FLUX's double and single ones; each list has a residual of its own, so that what happens between lists still
happens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import Tensor, nn

from diffaccel.caching.allowance import Allow
from diffaccel.caching.stack_layout import StackLayout, StackObserver, streams_of
from diffaccel.denoiser import Denoiser
from diffaccel.errors import PlanError
from diffaccel.forecast import Forecast
from diffaccel.hooks import install
from diffaccel.latents import output_like
from diffaccel.technique import Context

Ask = Callable[[list[Tensor]], bool]
"""Whether to skip the rest of the stack, by what the front blocks added to the image tokens."""


@dataclass
class _Call:
    """One call of the denoiser: what is to be done in it, and where it stands."""

    residuals: dict[int, Forecast]  # by the first position of a span; of this call's branch
    at: float
    skip: bool | Ask
    allow: Allow
    position: int = 0
    entered: dict[str, Tensor] = field(default_factory=dict)  # copies of the streams where the span at hand began
    given: Tensor | None = None  # to the first attention, where that decides
    before: Tensor | None = None  # likewise of the image tokens, where the front's list began
    passed: dict[str, Tensor] = field(default_factory=dict)  # outputs of the block before in this span


class _Misfit(Exception):
    """The call turned out not to be what was learnt; it is made again, with every block."""


class Stack:
    """The repeated blocks of one denoiser.

    Args:
        front: blocks at the beginning that always run. back: likewise at the end.
        forecast: how the residuals go on while they are not computed, see `Forecast`.
        modulated: whether it is decided by what the first attention is given instead of what the front blocks add.

    Raises:
        PlanError: ``modulated``, and the first block has no query projection to see that at.
    """

    def __init__(self, denoiser: Denoiser, front: int, back: int, forecast: str, *, modulated: bool = False) -> None:
        self._blocks = denoiser.blocks
        self._front, self._back, self._forecast = front, back, forecast
        self._signatures = [inspect.signature(block.forward) for _, block in self._blocks]
        self._observer: StackObserver | None = StackObserver([name for name, _ in self._blocks])
        self._layout: StackLayout | None = None
        self._call: _Call | None = None
        self._tap = _query_projection(denoiser) if modulated else None
        self.refusal: str | None = None
        """Why nothing can be skipped, once that is known."""

    def install(self, context: Context) -> None:
        """Put the hooks on the blocks, and their removal on the undo stack."""
        for index, (_, block) in enumerate(self._blocks):
            context.undo.callback(install(block, _BlockHook(self, index), "caching"))
        if self._tap is not None:
            context.undo.callback(self._tap.register_forward_pre_hook(self._given).remove)

    def _given(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._call is not None and self._call.given is None and args:
            self._call.given = args[0].detach().clone()

    def covered(self, residuals: Mapping[int, Forecast]) -> bool:
        """Whether ``residuals`` suffice to skip a call."""
        return self._layout is not None and all(span.first in residuals for span in self._layout.spans)

    def call(
        self,
        residuals: dict[int, Forecast],
        at: float,
        skip: bool | Ask,
        allow: Allow,
        compute: Callable[[], Any],
    ) -> Any:
        """Run the denoiser with its blocks, or without those that can be skipped.

        The very first call is made twice, to learn from and to keep from, so that it is not unlike later first calls.

        Args:
            residuals: the memory of the call's branch.
            skip: True, False, or a function that decides after the front blocks. True needs `covered`.
            allow: whether so many bytes may be kept.

        Returns:
            The denoiser's output, and whether blocks were skipped.
        """
        self._call = _Call(residuals, at, skip, allow)
        try:
            output = compute()
            if self._observer is not None:
                self._learn()
                if self._layout is not None:
                    self._call = _Call(residuals, at, skip, allow)
                    output = compute()
            return output, self._call.skip is True
        except _Misfit:
            self._call = None
            return compute(), False
        finally:
            self._call = None

    def run(self, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """A block's call, by its hook."""
        call, layout = self._call, self._layout
        if call is None or self.refusal is not None:
            return compute()
        arguments = self._signatures[index].bind(*args, **kwargs).arguments
        if layout is None:
            assert self._observer is not None
            return self._observer.saw(index, arguments, compute())
        position, call.position = call.position, call.position + 1
        if position >= len(layout.order) or layout.order[position] != index:
            self.refusal = "its blocks do not run in the same order in every call"
            raise _Misfit
        if position < self._front:
            return self._run_front(call, layout, position, arguments, compute)
        span = layout.span_at(position)
        if span is None:
            return compute()
        streams = {key: arguments[name] for key, name in span.flow.items()}
        if call.skip is True:
            if position == span.first:
                residuals = call.residuals[span.first]([], call.at)
                streams |= {key: streams[key] + r.to(streams[key].dtype) for key, r in residuals.items()}
            template = layout.templates[index]
            return output_like(template, [streams[key] for key in streams_of(template)])
        if position == span.first:
            call.entered = {key: x.detach().clone() for key, x in streams.items()}
        elif any(streams[key] is not v for key, v in call.passed.items()):
            self.refusal = "something is added between its blocks (a ControlNet's residuals?)"
            raise _Misfit
        output = compute()
        call.passed = streams_of(output)
        if position == span.last:
            added = {key: v.detach() - call.entered[key] for key, v in call.passed.items()}
            residual = call.residuals.get(span.first) or Forecast(self._forecast)
            if span.first in call.residuals or call.allow(span.first, residual.needs(list(added.values()))):
                call.residuals[span.first] = residual
                residual.record([], added, call.at)
            call.entered = {}
        return output

    def _run_front(
        self, call: _Call, layout: StackLayout, position: int, arguments: Mapping[str, Any], compute: Callable[[], Any]
    ) -> Any:
        """A block that always runs; after the last of them it is decided about the rest, if it has not been."""
        if position == layout.front_begin and not isinstance(call.skip, bool):
            call.before = arguments[layout.signal[1]].detach().clone()
        output = compute()
        if position == self._front - 1 and not isinstance(call.skip, bool):
            assert call.before is not None
            if self._tap is not None and call.given is not None:
                call.skip = call.skip([call.given])
                return output
            call.skip = call.skip([streams_of(output)[layout.signal[0]].detach() - call.before])
        return output

    def _learn(self) -> None:
        """From the first computed call."""
        assert self._observer is not None
        found = self._observer.layout(self._front, self._back)
        self._observer = None
        if isinstance(found, str):
            self.refusal = found
        else:
            self._layout = found


def _query_projection(denoiser: Denoiser) -> nn.Module:
    """The first block's: what it is given was normalised, and scaled and shifted by the timestep."""
    first = denoiser.blocks[0][0] if denoiser.blocks else ""
    for site in denoiser.layers:
        if site.role in ("attn.q", "attn.qkv") and first and site.name.startswith(f"{first}."):
            return site.module
    raise PlanError(
        f"StepCache(policy='modulated') looks at what the first block's query projection is given, and "
        f"{denoiser.component} has none there; use policy='first-block'"
    )


class _BlockHook(ModelHook):
    """Hands a block's call to the stack, outside of whatever region of the block is compiled."""

    _is_stateful = False

    def __init__(self, stack: Stack, index: int) -> None:
        super().__init__()
        self._stack, self._index = stack, index

    @torch.compiler.disable(
        recursive=False,
        reason="diffaccel decides outside the compiled region whether a block runs; compile without fullgraph=True",
    )
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self._stack.run(self._index, args, kwargs, lambda: self.fn_ref.original_forward(*args, **kwargs))

"""Caching of single modules' outputs: attention, feed-forwards, whole blocks, each by its own schedule.

Attention and feed-forward outputs are kept before the gate and the residual sum of their block, which go on with the
step's own numbers: FORA (arXiv:2407.01425), SmoothCache (arXiv:2411.10510), PAB (arXiv:2408.12588), TaylorSeer
(arXiv:2503.06923). Of a block what it adds to its streams is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from diffusers.hooks import ModelHook
from torch import Tensor, nn

from diffaccel.caching.allowance import Allow
from diffaccel.denoiser import Site
from diffaccel.forecast import Forecast
from diffaccel.hooks import install
from diffaccel.latents import add_leading, output_like, output_tensors, partners
from diffaccel.sites import SitePattern
from diffaccel.technique import Context

Key = tuple[int, int]
"""A module's index, and how often it ran before in the same call."""


@dataclass
class _Call:
    """One call of the denoiser."""

    kept: dict[Key, Forecast]
    at: float
    skip: Mapping[str, bool]
    allow: Allow
    seen: Counter[int] = field(default_factory=Counter)


class Sites:
    """The cached modules of one denoiser.

    Args:
        sites: the modules. groups: of each, the name of what decides for it.
        forecast: how their outputs go on, see `Forecast`.
    """

    def __init__(self, sites: Sequence[Site], groups: Sequence[str], forecast: str) -> None:
        self.groups = tuple(dict.fromkeys(groups))
        self._sites, self._group = list(sites), list(groups)
        self._forecast = forecast
        self._call: _Call | None = None

    def install(self, context: Context) -> None:
        """Put the hooks on the modules, and their removal on the undo stack."""
        for index, site in enumerate(self._sites):
            context.undo.callback(install(site.module, SiteHook(self, index), "caching"))

    def call(
        self, kept: dict[Key, Forecast], at: float, skip: Mapping[str, bool], allow: Allow, compute: Callable[[], Any]
    ) -> Any:
        """Run the denoiser without the modules of the groups in ``skip`` that are known.

        Args:
            kept: the memory of the call's branch.
        """
        self._call = _Call(kept, at, skip, allow)
        try:
            return compute()
        finally:
            self._call = None

    def run(self, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """A module's call, by its hook."""
        call = self._call
        if call is None:
            return compute()
        key = (index, call.seen[index])
        call.seen[index] += 1
        inputs = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()]
        known = call.kept.get(key)
        if known is not None and call.skip[self._group[index]] and known.fits(inputs):
            return self._with(index, inputs, known(inputs, call.at))
        output = compute()
        change = self._without(index, inputs, output)
        if known is None:
            probe = Forecast(self._forecast)
            if not call.allow(key, probe.needs(output_tensors(change))):
                return output
            known = call.kept[key] = probe
        known.record(inputs, change, call.at)
        return output

    def _without(self, index: int, inputs: list[Tensor], output: Any) -> Any:
        """What is kept of an output: of a block what it adds to what it gets."""
        return self._shifted(index, inputs, output, -1)

    def _with(self, index: int, inputs: list[Tensor], kept: Any) -> Any:
        return self._shifted(index, inputs, kept, 1)

    def _shifted(self, index: int, inputs: list[Tensor], output: Any, sign: int) -> Any:
        if self._sites[index].role != "block":
            return output
        outputs = output_tensors(output)
        pairs = zip(outputs, partners(outputs, inputs), strict=True)
        moved = [v if i is None else add_leading(v.detach(), inputs[i], sign).to(v.dtype) for v, i in pairs]
        return output_like(output, moved)


class Owner(Protocol):
    """Who gets the calls of hooked modules."""

    def run(self, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """The output of a call of module ``index``."""


class SiteHook(ModelHook):
    """Hands a module's call to its owner."""

    _is_stateful = False

    def __init__(self, owner: Owner, index: int) -> None:
        super().__init__()
        self._owner, self._index = owner, index

    @torch.compiler.disable(
        recursive=False,
        reason="diffaccel decides outside the compiled region whether a module runs; compile without fullgraph=True",
    )
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self._owner.run(self._index, args, kwargs, lambda: self.fn_ref.original_forward(*args, **kwargs))


def group_of(site: Site, rules: Mapping[str, int]) -> str:
    """The last of the globs in ``rules`` that covers a module, else its role."""
    covering = [glob for glob in rules if SitePattern(glob).matches(site.role, site.component, site.name)]
    return covering[-1] if covering else site.role

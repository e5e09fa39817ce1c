"""What goes into and comes out of one block of a denoiser, captured from calls that are made again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from diffaccel.quantization.replay import Recorded, copied, floating
from diffaccel.technique import Context


@dataclass(frozen=True)
class Sample:
    """One call of a block: its arguments, and the floating tensors of what it gave."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: list[Tensor]

    def error(self, module: nn.Module, weights: Mapping[str, Tensor]) -> Tensor:
        """Energy of what the output differs by, with other ``weights`` by name within the module, over the output's."""
        values = {name: w.to(module.get_parameter(name).dtype) for name, w in weights.items()}
        output = functional_call(module, values, copied(self.args), copied(dict(self.kwargs)))
        got = floating(output, detach=False)
        each = [(a.float() - b.float()).square().sum() for a, b in zip(self.output, got, strict=True)]
        different = torch.stack(each).sum()
        return different / max(sum(float(a.float().square().sum()) for a in self.output), 1e-30)


class _Enough(Exception):
    """The block was called; what follows it is not needed."""


@torch.no_grad()
def capture(module: nn.Module, calls: Sequence[Recorded], context: Context) -> list[Sample]:
    """A sample of each call in which ``module`` takes part; only the first where it is called several times in one."""
    samples: list[Sample] = []

    def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        samples[-1:] = [Sample(samples[-1].args, samples[-1].kwargs, floating(output))]
        raise _Enough

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        samples.append(Sample(copied(args), copied(kwargs), []))  # the forward may write into its inputs

    roots = {d.component: d.module for d in context.denoisers}
    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(look, with_kwargs=True),
    ]
    try:
        for call in calls:
            context.clock.start(call.steps, call.step)
            with suppress(_Enough):
                roots[call.component](*copied(call.args), **copied(dict(call.kwargs)))
    finally:
        for handle in handles:
            handle.remove()
    return samples

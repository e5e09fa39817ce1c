"""Muon: momentum whose update is orthogonalised (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

``torch.optim.Muon`` takes matrices only, one at a time, and always in bfloat16, which is slow on processors without
matrix instructions for it. This one stacks matrices of one size, flattens convolutions, and takes the dtype as given.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def orthogonalise(update: Tensor, steps: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrices of a stack [N, rows <= columns], by a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = update / (update.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon:
    """Steps ``parameters`` by orthogonalised momentum; parameters without a gradient stay.

    An update has the root mean square 0.2 x ``rate``, so rates are on AdamW's scale.

    Args:
        parameters: with two or more dimensions; the first one against all others makes the matrix.
        momentum: in [0, 1), Nesterov's form.
        dtype: of the Newton-Schulz iteration.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], momentum: float, dtype: torch.dtype) -> None:
        self.parameters = list(parameters)
        self.momentum, self.dtype = momentum, dtype
        self.buffers = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, rate: float, decay: float = 0.0) -> None:
        stacks: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor, bool]]] = {}
        for parameter, buffer in zip(self.parameters, self.buffers, strict=True):
            if parameter.grad is None:
                continue
            buffer.lerp_(parameter.grad, 1 - self.momentum)
            update = parameter.grad.lerp(buffer, self.momentum).flatten(1)
            tall = update.shape[0] > update.shape[1]
            update = update.mT if tall else update
            stacks.setdefault((update.shape[0], update.shape[1]), []).append((parameter, update, tall))
        for (_, columns), members in stacks.items():
            updates = orthogonalise(torch.stack([update for _, update, _ in members]).to(self.dtype)).float()
            for (parameter, _, tall), update in zip(members, updates, strict=True):
                turned = update.mT if tall else update
                parameter.mul_(1 - rate * decay).add_(turned.reshape(parameter.shape), alpha=-0.2 * columns**0.5 * rate)

    def state(self) -> list[Tensor]:
        return self.buffers

    def load(self, state: Any) -> None:
        for buffer, saved in zip(self.buffers, state, strict=True):
            buffer.copy_(saved)

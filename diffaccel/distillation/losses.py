"""How far a student is from its teacher: outputs, what blocks give, what self-attentions give."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.denoiser import Denoiser
from diffaccel.latents import output_tensors


def distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """The mean squared error over the mean square of ``wanted``, over all tensors."""
    square = sum(((a.float() - b.float()).square().sum() for a, b in zip(found, wanted, strict=True)), torch.zeros(()))
    size = sum((b.float().square().sum() for b in wanted), torch.zeros(()))
    return square / size.clamp(min=1e-20)


class Features:
    """Keeps what modules of a network give while it is called.

    Args:
        modules: name -> module. Both networks are asked for the same names.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.found: dict[str, list[Tensor]] = {}
        with ExitStack() as undo:
            for name, module in modules.items():
                undo.callback(module.register_forward_hook(self._keep(name)).remove)
            self._undo = undo.pop_all()

    def take(self) -> dict[str, list[Tensor]]:
        """What was given since the last time."""
        found, self.found = self.found, {}
        return found

    def remove(self) -> None:
        """Take the hooks off."""
        self._undo.close()

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.found[name] = output_tensors(output)

        return hook


def shared_modules(
    student: Denoiser, teacher: Denoiser, kind: str
) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The ``blocks`` or self-``attention`` modules that both have by the same name."""

    def named(denoiser: Denoiser) -> dict[str, nn.Module]:
        if kind == "blocks":
            return dict(denoiser.blocks)
        return {s.name: s.module for s in denoiser.attentions if s.role == "attn"}

    ours, theirs = named(student), named(teacher)
    names = [name for name in ours if name in theirs]
    return {n: ours[n] for n in names}, {n: theirs[n] for n in names}


def features_distance(student: dict[str, list[Tensor]], teacher: dict[str, list[Tensor]]) -> Tensor:
    """The mean of `distance` over the modules whose outputs have the same shapes."""
    pairs = [(student[n], teacher[n]) for n in student if n in teacher]
    same = [(a, b) for a, b in pairs if [t.shape for t in a] == [t.shape for t in b] and a]
    return torch.stack([distance(a, b) for a, b in same]).mean() if same else torch.zeros(())

"""Batches that hold both branches of guidance: how they are recognised, cut in two, and put together.

A batch is the first dimension of tensors or, where a denoiser takes one tensor a sample, the length of lists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffaccel.latents import latent_tensors, output_like, output_tensors

Cut = Callable[[Any], Any]
"""Argument of a call -> the same argument for the second half of the batch."""

# How far half a batch may be from its half of the whole, relative to the largest number: products of another batch size
# are summed in another order.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_ROUNDED = 0.03  # in the root mean square: a smaller batch may take a kernel that rounds, or one that does not


def list_of(output: Any) -> list[Tensor] | None:
    """The list of one tensor a sample in a denoiser's output, None where the samples are rows of tensors."""
    parts = [output, *output] if isinstance(output, tuple) else [output]
    return next((part for part in parts if isinstance(part, list)), None)


def are_equal(latents: Sequence[Tensor], like: Sequence[torch.Size], listed: bool) -> bool:
    """Whether the latents are there twice, as far as outputs of the sizes ``like`` continue them. Reads the device.

    Channels behind those are conditions, which differ between the branches (SVD's image).
    """
    if listed:
        middle = len(latents) // 2
        return len(latents) == 2 * middle and all(map(_equal, latents[:middle], latents[middle:], like[middle:]))
    if not latents or not like or latents[0].shape[0] % 2:
        return False
    first, second = latents[0].chunk(2)
    return _equal(first, second, like[0])


def _equal(a: Tensor, b: Tensor, like: torch.Size) -> bool:
    if a.shape != b.shape or a.ndim != len(like):
        return False
    for dimension in range(1, a.ndim):
        width = min(a.shape[dimension], like[dimension])
        a, b = a.narrow(dimension, 0, width), b.narrow(dimension, 0, width)
    return torch.equal(a, b)


def cut_that_works(arguments: Mapping[str, Any], compute: Callable[[Cut], Any], output: Any) -> Cut | None:
    """How to cut the arguments so that half of the output comes out; None if no way does.

    First what has the batch's size is cut, then also what has a multiple of it (text repeated for each frame).
    """
    listed = list_of(output) is not None
    size = len(latent_tensors(arguments)) if listed else latent_tensors(arguments)[0].shape[0]
    _, expected = split(output)
    for multiples in (False, True):
        cut = partial(_second_half, size=size, listed=listed, multiples=multiples)
        try:
            alone = output_tensors(compute(cut))
        except Exception:  # shapes that belong together were cut apart
            continue
        if len(alone) == len(expected) and all(map(_close, alone, expected)):
            return cut
    return None


def _second_half(value: Any, size: int, listed: bool, multiples: bool) -> Any:
    again = partial(_second_half, size=size, listed=listed, multiples=multiples)
    if isinstance(value, Tensor):
        rows = value.shape[0] if value.ndim else 0
        cut = rows == size or (multiples and rows > 0 and rows % size == 0)
        return value[rows // 2 :] if cut else value
    if listed and isinstance(value, list) and len(value) == size:
        return value[size // 2 :]
    if isinstance(value, dict):
        return {name: again(v) for name, v in value.items()}
    return type(value)(map(again, value)) if type(value) in (list, tuple) else value


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    away, size = (a.float() - b.float()), b.float()
    same = away.abs().max() <= _TOLERANCE.get(b.dtype, 1e-3) * size.abs().max()
    return bool(same or away.square().mean() <= _ROUNDED**2 * size.square().mean())


def split(output: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of the first and of the second half of a whole output."""
    tensors = output_tensors(output)
    if list_of(output) is not None:
        return tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
    halves = [v.chunk(2) for v in tensors]
    return [half[0] for half in halves], [half[1] for half in halves]


def joined(half: Any, first: list[Tensor], second: list[Tensor]) -> Any:
    """A whole output from the tensors of its halves, of the structure that ``half`` has."""
    if list_of(half) is None:
        return output_like(half, [torch.cat(pair) for pair in zip(first, second, strict=True)])
    whole = [*first, *second]
    return whole if isinstance(half, list) else tuple(whole if isinstance(part, list) else part for part in half)


def with_first(output: Any, first: list[Tensor]) -> Any:
    """A whole output with other tensors in its first half."""
    _, second = split(output)
    if list_of(output) is not None:
        return output_like(output, [*first, *second])
    return output_like(output, [torch.cat(pair) for pair in zip(first, second, strict=True)])

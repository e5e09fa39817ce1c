"""Memory that shows when a kernel reads it, or leaves it unwritten, or writes what it should not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

# Elements on either side: farther than a kernel without its masks reaches at the sizes of the tests.
GUARD = 1 << 15


def poison(dtype: torch.dtype) -> float:
    """NaN; for integers the least, which symmetric quantisation never produces."""
    return math.nan if dtype.is_floating_point else torch.iinfo(dtype).min


def surrounded(x: Tensor | None) -> Tensor | None:
    """``x`` between poison, contiguous."""
    return x if x is None else _between_guards(x.shape, x.dtype)[0].copy_(x)


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Within, `torch.empty` gives poison between guards; in the end the guards must be as they were."""
    guards: list[Tensor] = []

    def empty(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        x, around = _between_guards(shape, dtype)
        guards.extend(around)
        return x

    with mock.patch.object(torch, "empty", empty):
        yield
    for guard in guards:
        untouched = torch.full_like(guard, poison(guard.dtype))
        assert torch.equal(guard.view(torch.uint8), untouched.view(torch.uint8)), "written out of bounds"


def _between_guards(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    size = math.prod(shape)
    buffer = torch.full((size + 2 * GUARD,), poison(dtype), dtype=dtype)
    return buffer[GUARD : GUARD + size].view(shape), (buffer[:GUARD], buffer[GUARD + size :])

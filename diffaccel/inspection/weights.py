"""Bytes that a module's weights occupy."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn


def module_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers; storage that several share is counted once.

    Quantized tensors (torchao's subclasses) count as what they hold, not as what they stand for.
    """
    storages: dict[int, int] = {}
    for tensor in chain(module.parameters(), module.buffers()):
        for plain in _plain_tensors(tensor.data):
            if plain.is_mkldnn:  # blocked for oneDNN: it hides its storage, and shares it with nobody
                storages[-id(tensor) - len(storages)] = plain.nbytes
                continue
            storage = plain.untyped_storage()
            # Meta tensors all have address 0, fake ones raise: there each tensor is its own storage.
            real = plain.device.type != "meta" and not isinstance(plain, torch._subclasses.FakeTensor)
            storages[storage.data_ptr() if real else -id(tensor) - len(storages)] = storage.nbytes()
    return sum(storages.values())


def _plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors behind a traceable wrapper subclass, or the tensor itself."""
    if isinstance(tensor, torch._subclasses.FakeTensor) or not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _plain_tensors(getattr(tensor, name))

"""Constants of a run by identity, and modules whose outputs are constants because their inputs are.

A tensor is a constant while the memory that it looks at is that of a known argument and has not been written into
since: PyTorch counts writes (`Tensor._version`) for all views of one memory together. Nothing is read from the device.
What writes behind PyTorch's back (``tensor.data``) is not seen.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_MOST_TENSORS = 256
_MOST_CALLS = 4  # of one module: two branches, and what comes again after them
_PLAIN = (int, float, str, bool, type(None), torch.dtype, torch.device)


@dataclass
class _Memory:
    """Memory that does not change: somebody who holds it, the number of writes so far, and names of views of it."""

    holder: Tensor
    version: int
    names: dict[tuple[Any, ...], Hashable] = field(default_factory=dict)


class Constants:
    """The tensors of one denoiser that are known not to change, in one run."""

    def __init__(self) -> None:
        self._known: OrderedDict[int, _Memory] = OrderedDict()  # by address
        self._made = count()
        self.run = 0
        """Number of the run; what was kept in another is stale."""

    def clear(self) -> None:
        """Begin another run."""
        self._known.clear()
        self.run += 1

    def add(self, tensor: Tensor, name: Hashable = None) -> None:
        """Take in a constant. Tensors at different places that have one ``name`` count as the same."""
        if not _countable(tensor):
            return
        address = tensor.untyped_storage().data_ptr()
        memory = self._known.get(address)
        if memory is None or memory.version != tensor._version:
            memory = self._known[address] = _Memory(tensor, tensor._version)
        self._known.move_to_end(address)
        if name is not None:
            memory.names.setdefault(_place(tensor), name)
        while len(self._known) > _MOST_TENSORS:
            self._known.popitem(last=False)

    def add_made(self, tensors: Iterable[Tensor]) -> None:
        """Take in what was made of constants only."""
        for tensor in tensors:
            self.add(tensor, ("made", next(self._made)))

    def identity(self, value: Any) -> Hashable:
        """What tells this argument from others; None where it is no constant."""
        if not isinstance(value, Tensor):
            return (type(value), value) if isinstance(value, _PLAIN) else None
        if not _countable(value):
            return None
        memory = self._known.get(value.untyped_storage().data_ptr())
        if memory is None or value._version != memory.version:
            return None
        place = _place(value)
        return memory.names.get(place, place)


def _countable(tensor: Tensor) -> bool:
    """Whether PyTorch counts the writes into this tensor, and it has a memory of its own kind."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference() and tensor.device.type != "meta"


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return (
        tensor.untyped_storage().data_ptr(),
        tensor._version,
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
    )


@dataclass
class _Kept:
    """A call of a module: what it gave, whose arguments are held so that nothing else takes their memory."""

    arguments: list[Any]
    output: Any
    versions: list[int]

    def intact(self) -> bool:
        """Whether nobody has written into the output."""
        return [t._version for t in _tensors(self.output)] == self.versions


class ConstantHook(ModelHook):
    """On a module: gives what it gave for the same constants. Compiled code computes; the hook leaves no trace there.

    Attributes:
        spared: calls that were not computed.
    """

    _is_stateful = False

    def __init__(self, constants: Constants) -> None:
        super().__init__()
        self._constants = constants
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()
        self._run = -1
        self._written = False  # somebody writes into its outputs
        self.spared = 0

    @property
    def nbytes(self) -> int:
        """Of the outputs that are kept."""
        return sum(t.nbytes for kept in self._kept.values() for t in _tensors(kept.output))

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        compute = self.fn_ref.original_forward
        if torch.compiler.is_compiling() or self._written or module.training:
            return compute(*args, **kwargs)
        return self._once(compute, args, kwargs)

    def _once(self, compute: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._run != self._constants.run:
            self._run = self._constants.run
            self._kept.clear()
        leaves, structure = pytree.tree_flatten((args, kwargs))
        names = [self._constants.identity(leaf) for leaf in leaves]
        if None in names or not any(isinstance(leaf, Tensor) for leaf in leaves):
            return compute(*args, **kwargs)
        key = (structure, *names)
        kept = self._kept.get(key)
        if kept is not None and kept.intact():
            self.spared += 1
            self._kept.move_to_end(key)
            return kept.output
        if kept is not None:
            self._written = True
            self._kept.clear()
            return compute(*args, **kwargs)
        output = compute(*args, **kwargs)
        tensors = _tensors(output)
        if tensors and all(_countable(t) and not t.requires_grad for t in tensors):
            self._kept[key] = _Kept(leaves, output, [t._version for t in tensors])
            self._constants.add_made(tensors)
            while len(self._kept) > _MOST_CALLS:
                self._kept.popitem(last=False)
        return output


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]

"""A run that several processes share: ``accelerate launch`` starts them, each takes every n-th item.

An item is one prompt with one seed in a batch of its own, so it comes out the same whoever runs it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from diffaccel.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those that share the run.

    Args:
        rank: from 0; process 0 sums up.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def here(cls) -> Processes:
        """Those that ``accelerate launch`` or ``torchrun`` started; one anywhere else, where nothing is initialised."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        import torch
        from accelerate import PartialState

        state = PartialState(cpu=not torch.accelerator.is_available())
        return cls(state.process_index, state.num_processes)

    @property
    def first(self) -> bool:
        """Whether this one prints and writes what belongs to all."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """The items that this process runs."""
        return list(items[self.rank :: self.count])

    def agree(self, value: T) -> T:
        """What process 0 has, in all of them; each waits for it."""
        return self.gather(value)[0]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in all of them; each waits for the last."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def require_folder(self, folder: Any) -> None:
        """Raise InputError where several processes would have no folder in common."""
        if self.count > 1 and folder is None:
            raise InputError(f"{self.count} processes share this run: give it a folder that all of them can reach")

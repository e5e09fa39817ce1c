"""The latents of a call: what its decoder was given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffaccel.errors import InputError
from diffaccel.eval.stages import around_method, other_networks
from diffaccel.eval.store import REFERENCE, Store


class Latents:
    """Filled by `captured`."""

    def __init__(self) -> None:
        self._given: Tensor | None = None

    def note(self, latents: Any) -> None:
        """Keep what the first decoder got; tiles and frames may be decoded one by one inside it."""
        if self._given is None and isinstance(latents, Tensor):
            self._given = latents.detach().clone()

    def array(self) -> np.ndarray:
        """float32.

        Raises:
            InputError: nothing was decoded.
        """
        if self._given is None:
            raise InputError("latent_cosine: this pipeline hands no latents to a decoder")
        return self._given.to("cpu", torch.float32).numpy()


@contextmanager
def captured(pipe: Any) -> Iterator[Latents]:
    """Watches the ``decode`` of the pipeline's networks inside the block."""
    latents = Latents()
    with ExitStack() as undo:
        for network in other_networks(pipe):
            if callable(getattr(network, "decode", None)):
                undo.callback(
                    around_method(network, "decode", lambda *args, **_: latents.note(args[0] if args else None))
                )
        yield latents


def keep(store: Store, item: int, latents: np.ndarray) -> None:
    """Keep the reference's."""
    store.write_array(store.folder / "latents" / f"{item:04d}.npy", latents)


def kept(store: Store, item: int) -> np.ndarray:
    """The reference's latents of an item.

    Raises:
        InputError: their file is lost.
    """
    file = store.folder / "latents" / f"{item:04d}.npy"
    try:
        return np.load(file)
    except (OSError, ValueError) as error:
        sample = store.folder / "outputs" / REFERENCE / f"{item:04d}.npy"
        raise InputError(f"{file} cannot be read ({error}); delete {sample}, so that the item is run again") from None

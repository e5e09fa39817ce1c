"""Padding at the end of the text, cut off where a mask hides it.

A hidden key has weight zero in every softmax, so that attention over the rest is the same but for the order of sums.
Whether a denoiser looks at its text in no other way is not assumed: the first call of each shape is made both ways.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from diffaccel.latents import output_tensors
from diffaccel.root import Change

_MOST = 8  # texts whose length is remembered

# How far the outputs of both ways may be apart, relative to the largest number: sums of another length.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.float16: 1e-2, torch.bfloat16: 3e-2}


class Trim:
    """Of one denoiser.

    Attributes:
        cut: tokens of text that were left out, over all calls. note: why nothing is cut, where that is so.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[int, ...], tuple[Tensor, Tensor, Tensor, Tensor | None]] = OrderedDict()
        self._works: dict[tuple[Any, ...], bool] = {}
        self.cut = 0
        self.note: str | None = None

    def __call__(self, arguments: Mapping[str, Any], run: Callable[[Change], Any]) -> Change | None:
        """How to change the arguments of a call; None: not at all. ``run`` makes the call with changed arguments."""
        found = _text_and_mask(arguments)
        if found is None:
            return None
        (text_name, text), (mask_name, mask) = found
        shorter = self._shorter(text, mask)
        if shorter is None:
            return None

        def change(name: str, value: Any) -> Any:
            return shorter[0] if name == text_name else shorter[1] if name == mask_name else value

        shape = tuple(tuple(v.shape) for v in arguments.values() if isinstance(v, Tensor))
        if shape not in self._works:
            self._works[shape] = _same(run, change)
            if not self._works[shape]:
                self.note = "padding is not cut off the text: the denoiser looks at it in spite of the mask"
        if not self._works[shape]:
            return None
        self.cut += text.shape[0] * (text.shape[1] - shorter[0].shape[1])
        return change

    def _shorter(self, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Text without padding and its mask (None where that hides nothing any more); None if there is none to cut.

        The mask is read from the device once for each text; later calls get the very same tensors.
        """
        if text.is_inference() or mask.is_inference():
            return None
        key = (text.data_ptr(), text._version, mask.data_ptr(), mask._version, *text.shape)
        if key not in self._known:
            seen = mask.detach().bool().any(0).nonzero()
            length = int(seen[-1]) + 1 if len(seen) else 0
            short, rest = text, mask
            if 0 < length < text.shape[1]:
                short, rest = text[:, :length].contiguous(), mask[:, :length].contiguous()
            self._known[key] = text, mask, short, None if bool(rest.bool().all()) else rest
            while len(self._known) > _MOST:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        _, _, short, left = self._known[key]
        return None if short is text else (short, left)


def _text_and_mask(arguments: Mapping[str, Any]) -> tuple[tuple[str, Tensor], tuple[str, Tensor]] | None:
    """The text [B, L, C] and its mask [B, L], by name and shape; None where there is no such pair, or several."""
    texts = [
        (n, v) for n, v in arguments.items() if "encoder_hidden_states" in n and isinstance(v, Tensor) and v.ndim == 3
    ]
    masks = [(n, v) for n, v in arguments.items() if "mask" in n and isinstance(v, Tensor) and v.ndim == 2]
    pairs = [(t, m) for t in texts for m in masks if t[1].shape[:2] == m[1].shape]
    if len(pairs) != 1 or pairs[0][1][1].is_meta or isinstance(pairs[0][1][1], torch._subclasses.FakeTensor):
        return None
    return pairs[0]


def _same(run: Callable[[Change], Any], change: Change) -> bool:
    expected = output_tensors(run(lambda name, value: value))
    try:
        got = output_tensors(run(change))
    except Exception:  # the denoiser needs the text in full, or a mask
        return False
    return len(got) == len(expected) and all(
        a.shape == b.shape
        and bool((a.float() - b.float()).abs().max() <= _TOLERANCE.get(b.dtype, 1e-4) * b.float().abs().max())
        for a, b in zip(got, expected, strict=True)
    )

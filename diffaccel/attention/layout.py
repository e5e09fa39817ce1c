"""How the tokens of an attention call lie: a grid of image tokens, and text tokens before or after it.

The arguments of the denoiser tell the grid: latents and patch size, coordinates given per token, or sizes given as
numbers. Where text stands no argument tells; `span_of` reads it from a probe that changes the latents only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Grid = tuple[int, ...]

SIZES = ("num_frames", "height", "width")
"""Arguments that give the grid as numbers."""

# Models that round the number of image tokens up do so to a multiple of at most this.
_LONGEST_PADDING = 128
_LEVELS = 7
_USUAL_PATCHES = ((1, 1, 1), (1, 2, 2), (2, 2, 2), (1, 4, 4), (1, 8, 8), (1, 16, 16))


@dataclass(frozen=True)
class Layout:
    """The tokens of one attention call: ``before`` others, then ``grid`` in row-major order, then ``after`` others.

    ``source`` says where the grid is from; ``note`` what could not be found out (empty when all is known).
    """

    grid: Grid
    before: int
    after: int
    source: str
    note: str = ""

    @property
    def tokens(self) -> int:
        return self.before + math.prod(self.grid) + self.after

    def __str__(self) -> str:
        text = [f"{n} {side}" for n, side in ((self.before, "before"), (self.after, "after")) if n]
        grid = " x ".join(map(str, self.grid))
        return f"{grid} ({self.source}){', other tokens: ' + ' and '.join(text) if text else ''}"


@dataclass(frozen=True)
class Span:
    """Which rows of a call depend on the latents: ``begin`` to ``end``, the same for every sample as far as that goes.

    ``scattered``: they do not form one range. ``end == 0``: none does.
    """

    begin: int
    end: int
    scattered: bool = False


def span_of(plain: Tensor, perturbed: Tensor) -> Span:
    """The rows that changed.

    Args:
        plain: [B, N], one number for each query of a call.
        perturbed: the same after the latents alone were changed.
    """
    changed = ((plain - perturbed).abs() > 1e-5 * plain.abs().amax(1, keepdim=True)).cpu()
    if not changed.any():
        return Span(0, 0)
    spans = []
    scattered = False
    for rows in changed:  # captions of a batch may differ in length, and so where the image begins
        index = rows.nonzero()[:, 0].tolist()
        if index:
            spans.append((index[0], index[-1] + 1))
            scattered |= len(index) < 0.9 * (index[-1] + 1 - index[0])
    begin = max(a for a, _ in spans)
    return Span(begin, min(begin + min(b - a for a, b in spans), changed.shape[1]), scattered)


class Geometry:
    """The token grids that one denoiser call's arguments allow.

    Args:
        arguments: by parameter name.
        config: the denoiser's config, for patch size and channels; may be empty.
        latents: name of the argument that holds the latents.
    """

    def __init__(self, arguments: Mapping[str, Any], config: Mapping[str, Any], latents: str) -> None:
        self._arguments = arguments
        self._patches = _config_patches(config)
        self._volumes = list(_volumes(arguments.get(latents), config))

    def grid(self, tokens: int) -> tuple[Grid, str] | None:
        """The grid of a call with exactly this many tokens, and where it is from."""
        return self._from_numbers(tokens) or self._from_coordinates(tokens, 0, tokens) or self._from_latents(tokens)

    def layout(self, tokens: int, span: Span | None, known: Sequence[Layout] = ()) -> Layout | None:
        """The layout of a call with ``tokens`` tokens.

        Args:
            span: what a probe found; None: not probed.
            known: layouts of other calls of the same forward, whose text may stand here too.

        Returns:
            None where only a probe can tell.
        """
        if span is None or (span.begin, span.end) == (0, tokens):
            exact = self.grid(tokens)
            if exact is not None:
                return Layout(exact[0], 0, 0, exact[1])
        if span is None:
            return None
        if span.scattered:
            return Layout((tokens,), 0, 0, "one row", "image tokens are scattered among others; text is not kept dense")
        if (span.begin, span.end) == (0, tokens):  # after the first mixing of text and image every row depends on both
            for other in known:
                inner = self.grid(tokens - other.before - other.after)
                if other.before + other.after and inner:
                    return Layout(inner[0], other.before, other.after, inner[1])
        length = span.end - span.begin
        found = (
            self._from_numbers(length)
            or self._from_coordinates(length, span.begin, tokens)
            or self._from_latents(length, guess_patch=True)
        )
        if found is not None:
            return Layout(found[0], span.begin, tokens - span.end, found[1])
        for grid, source in self._top_grids():
            if 0 < length - math.prod(grid) < _LONGEST_PADDING:
                return Layout(grid, span.begin, tokens - span.begin - math.prod(grid), source + ", padded")
        note = f"no grid of {length} tokens in the arguments: taken as one row"
        return Layout((length,), span.begin, tokens - span.end, "one row", note)

    def _from_numbers(self, tokens: int) -> tuple[Grid, str] | None:
        sizes = [v for n in SIZES if isinstance(v := self._arguments.get(n), int)]
        if len(sizes) > 1 and math.prod(sizes) == tokens:
            return _squeeze(sizes), "sizes given"
        for name, value in self._arguments.items():
            for numbers in _number_lists(value):
                if math.prod(numbers) == tokens:
                    return _squeeze(numbers), name
        return None

    def _from_coordinates(self, tokens: int, offset: int, total: int) -> tuple[Grid, str] | None:
        for name, value in self._arguments.items():
            if not isinstance(value, Tensor) or value.ndim not in (2, 3) or not 2 <= value.shape[-1] <= 4:
                continue
            rows = value[0] if value.ndim == 3 else value
            if len(rows) not in (tokens, total) or is_fake(rows):
                continue
            rows = rows[offset : offset + tokens] if len(rows) == total else rows
            axes = [axis.unique(return_inverse=True) for axis in rows.detach().cpu().unbind(1)]
            sizes = [len(values) for values, _ in axes]
            if math.prod(sizes) != tokens:
                continue
            place = torch.zeros(tokens, dtype=torch.long)
            for size, (_, index) in zip(sizes, axes, strict=True):
                place = place * size + index
            if bool((place == torch.arange(tokens)).all()):
                return _squeeze(sizes), name
        return None

    def _from_latents(self, tokens: int, guess_patch: bool = False) -> tuple[Grid, str] | None:
        patches = [*self._patches, *_USUAL_PATCHES] if guess_patch else self._patches or [(1, 1, 1)]
        for level in range(_LEVELS):
            for volume in self._volumes:
                for patch in patches:
                    for grid in _cut(volume, patch, level):
                        if math.prod(grid) == tokens:
                            return _squeeze(grid), "latents"
        return None

    def _top_grids(self) -> Iterator[tuple[Grid, str]]:
        for volume in self._volumes:
            for patch in self._patches or _USUAL_PATCHES:
                yield from ((_squeeze(grid), "latents") for grid in _cut(volume, patch, 0))


def is_fake(tensor: Tensor) -> bool:
    """Whether there is no data to look at: FakeTensorMode, or the meta device."""
    return isinstance(tensor, torch._subclasses.FakeTensor) or tensor.device.type == "meta"


def _config_patches(config: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """Patch sizes (frames, height, width) that the config names, in its order."""
    frames = next((v for k, v in config.items() if k.endswith("patch_size_t") and isinstance(v, int)), 1)
    patches = []
    for name, value in config.items():
        if not name.endswith("patch_size") or "_f_" in name:
            continue
        size = [value] if isinstance(value, int) else list(value) if isinstance(value, list | tuple) else []
        if not size or not all(isinstance(s, int) and s > 0 for s in size):
            continue
        if len(size) == 3:
            patches.append((size[0], size[1], size[2]))
        else:
            patches.append((frames, size[0], size[-1]))
    return patches


def _volumes(latents: Any, config: Mapping[str, Any]) -> Iterator[Grid]:
    """(H, W) or (F, H, W) of the latents, likeliest first: the channels may be any axis but the batch."""
    if isinstance(latents, list | tuple) and latents and isinstance(latents[0], Tensor):
        shape = tuple(latents[0].shape)
        is_index = False
    elif isinstance(latents, Tensor):
        shape = tuple(latents.shape[1:])
        is_index = not latents.is_floating_point()
    else:
        return
    if is_index:  # token ids have no channels
        if len(shape) in (2, 3):
            yield shape
        return
    if len(shape) not in (3, 4):  # tokens already packed
        return
    channels = {v for k, v in config.items() if k in ("in_channels", "in_visual_dim") and isinstance(v, int)}
    order = sorted(range(len(shape)), key=lambda axis: (shape[axis] not in channels, axis > 0, axis != len(shape) - 1))
    for axis in order:
        yield shape[:axis] + shape[axis + 1 :]


def _cut(volume: Grid, patch: tuple[int, int, int], level: int) -> Iterator[Grid]:
    """Grids of a volume cut into patches and halved ``level`` times: all of it, one frame, the frames of one place."""
    *frames, height, width = volume
    for rounded in (_ceil, _floor):  # padded up to whole patches, or the rest left out
        h = _ceil(rounded(height, patch[1]), 2**level)
        w = _ceil(rounded(width, patch[2]), 2**level)
        t = [rounded(f, patch[0]) for f in frames]
        yield (*t, h, w)
        if t:
            yield (h, w)
            yield (t[0],)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _floor(a: int, b: int) -> int:
    return a // b


def _squeeze(sizes: Sequence[int]) -> Grid:
    """Without axes of one token."""
    return tuple(int(s) for s in sizes if s > 1) or (1,)


def _number_lists(value: Any, depth: int = 3) -> Iterator[Sequence[int]]:
    """Every list of two or three whole numbers inside nested lists."""
    if not isinstance(value, list | tuple) or depth == 0:
        return
    if len(value) in (2, 3) and all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in value):
        yield value
        return
    for item in value:
        yield from _number_lists(item, depth - 1)

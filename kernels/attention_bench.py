"""How fast a block-sparse attention call is beside dense ones, and how near it comes to the bound 1 / density."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffaccel.kernels.block_pattern import BlockPattern
from diffaccel.kernels.block_sparse import block_sparse_attention, path_for
from diffaccel.kernels.window_mask import window_blocks


@dataclass(frozen=True)
class Setting:
    """One table.

    Args:
        tokens: lengths.
        densities: kept shares of blocks.
        paths: of `block_sparse_attention`, or ``auto``.
        pattern: ``random`` blocks for each head, a ``window`` over an image, or ``video``, over 4 frames.
        reorder: also a random order for each head, the hardest case: nothing lies side by side.
        rivals: also dense attention by other kernels that are installed, on CUDA.
        cpu_time: time spent computing instead of time passed, for a machine that others use too.
    """

    tokens: Sequence[int]
    densities: Sequence[float]
    paths: Sequence[str] = ("auto",)
    pattern: str = "random"
    reorder: bool = True
    rivals: bool = True
    block_size: int = 64
    batch: int = 1
    heads: int = 8
    head_size: int = 64
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    repeats: int = 9
    cpu_time: bool = False


@dataclass(frozen=True)
class Measured:
    """One way at one length and density, beside PyTorch's dense attention.

    Args:
        bound: what leaving out can gain at most; 1 for dense ways.
        error: largest difference from exact attention over the kept keys, on the last block of queries.
    """

    tokens: int
    density: float
    way: str
    dense_ms: float
    ms: float
    bound: float
    error: float

    @property
    def gain(self) -> float:
        return self.dense_ms / self.ms

    @property
    def share(self) -> float:
        """Of the bound."""
        return self.gain / self.bound


def measure(setting: Setting) -> Iterator[Measured]:
    """Every row of the table as it is measured: lengths, then densities, then ways."""
    for tokens in setting.tokens:
        # As diffusers gives them: [B, N, H, D] seen as [B, H, N, D].
        shape = (setting.batch, tokens, setting.heads, setting.head_size)
        q, k, v = (torch.randn(shape, device=setting.device, dtype=setting.dtype).transpose(1, 2) for _ in range(3))
        dense = partial(F.scaled_dot_product_attention, q, k, v)
        for name, rival in rivals(q, k, v) if setting.rivals else ():
            dense_ms, ms = medians([dense, rival], setting)
            error = float((rival()[:, :, -1] - dense()[:, :, -1]).abs().max())
            yield Measured(tokens, 1.0, name, dense_ms, ms, 1.0, error)
        for density in setting.densities:
            pattern = make_pattern(setting, tokens, density)
            exact = _exact_rows(q, k, v, pattern)
            for path in setting.paths:
                asked = None if path == "auto" else path
                sparse = partial(block_sparse_attention, q, k, v, pattern, path=asked)
                error = float((_last_rows(sparse(), pattern) - exact).abs().max())
                dense_ms, ms = medians([dense, sparse], setting)
                way = str(path_for(q, k, v, pattern, path=asked))
                yield Measured(tokens, pattern.density, way, dense_ms, ms, 1 / pattern.density, error)


def rivals(q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Dense attention by other kernels that run here on CUDA: PyTorch's by name, and SageAttention where installed."""
    if not q.is_cuda:
        return

    def by(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    ways: dict[str, Callable[[], Tensor]] = {
        "dense, flash": partial(by, SDPBackend.FLASH_ATTENTION),
        "dense, cuDNN": partial(by, SDPBackend.CUDNN_ATTENTION),
    }
    if find_spec("sageattention") is not None:
        from sageattention import sageattn  # type: ignore[import-not-found]

        ways["dense, SageAttention"] = partial(sageattn, q.contiguous(), k.contiguous(), v.contiguous())
    for name, way in ways.items():
        try:
            way()
        except (RuntimeError, AssertionError, ValueError):  # not for this card, dtype or head size
            continue
        yield name, way


def make_pattern(setting: Setting, tokens: int, density: float) -> BlockPattern:
    """Blocks as the setting says; the same in every run."""
    frames = 4 if setting.pattern == "video" and tokens % 4 == 0 else 1
    height = next(h for h in range(int((tokens // frames) ** 0.5), 0, -1) if tokens // frames % h == 0)
    grid = (frames, height, tokens // frames // height)
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(setting.heads, tokens, generator=generator).argsort(-1) if setting.reorder else None
    if setting.pattern == "random":
        n = -(-tokens // setting.block_size)
        rank = torch.rand(setting.heads, n, n, generator=generator).argsort(-1).argsort(-1)
        mask = rank < max(round(density * n), 1)
    else:
        mask = window_blocks(grid, density=density, block_size=setting.block_size)
    return BlockPattern.from_mask(mask, setting.block_size, order).to(setting.device)


def medians(calls: Sequence[Callable[[], Tensor]], setting: Setting) -> list[float]:
    """Median milliseconds of each call, measured in turn so that a busy moment hits all of them."""
    clock = time.process_time if setting.cpu_time else time.perf_counter
    seconds: list[list[float]] = [[] for _ in calls]
    for repeat in range(setting.repeats + 1):
        for call, taken in zip(calls, seconds, strict=True):
            start = clock()
            call()
            if setting.device.startswith("cuda"):
                torch.cuda.synchronize()
            if repeat > 0:
                taken.append(clock() - start)
    return [1e3 * statistics.median(taken) for taken in seconds]


def _last_rows(out: Tensor, pattern: BlockPattern) -> Tensor:
    """The last block of queries of each head, in the pattern's order."""
    last = range((pattern.keep.shape[1] - 1) * pattern.block_size, out.shape[2])
    if pattern.order is None:
        return out[:, :, last]
    index = pattern.order[:, last].long()[None, :, :, None].expand(len(out), out.shape[1], -1, out.shape[3])
    return out.gather(2, index)


def _exact_rows(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern) -> Tensor:
    """What they should be, without N x N scores."""
    keep = pattern.keep[:, -1].repeat_interleave(pattern.block_size, 1)[:, : q.shape[2]].expand(q.shape[1], -1)
    if pattern.order is not None:  # back to the tokens' own places
        keep = torch.zeros_like(keep).scatter(1, pattern.order.long().expand_as(keep), keep)
    return F.scaled_dot_product_attention(_last_rows(q, pattern), k, v, attn_mask=keep[None, :, None])

"""Which path a block-sparse attention call takes, and the paths.

- ``triton``: our kernel (`sparse_attention`); CUDA, or asked for in Triton's interpreter.
- ``cpp``: our loop in C++ (`block_cpp`), on CPUs with a compiler.
- ``flex``: compiled ``flex_attention`` (`block_flex`).
- ``blocks``, ``dense``: plain PyTorch (`block_dense`), any device.

On CUDA the first use at a shape class checks and times triton, flex and dense, and the fastest correct one is used from
then on. On CPU that is done with cpp, blocks, dense and, where it has been compiled for these arguments, flex, up to
4096 tokens; beyond, the first that can run does. flex is not compiled there only to be timed: that takes 20 s, and at
its best (AVX-512, 2 threads, float32, 4096 tokens, density 1/4, bench/attention.py) it takes 1.7 to 2.6 times as long
as blocks.

Where the pattern reorders tokens, all but cpp are given reordered copies, and their output is put back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from diffaccel.kernels._candidates import Trial, choose, may_measure, override, token_bucket, worst_row_error
from diffaccel.kernels.block_cpp import cpp, cpp_refused
from diffaccel.kernels.block_dense import as_stored, blocks, both, dense, sdpa
from diffaccel.kernels.block_flex import COMPILED, FAILED, flex, key_of, mask_form, refused
from diffaccel.kernels.block_pattern import BlockPattern

OPERATOR = "block_sparse_attention"
CPP = ("cpp",)  # the key of the C++ loop among what failed
PATHS = ("triton", "cpp", "flex", "blocks", "dense")
_LABELS = {"triton": "Triton kernel", "cpp": "C++ loop", "flex": "flex", "blocks": "gathered blocks", "dense": "dense"}
# Classes of arguments for which flex is compiled only to be timed: each takes many seconds, and a pipeline has few.
_FLEX_TRIALS = 8
# Elements of a token mask [H or 1, N, M] beyond which dense attention is no candidate: 24 heads of FLUX at 1024 x 1024
# fit, and take 1.5 GB with the copy in 16 bits that attention makes.
_MASK_ELEMENTS = 2**29


class Path(NamedTuple):
    """The way a call takes and why; ``str`` gives for example ``"flex (compiled)"``."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{_LABELS[self.name]} ({self.reason})"


def choose_path(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, attn_mask: Tensor | None, scale: float | None, path: str
) -> Path:
    """The path for a call with these arguments; ``path`` is one of PATHS or ``"auto"``."""
    asked, reason = (path, "asked for") if path != "auto" else (override(OPERATOR), "set by DIFFACCEL_KERNELS")
    if asked is not None and asked not in PATHS:
        raise ValueError(f"unknown path {asked!r} of {OPERATOR}; there are {', '.join(PATHS)}")
    if asked in ("blocks", "dense"):
        return Path(asked, reason)
    if asked == "triton":
        obstacle = triton_refused(q, v, pattern, scale)
        return Path("triton", reason) if obstacle is None else Path("blocks", obstacle)
    if asked == "cpp":
        obstacle = FAILED.get(CPP) or cpp_refused(q, attn_mask)
        return Path("cpp", reason) if obstacle is None else Path("blocks", obstacle)
    if asked == "flex":
        obstacle = refused(q, k, v, pattern, attn_mask)
        return Path("flex", "compiled") if obstacle is None else Path("blocks", obstacle)
    if pattern.whole:
        return Path("dense", "every block is kept")
    N, M = q.shape[2], k.shape[2]
    if q.device.type == "cuda":
        names = candidates(q, k, v, pattern, attn_mask, scale)
    elif pattern.block_size > N:
        return Path("blocks", "a single row of blocks")
    else:
        loops = ("cpp",) if FAILED.get(CPP) is None and cpp_refused(q, attn_mask) is None else ()
        if N * M > 4096**2:
            return Path((*loops, "blocks")[0], "the choice on CPU")
        compiled = key_of(q, k, v, pattern, attn_mask) in COMPILED and refused(q, k, v, pattern, attn_mask) is None
        names = (*loops, "blocks", *(["flex"] if compiled else []), "dense")
    return fastest(names, q, k, v, pattern, attn_mask, scale)


def candidates(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, attn_mask: Tensor | None, scale: float | None
) -> tuple[str, ...]:
    """What is worth timing on CUDA; the first runs where nothing can be timed."""
    names = ["triton"] if triton_refused(q, v, pattern, scale) is None else []
    known = key_of(q, k, v, pattern, attn_mask) in COMPILED
    if refused(q, k, v, pattern, attn_mask) is None and (known or len(COMPILED) < _FLEX_TRIALS):
        names.append("flex")
    fits = len(pattern.keep) * q.shape[2] * k.shape[2] <= _MASK_ELEMENTS
    # One that needs no compiler is always there.
    return (*names, *(["blocks"] if not names or not fits else []), *(["dense"] if fits else []))


def fastest(
    names: tuple[str, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    attn_mask: Tensor | None,
    scale: float | None,
) -> Path:
    """The fastest of ``names`` at this shape, as far as it may be measured."""
    (B, H, N, D), (Hkv, M) = q.shape, k.shape[1:3]
    shape = (
        *(token_bucket(N), token_bucket(M), B, H, Hkv, D, v.shape[3], q.dtype, pattern.block_size),
        f"density {round(16 * pattern.density) / 16}",
        f"{len(pattern.rows) > 0} {mask_form(attn_mask)}{'' if pattern.order is None else ' reordered'}",
    )
    name = choose(OPERATOR, shape, q.device, names, lambda: _trial(names, q, k, v, pattern, attn_mask, scale), names[0])
    return Path(name, "measured" if may_measure(q.device) else "not measured")


def run_triton(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, attn_mask: Tensor | None, scale: float | None
) -> Tensor:
    """Our kernel, imported, with Triton, on first use."""
    from diffaccel.kernels.sparse_attention import sparse_attention

    return sparse_attention(q, k, v, pattern.kv_num_blocks, pattern.kv_indices, pattern.block_size, attn_mask, scale)[0]


def run_flex(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, attn_mask: Tensor | None, scale: float | None
) -> Tensor:
    """Compiled flex_attention, its output stored like that of the others."""
    return as_stored(flex(q, k, v, pattern, attn_mask, scale))


RUN: dict[str, Callable[..., Tensor]] = {
    "triton": run_triton, "cpp": cpp, "flex": run_flex, "blocks": blocks, "dense": dense
}  # fmt: skip


def run(
    name: str, q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, attn_mask: Tensor | None, scale: float | None
) -> Tensor:
    """One path, with the tokens in the pattern's order where it has one."""
    if pattern.order is None or pattern.inverse is None or name == "cpp":
        return RUN[name](q, k, v, pattern, attn_mask, scale)
    q, k, v = (reordered(x, pattern.order) for x in (q, k, v))
    return reordered(RUN[name](q, k, v, pattern, reordered_mask(attn_mask, pattern.order), scale), pattern.inverse)


def reordered(x: Tensor, order: Tensor) -> Tensor:
    """``x`` [B, H or Hkv, N, D] with the tokens of each head in another order, ``order`` [H or 1, N]."""
    if len(order) > 1 and x.shape[1] != len(order):  # heads that share keys, but not their order
        x = x.repeat_interleave(len(order) // x.shape[1], dim=1)
    if x.is_cuda and find_spec("triton") is not None:
        from diffaccel.kernels.permute_tokens import permute_tokens

        return permute_tokens(x, order)
    B, H, N, D = x.shape
    index = order.long()[None, :, :, None].expand(B, H, N, D)
    return as_stored(x.gather(2, index))


def reordered_mask(attn_mask: Tensor | None, order: Tensor) -> Tensor | None:
    """A mask [B or 1, H or 1, N or 1, N] over reordered tokens."""
    if attn_mask is None:
        return None
    B, H, rows, N = *attn_mask.shape[:3], order.shape[1]
    attn_mask = attn_mask.expand(B, max(H, len(order)), rows, N)
    index = order.long()[None, :, None].expand(B, attn_mask.shape[1], rows, N)
    attn_mask = attn_mask.gather(3, index)
    return attn_mask if rows == 1 else attn_mask.gather(2, index[:, :, :1].mT.expand_as(attn_mask))


def triton_refused(q: Tensor, v: Tensor, pattern: BlockPattern, scale: float | None) -> str | None:
    """Why our kernel cannot take this call, None if it can. Imports Triton only if nothing else stands in the way."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"no Triton kernel for {q.dtype}"
    if max(q.shape[3], v.shape[3]) > 256:
        return "no Triton kernel for heads larger than 256"
    if pattern.block_size % 16:
        return f"no Triton kernel for blocks of {pattern.block_size}"
    if scale is not None and scale < 0:
        return "no Triton kernel for a negative scale"
    if find_spec("triton") is None:
        return "Triton is not installed"
    from diffaccel.kernels._launch import runs_triton

    return None if runs_triton(q) else f"no Triton on {q.device.type}"


def _trial(
    names: tuple[str, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    attn_mask: Tensor | None,
    scale: float | None,
) -> Trial:
    generator = torch.Generator(q.device).manual_seed(0)
    q, k, v = (torch.empty_like(x).normal_(generator=generator) for x in (q, k, v))
    tolerance = 1e-4 if q.dtype == torch.float32 else 5e-2
    N, M, block_size = q.shape[2], k.shape[2], pattern.block_size
    # The queries that are compared: all, or as many as the mask for the comparison may have.
    rows = torch.arange(0, N, -(-len(pattern.keep) * N * M // _MASK_ELEMENTS), device=q.device)
    order = pattern.order
    oq, ok, ov = (x if order is None else reordered(x, order) for x in (q, k, v))
    mask = attn_mask if order is None else reordered_mask(attn_mask, order)
    keep = pattern.keep[:, rows // block_size].repeat_interleave(block_size, 2)[None, ..., :M]
    of_rows = mask[:, :, rows] if mask is not None and mask.shape[2] > 1 else mask
    expected = sdpa(oq[:, :, rows], ok, ov, both(of_rows, keep), scale)

    def error(result: Tensor) -> float:
        result = result if order is None else reordered(result, order)
        return worst_row_error(result[:, :, rows], expected)

    return Trial(
        runs={name: partial(run, name, q, k, v, pattern, attn_mask, scale) for name in names},
        error=error,
        tolerance=dict.fromkeys(names, tolerance),
        baseline=lambda: sdpa(q, k, v, attn_mask, scale),
    )

"""Block-sparse attention through compiled ``flex_attention``, one compiled function for each class of arguments."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from diffaccel.kernels.block_pattern import BlockPattern

# The compiled functions, one for each class of arguments that inductor would specialise on, and what failed to compile.
COMPILED: dict[tuple, Callable[..., Tensor]] = {}
FAILED: dict[tuple, str] = {}


def _template(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num: Tensor,
    indices: Tensor,
    attn_mask: Tensor | None,
    scale: float,
    block_size: int,
    enable_gqa: bool,
) -> Tensor:
    masked = attn_mask is not None and attn_mask.dtype == torch.bool
    cpu = q.device.type == "cpu"
    attends: Callable[..., Tensor] = lambda b, h, i, j: i >= 0  # noqa: E731
    adds: Callable[..., Tensor] | None = None
    if attn_mask is not None:
        mask = attn_mask
        if masked:
            attends = lambda b, h, i, j: mask[b, h, i, j]  # noqa: E731
        else:
            adds = lambda score, b, h, i, j: score + mask[b, h, i, j]  # noqa: E731
    # CUDA skips the mask in blocks listed as full; the CPU template takes partial blocks only.
    full = not masked and not cpu
    blocks = BlockMask.from_kv_blocks(
        kv_num_blocks=torch.zeros_like(num) if full else num,
        kv_indices=torch.zeros_like(indices) if full else indices,
        full_kv_num_blocks=num if full else None,
        full_kv_indices=indices if full else None,
        BLOCK_SIZE=block_size,
        mask_mod=attends,
        seq_lengths=(q.shape[2], k.shape[2]),
        compute_q_blocks=False,
    )
    options: Any = {}
    if cpu and attn_mask is None:
        # The CPU template would otherwise apply the trivial mask to every block. On CUDA full blocks skip it.
        options = {"SKIP_MASK_SCORE": True}
    elif not cpu and block_size < 128:
        options = {"BLOCK_M": block_size, "BLOCK_N": block_size}
    return flex_attention(
        q, k, v, score_mod=adds, block_mask=blocks, scale=scale, enable_gqa=enable_gqa, kernel_options=options
    )


def flex(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, attn_mask: Tensor | None, scale: float | None
) -> Tensor:
    key = key_of(q, k, v, pattern, attn_mask)
    if key not in COMPILED:
        # Dynamo counts recompiles by code object: each class gets its own. With fullgraph, going past the limit raises
        # instead of running eagerly with N x M scores.
        code = _template.__code__.replace(co_name=f"flex_{len(COMPILED)}")
        COMPILED[key] = torch.compile(FunctionType(code, globals()), dynamic=True, fullgraph=True)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.no_grad():
        return COMPILED[key](
            q, k, v, pattern.kv_num_blocks, pattern.kv_indices, attn_mask, scale, pattern.block_size,
            q.shape[1] != k.shape[1],
        )  # fmt: skip


def key_of(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, attn_mask: Tensor | None) -> tuple:
    """What inductor specialises on although sizes are dynamic: heads, sizes of 1, equal sizes, broadcast strides."""
    heads, n, m = pattern.keep.shape
    ones = tuple(size == 1 for size in (*q.shape[:1], q.shape[2], k.shape[2], heads, n, m))
    strides = tuple(stride == 0 for stride in attn_mask.stride()) if attn_mask is not None else ()
    return (
        q.device, q.dtype, q.shape[1], k.shape[1], q.shape[3], v.shape[3], pattern.block_size, ones,
        q.shape[2] == k.shape[2], mask_form(attn_mask), strides, tuple(x.is_contiguous() for x in (q, k, v)),
    )  # fmt: skip


def refused(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, attn_mask: Tensor | None) -> str | None:
    """Why flex cannot take this call, None if it can."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"no flex for {q.dtype}"
    if q.device.type == "cpu" and not has_compiler():
        return "no C++ compiler"
    if q.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "no AVX2"
    if q.device.type == "cpu" and attn_mask is not None and attn_mask.shape[-2] == 1:
        # torch 2.14 generates C++ that does not compile (cur_qSplitSize3 undeclared).
        return "no flex for a mask without query axis on CPU"
    if q.device.type == "cuda" and (pattern.block_size < 16 or pattern.block_size & (pattern.block_size - 1)):
        return f"no flex for blocks of {pattern.block_size}"
    if q.device.type not in ("cpu", "cuda"):
        return f"no flex on {q.device.type}"
    return FAILED.get(key_of(q, k, v, pattern, attn_mask))


def has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++", "cl"))


def mask_form(attn_mask: Tensor | None) -> tuple:
    if attn_mask is None:
        return ()
    return (attn_mask.dtype, *(size == 1 for size in attn_mask.shape))

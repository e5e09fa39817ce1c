"""Block-sparse attention: O_i = sum_j softmax_j(q_i k_j * scale + mask_ij) v_j over the keys j in kept blocks.

A block is ``block_size`` queries by ``block_size`` keys; the last block of a side may be partial. Blocks that are not
kept are never read. A query without any kept key gives zeros. After the static masks of PAROAttention
(arXiv:2506.16054) and the windows of DiTFastAttn (arXiv:2406.08552), for any masks over any lengths.

There are several paths behind the op ``diffaccel::block_sparse_attention``; `block_choice` says which one is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffaccel.kernels._candidates import warn_once
from diffaccel.kernels.block_choice import CPP, PATHS, Path, choose_path, reordered, reordered_mask, run
from diffaccel.kernels.block_flex import FAILED, key_of
from diffaccel.kernels.block_pattern import BlockPattern, inverse_order, token_mask


def block_sparse_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    *,
    block_size: int,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    order: Tensor | None = None,
) -> Tensor:
    """The definition, with all N x M scores in float32 (float64 for float64). Arguments: ``block_sparse_attention``,
    and the pattern's ``order``.
    """
    N, M = q.shape[2], k.shape[2]
    if order is not None:
        q, k, v = (reordered(x, order) for x in (q, k, v))
        mask = reordered_mask(_mask_4d(q, attn_mask), order)
        out = block_sparse_attention_ref(
            q, k, v, block_mask, block_size=block_size, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
        )
        return reordered(out, inverse_order(order))
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q.to(dtype) @ k.to(dtype).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    keep = token_mask(block_mask, block_size, N, M)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        keep = keep & attn_mask
    elif attn_mask is not None:
        scores = scores + attn_mask
    scores = scores.masked_fill(~keep, float("-inf"))
    some = scores.amax(-1, keepdim=True) > float("-inf")
    return torch.softmax(scores, -1).where(some, 0).matmul(v.to(dtype)).to(q.dtype)


def path_for(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, attn_mask: Tensor | None = None, path: str | None = None
) -> Path:
    """The path ``block_sparse_attention`` takes for these arguments; after a call, the one it took."""
    return choose_path(q, k, v, pattern, _mask_4d(q, attn_mask), None, path or "auto")


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern | Tensor,
    *,
    block_size: int | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    path: str | None = None,
) -> Tensor:
    """Attention over the kept blocks; differentiable, then always on the ``blocks`` path.

    Args:
        q: [B, H, N, D], any strides.
        k: [B, H or Hkv, M, D]. Hkv < H needs ``enable_gqa`` and must divide H.
        v: [B, H or Hkv, M, Dv].
        pattern: made once by ``BlockPattern.from_mask``, on the device of ``q``. A bool mask [H or 1, ceil(N / bs),
            ceil(M / bs)] works too, with ``block_size``; it is analysed on the host in every call.
        attn_mask: as in ``scaled_dot_product_attention``: bool (True = attend) or additive, broadcastable to
            [B, H, N, M]. Keys it excludes are read, as there.
        scale: factor on the scores, D ** -0.5 unless given.
        path: ``"triton"``, ``"cpp"``, ``"flex"``, ``"blocks"`` or ``"dense"`` instead of the choice made here (also by
            the environment: ``DIFFACCEL_KERNELS=block_sparse_attention=blocks``). Where the first three cannot run,
            ``"blocks"`` does.

    Returns:
        [B, H, N, Dv] in the dtype of ``q``, stored as [B, N, H, Dv].
    """
    if isinstance(pattern, Tensor):
        if block_size is None:
            raise ValueError("a bool mask as pattern needs block_size")
        pattern = BlockPattern.from_mask(pattern, block_size)
    _check(q, k, v, pattern, attn_mask, enable_gqa, path)
    attn_mask = _mask_4d(q, attn_mask)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, attn_mask)):
        return run("blocks", q, k, v, pattern, attn_mask, scale)
    p = pattern
    tensors = (p.keep, p.kv_num_blocks, p.kv_indices, p.ranges, p.rows, p.order, p.inverse)
    return torch.ops.diffaccel.block_sparse_attention(q, k, v, *tensors, attn_mask, p.block_size, scale, path or "auto")


@torch.library.custom_op("diffaccel::block_sparse_attention", mutates_args=())
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    ranges: Tensor,
    rows: Tensor,
    order: Tensor | None,
    inverse: Tensor | None,
    attn_mask: Tensor | None,
    block_size: int,
    scale: float | None,
    path: str,
) -> Tensor:
    pattern = BlockPattern(keep, block_size, kv_num_blocks, kv_indices, ranges, rows, order, inverse)
    chosen = choose_path(q, k, v, pattern, attn_mask, scale, path).name
    try:
        return run(chosen, q, k, v, pattern, attn_mask, scale)
    except Exception as error:
        if chosen not in ("flex", "cpp") or isinstance(error, torch.OutOfMemoryError):
            raise
        what = CPP if chosen == "cpp" else key_of(q, k, v, pattern, attn_mask)
        FAILED[what] = f"{chosen} failed: {type(error).__name__}"
        warn_once(f"{chosen} failed, block-sparse attention runs on gathered blocks: {error}")
        return run("blocks", q, k, v, pattern, attn_mask, scale)


@_op.register_fake
def _fake(q: Tensor, k: Tensor, v: Tensor, *pattern_and_settings: object) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)


def _mask_4d(q: Tensor, attn_mask: Tensor | None) -> Tensor | None:
    if attn_mask is None:
        return None
    attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
    return attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(q.dtype)


def _check(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, attn_mask: Tensor | None, enable_gqa: bool, path: str | None
) -> None:
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        shapes = [tuple(x.shape) for x in (q, k, v)]
        raise ValueError(f"q, k, v must be [B, H, N, D], [B, H, M, D], [B, H, M, Dv], got {shapes}")
    H, Hkv, bs = q.shape[1], k.shape[1], pattern.block_size
    if Hkv != H and (not enable_gqa or H % Hkv):
        raise ValueError(f"{H} query heads on {Hkv} key-value heads need enable_gqa=True and a multiple")
    need = (-(-q.shape[2] // bs), -(-k.shape[2] // bs))
    if pattern.keep.shape[0] not in (1, H) or pattern.keep.shape[1:] != need:
        got = tuple(pattern.keep.shape)
        raise ValueError(f"the pattern must be [{H} or 1, {need[0]}, {need[1]}] for blocks of {bs} tokens, got {got}")
    if pattern.order is not None and (q.shape[2] != k.shape[2] or pattern.order.shape[1] != q.shape[2]):
        got = pattern.order.shape[1], q.shape[2], k.shape[2]
        raise ValueError(f"an order of {got[0]} tokens needs as many queries and keys, got {got[1]} and {got[2]}")
    if pattern.order is not None and pattern.order.shape[0] not in (1, H):
        raise ValueError(f"the order must be of {H} heads or 1, got {pattern.order.shape[0]}")
    if path is not None and path not in PATHS:
        raise ValueError(f"unknown path {path!r}; there are {', '.join(PATHS)}")

"""Block-sparse attention in plain PyTorch, by dense attention: over the kept keys, or over all with a token mask.

``blocks``: rows of blocks whose keys form one range read them in place; for the others the kept blocks are gathered, a
few rows at a time so that they stay in cache. ``dense``: one call, with N x M booleans where a block is missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.kernels.block_pattern import BlockPattern, token_mask


def dense(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, attn_mask: Tensor | None, scale: float | None
) -> Tensor:
    """One call over all keys."""
    if not pattern.whole:
        attn_mask = both(attn_mask, token_mask(pattern.keep, pattern.block_size, q.shape[2], k.shape[2])[None])
    return as_stored(sdpa(q, k, v, attn_mask, scale))


def both(attn_mask: Tensor | None, keep: Tensor) -> Tensor:
    """The mask that lets pass what ``attn_mask``, of either kind, and ``keep`` let pass; 4-dimensional."""
    if attn_mask is None:
        return keep
    return attn_mask & keep if attn_mask.dtype == torch.bool else torch.where(keep, attn_mask, float("-inf"))


def blocks(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, attn_mask: Tensor | None, scale: float | None
) -> Tensor:
    """Rows of blocks whose keys form a range, then the others, in groups with the same number of kept blocks."""
    (B, H, N, _), (Hkv, M), bs = q.shape, k.shape[1:3], pattern.block_size
    heads, n = pattern.keep.shape[:2]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*attn_mask.shape[:3], M)
    gathered = len(pattern.rows) > 0
    out = q.new_empty(B, n * bs if gathered else N, H, v.shape[-1]).transpose(1, 2)
    for head, head_end, *rows, key, key_end in pattern.ranges.tolist():
        rows = slice(rows[0] * bs, min(rows[1] * bs, N))
        keys = slice(key * bs, min(key_end * bs, M))
        for of_q, of_kv in _head_spans(head, head_end if heads > 1 else H, H // Hkv):
            if key == key_end:
                out[:, of_q, rows] = 0
                continue
            mask = None
            if attn_mask is not None:
                mask = attn_mask[:, of_q if attn_mask.shape[1] > 1 else slice(None)]
                mask = mask[:, :, rows if attn_mask.shape[2] > 1 else slice(None), keys]
            out[:, of_q, rows] = sdpa(q[:, of_q, rows], k[:, of_kv, keys], v[:, of_kv, keys], mask, scale)
    if gathered:
        _gathered_rows(q, k, v, pattern, attn_mask, scale, out)
    return out if out.shape[2] == N and out.is_contiguous() else as_stored(out[:, :, :N])


def _gathered_rows(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, attn_mask: Tensor | None, scale: float | None, out: Tensor
) -> None:
    """The rows of blocks whose keys are no range, into ``out`` [B, H, n * block_size, Dv]."""
    (B, H, N, _), (Hkv, M), bs = q.shape, k.shape[1:3], pattern.block_size
    heads, n, m = pattern.keep.shape
    padding = m * bs - M
    k, v = (F.pad(x, (0, 0, 0, padding)).reshape(B * Hkv * m, bs * x.shape[-1]) for x in (k, v))
    q = F.pad(q, (0, 0, 0, n * bs - N)).unflatten(2, (n, bs))  # [B, H, n, bs, D]
    out = out.unflatten(2, (n, bs))
    if attn_mask is not None:
        attn_mask = _mask_blocks(attn_mask, n, m, bs)
    # Rows of blocks all threads work on together. Fewer keep keys and values in cache, more need fewer barriers, which
    # are what costs on a busy machine; 2 to 8 a thread take the same time on a quiet one.
    chunk = 8 * torch.get_num_threads() if q.device.type == "cpu" else 256
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    for (count, has_last), group in groupby(pattern.rows.tolist(), key=lambda row: tuple(row[1:])):
        row = torch.tensor([index for index, *_ in group], device=q.device)
        head, block = row // n, row % n
        if heads == 1:
            head, block = torch.arange(H, device=q.device).repeat_interleave(len(row)), block.repeat(H)
        kept = pattern.kv_indices[0, head if heads > 1 else 0, block, :count].long()  # [rows, count]
        batch = torch.arange(B, device=q.device).repeat_interleave(len(head))
        head, block, kept = head.repeat(B), block.repeat(B), kept.repeat(B, 1)
        source = kept + ((batch * Hkv + head // (H // Hkv)) * m)[:, None]
        length = count * bs - (padding if has_last else 0)
        size = min(chunk, len(head)) * count
        buffers = [None if trains else x.new_empty(size, x.shape[1]) for x in (k, v)]
        for i in range(0, len(head), chunk):
            b, h, r, j = (x[i : i + chunk] for x in (batch, head, block, source))
            keys, values = (
                torch.index_select(x, 0, j.flatten(), out=None if y is None else y[: j.numel()]).view(
                    len(b), 1, count * bs, -1
                )[:, :, :length]
                for x, y in zip((k, v), buffers, strict=True)
            )
            mask = None
            if attn_mask is not None:
                mask = attn_mask[b % len(attn_mask), h % attn_mask.shape[1], r % attn_mask.shape[2]]
                mask = mask.movedim(2, 1)[torch.arange(len(b))[:, None], kept[i : i + chunk]]  # [rows, count, bs, bs]
                mask = mask.transpose(1, 2).flatten(2)[:, None, :, :length]
            out[b, h, r] = sdpa(q[b, h, r][:, None], keys, values, mask, scale)[:, 0]


def _mask_blocks(attn_mask: Tensor, n: int, m: int, bs: int) -> Tensor:
    """Mask [B or 1, H or 1, N or 1, M] -> [B or 1, H or 1, n or 1, bs or 1, m, bs]."""
    rows = attn_mask.shape[2]
    below = n * bs - rows if rows > 1 else 0
    attn_mask = F.pad(attn_mask, (0, m * bs - attn_mask.shape[3], 0, below), value=0)
    return attn_mask.unflatten(3, (m, bs)).unflatten(2, (n, bs) if rows > 1 else (1, 1))


def _head_spans(head: int, end: int, group: int) -> Iterator[tuple[slice, slice]]:
    """Query heads ``head`` to ``end`` in spans one attention call can serve, each with its key-value heads."""
    if head % group == 0 and end % group == 0:
        yield slice(head, end), slice(head // group, end // group)
        return
    for h in range(head, end):
        yield slice(h, h + 1), slice(h // group, h // group + 1)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Dense attention, heads grouped where there are fewer key heads."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def as_stored(x: Tensor) -> Tensor:
    """[B, H, N, Dv] stored as [B, N, H, Dv], as `block_sparse_attention` promises."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)

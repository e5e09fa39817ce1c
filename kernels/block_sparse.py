"""Block-sparse attention: O_i = sum_j softmax_j(q_i k_j * scale + mask_ij) v_j over the keys j in kept blocks.

A block is ``block_size`` queries by ``block_size`` keys; the last block of a side may be partial. Blocks that are not
kept are never read. A query without any kept key gives zeros. After the static masks of PAROAttention
(arXiv:2506.16054) and the windows of DiTFastAttn (arXiv:2406.08552), for any masks over any lengths.

Three paths, all behind the op ``diffaccel::block_sparse_attention``:

- ``blocks``: dense attention over the kept keys. Rows of blocks whose keys form one range read them in place; for the
  others the kept blocks are gathered, a few rows at a time so that they stay in cache. Plain PyTorch, any device.
- ``flex``: compiled ``flex_attention``. The choice on CUDA. On CPU (AVX-512, 2 threads, float32, 4096 tokens, density
  1/4, bench/attention.py) it takes 1.7 to 2.6 times as long as ``blocks``.
- ``dense``: one dense call, with a token mask where a block is missing (N x M booleans). Up to 4096 tokens it is timed
  against ``blocks`` and taken where that is not faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.kernels._candidates import Trial, choose, may_measure, override, token_bucket, warn_once, worst_row_error
from diffaccel.kernels.block_flex import FAILED, flex, key_of, mask_form, refused
from diffaccel.kernels.block_pattern import BlockPattern, token_mask

OPERATOR = "block_sparse_attention"
PATHS = ("blocks", "flex", "dense")
_LABELS = {"blocks": "gathered blocks", "flex": "flex", "dense": "dense"}


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
) -> Tensor:
    """The definition, with all N x M scores in float32 (float64 for float64). Arguments: ``block_sparse_attention``."""
    N, M = q.shape[2], k.shape[2]
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


class Path(NamedTuple):
    """The way a call takes and why; ``str`` gives for example ``"flex (compiled)"``."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{_LABELS[self.name]} ({self.reason})"


def path_for(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, attn_mask: Tensor | None = None, path: str | None = None
) -> Path:
    """The path ``block_sparse_attention`` takes for these arguments; after a call, the one it took."""
    return _choose(q, k, v, pattern, _mask_4d(q, attn_mask), None, path or "auto")


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
        path: ``"blocks"``, ``"flex"`` or ``"dense"`` instead of the choice made here (also by the environment:
            ``DIFFACCEL_KERNELS=block_sparse_attention=blocks``). Where ``"flex"`` cannot run, ``"blocks"`` does.

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
        return _blocks(q, k, v, pattern, attn_mask, scale)
    p = pattern
    return torch.ops.diffaccel.block_sparse_attention(
        q, k, v, p.keep, p.kv_num_blocks, p.kv_indices, p.ranges, p.rows, attn_mask, p.block_size, scale, path or "auto"
    )


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
    attn_mask: Tensor | None,
    block_size: int,
    scale: float | None,
    path: str,
) -> Tensor:
    pattern = BlockPattern(keep, block_size, kv_num_blocks, kv_indices, ranges, rows)
    chosen = _choose(q, k, v, pattern, attn_mask, scale, path).name
    if chosen == "flex":
        try:
            return _as_stored(flex(q, k, v, pattern, attn_mask, scale))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            FAILED[key_of(q, k, v, pattern, attn_mask)] = f"flex failed: {type(error).__name__}"
            warn_once(f"flex_attention failed, block-sparse attention runs on gathered blocks: {error}")
    if chosen == "dense":
        return _dense(q, k, v, pattern, attn_mask, scale)
    return _blocks(q, k, v, pattern, attn_mask, scale)


@_op.register_fake
def _fake(q: Tensor, k: Tensor, v: Tensor, *pattern_and_settings: object) -> Tensor:
    return _empty_output(q, v)


def _choose(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, attn_mask: Tensor | None, scale: float | None, path: str
) -> Path:
    asked, reason = (path, "asked for") if path != "auto" else (override(OPERATOR), "set by DIFFACCEL_KERNELS")
    if asked is not None and asked not in PATHS:
        raise ValueError(f"unknown path {asked!r} of {OPERATOR}; there are {', '.join(PATHS)}")
    if asked in ("blocks", "dense"):
        return Path(asked, reason)
    if pattern.whole and asked is None:
        return Path("dense", "every block is kept")
    if asked == "flex" or q.device.type == "cuda":
        obstacle = refused(q, k, v, pattern, attn_mask)
        return Path("flex", "compiled") if obstacle is None else Path("blocks", obstacle)
    N, M = q.shape[2], k.shape[2]
    if N * M > 4096**2 or pattern.block_size > N:
        return Path("blocks", "the choice on CPU" if pattern.block_size <= N else "a single row of blocks")
    name = choose(
        OPERATOR,
        (token_bucket(N), token_bucket(M), *q.shape[:2], q.shape[-1], q.dtype, pattern.block_size,
         f"density {round(16 * pattern.density) / 16}", f"{len(pattern.rows) > 0} {mask_form(attn_mask)}"),
        q.device, ("blocks", "dense"), lambda: _trial(q, k, v, pattern, attn_mask, scale), "blocks",
    )  # fmt: skip
    return Path(name, "measured" if may_measure(q.device) else "not measured")


def _trial(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, attn_mask: Tensor | None, scale: float | None
) -> Trial:
    generator = torch.Generator(q.device).manual_seed(0)
    q, k, v = (torch.empty_like(x).normal_(generator=generator) for x in (q, k, v))
    tolerance = 1e-4 if q.dtype == torch.float32 else 5e-2
    expected = _dense(q, k, v, pattern, attn_mask, scale)
    return Trial(
        runs={
            "blocks": lambda: _blocks(q, k, v, pattern, attn_mask, scale),
            "dense": lambda: _dense(q, k, v, pattern, attn_mask, scale),
        },
        error=lambda result: worst_row_error(result, expected),
        tolerance={"blocks": tolerance, "dense": tolerance},
        baseline=lambda: _sdpa(q, k, v, attn_mask, scale),
    )


def _dense(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, attn_mask: Tensor | None, scale: float | None
) -> Tensor:
    if not pattern.whole:
        keep = token_mask(pattern.keep, pattern.block_size, q.shape[2], k.shape[2])[None]
        if attn_mask is None:
            attn_mask = keep
        elif attn_mask.dtype == torch.bool:
            attn_mask = attn_mask & keep
        else:
            attn_mask = torch.where(keep, attn_mask, float("-inf"))
    return _as_stored(_sdpa(q, k, v, attn_mask, scale))


def _blocks(
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
            out[:, of_q, rows] = _sdpa(q[:, of_q, rows], k[:, of_kv, keys], v[:, of_kv, keys], mask, scale)
    if gathered:
        _gathered_rows(q, k, v, pattern, attn_mask, scale, out)
    return out if out.shape[2] == N and out.is_contiguous() else _as_stored(out[:, :, :N])


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
            out[b, h, r] = _sdpa(q[b, h, r][:, None], keys, values, mask, scale)[:, 0]


def _mask_4d(q: Tensor, attn_mask: Tensor | None) -> Tensor | None:
    if attn_mask is None:
        return None
    attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
    return attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(q.dtype)


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


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _empty_output(q: Tensor, v: Tensor) -> Tensor:
    """[B, H, N, Dv] stored as [B, N, H, Dv], as dense attention returns it: merging the heads is then free."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)


def _as_stored(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


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
    if path is not None and path not in PATHS:
        raise ValueError(f"unknown path {path!r}; there are {', '.join(PATHS)}")

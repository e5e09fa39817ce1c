"""The kept blocks of an attention call, analysed once, for `block_sparse.block_sparse_attention`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class BlockPattern:
    """A block mask and the index tensors the paths need, made once by ``from_mask`` and used in every call.

    keep: bool [H or 1, n, m], the kept blocks. block_size: tokens in a block.
    kv_num_blocks: int32 [1, H or 1, n]. kv_indices: int32 [1, H or 1, n, m], kept blocks first, ascending.
    ranges: int32 [R, 6], on the CPU: (first head, last + 1, first query block, last + 1, first key block, last + 1)
    where the keys form one range (an empty one: no kept key). rows: int64 [S, 3], on the CPU: (head * n + query block,
    kept blocks, whether the last key block is among them) for the others, equal counts side by side.
    order: int32 [H or 1, N] or None: the blocks are of reordered tokens, place i holding token ``order[h, i]``, queries
    and keys alike; outputs come in the tokens' own order. inverse: of ``order``.
    """

    keep: Tensor
    block_size: int
    kv_num_blocks: Tensor
    kv_indices: Tensor
    ranges: Tensor
    rows: Tensor
    order: Tensor | None = None
    inverse: Tensor | None = None

    @classmethod
    def from_mask(
        cls, block_mask: Tensor, block_size: int, order: Tensor | None = None, *, merge: bool = True
    ) -> BlockPattern:
        """From ``block_mask`` bool [H or 1, ceil(N / block_size), ceil(M / block_size)], True = kept.

        Args:
            order: the tokens' order, int [H or 1, N]; where it is the natural one for all heads it is dropped.
            merge: one mask and one order for all heads where they are equal; False keeps shapes the same whatever the
                masks, for compiled callers.
        """
        if block_mask.dtype != torch.bool or block_mask.ndim != 3 or block_mask.numel() == 0:
            raise ValueError(
                f"block_mask must be bool [heads or 1, query blocks, key blocks], got {block_mask.dtype} "
                f"{tuple(block_mask.shape)}"
            )
        if block_size < 1:
            raise ValueError(f"block_size must be positive, got {block_size}")
        keep = block_mask.detach()
        if merge and len(keep) > 1 and bool((keep == keep[:1]).all()):
            keep = keep[:1]
        if order is not None:
            order = order.to(keep.device, torch.int32)
            if merge and bool((order == order[:1]).all()):
                order = order[:1]
            if merge and bool((order == torch.arange(order.shape[1], device=order.device)).all()):
                order = None
        keep = keep.clone()
        host = keep.cpu()
        num = host.sum(-1, dtype=torch.int32)
        indices = host.int().argsort(dim=-1, descending=True, stable=True).int()
        begin = torch.where(num > 0, indices[..., 0], 0)
        last_kept = indices.gather(-1, (num.long() - 1).clamp_min(0)[..., None])[..., 0]
        is_range = (num == 0) | (last_kept - begin + 1 == num)
        ranges = _merge_ranges(begin, begin + num, is_range)
        rows = torch.nonzero(~is_range.flatten())[:, 0]
        rows = torch.stack([rows, num.flatten()[rows].long(), host[..., -1].flatten()[rows].long()], dim=1)
        side_by_side = (rows[:, 1] * 2 + rows[:, 2]).argsort(stable=True)
        return cls(
            keep=keep,
            block_size=int(block_size),
            kv_num_blocks=num[None].to(keep.device),
            kv_indices=indices[None].to(keep.device),
            ranges=ranges,
            rows=rows[side_by_side],
            order=order,
            inverse=None if order is None else inverse_order(order),
        )

    def to(self, device: torch.device | str) -> BlockPattern:
        """The same pattern with its index tensors on ``device``; ``ranges`` and ``rows`` are read by the host."""
        keep, num, indices = (x.to(device) for x in (self.keep, self.kv_num_blocks, self.kv_indices))
        order, inverse = (None if x is None else x.to(device) for x in (self.order, self.inverse))
        return BlockPattern(keep, self.block_size, num, indices, self.ranges, self.rows, order, inverse)

    @property
    def density(self) -> float:
        """Kept fraction of the blocks. Reads host tensors only."""
        first, last = self.ranges.long()[:, 0::2], self.ranges.long()[:, 1::2]
        return ((last - first).prod(1).sum() + self.rows[:, 1].sum()).item() / self.keep.numel()

    @property
    def whole(self) -> bool:
        """Whether every block is kept. Reads host tensors only."""
        heads, n, m = self.keep.shape
        return len(self.ranges) == 1 and self.ranges[0].tolist() == [0, heads, 0, n, 0, m]


def inverse_order(order: Tensor) -> Tensor:
    """[H or 1, N] -> [H or 1, N], where each token stands: reordering by the one undoes the other."""
    tokens = torch.arange(order.shape[1], dtype=order.dtype, device=order.device)
    return torch.empty_like(order).scatter_(1, order.long(), tokens.expand_as(order))


def token_mask(block_mask: Tensor, block_size: int, N: int, M: int) -> Tensor:
    """Block mask bool [H, n, m] -> token mask bool [H, N, M]."""
    return block_mask.repeat_interleave(block_size, 1)[:, :N].repeat_interleave(block_size, 2)[:, :, :M]


def _merge_ranges(begin: Tensor, end: Tensor, is_range: Tensor) -> Tensor:
    """Ranges of key blocks [H, n] -> int32 [R, 6]; equal ones of neighbouring rows, then heads, are joined."""
    tables: list[tuple[int, list[list[int]]]] = []  # head, its [first row, last + 1, first key block, last + 1]
    for starts, stops, valid in zip(begin.tolist(), end.tolist(), is_range.tolist(), strict=True):
        table: list[list[int]] = []
        for row, (start, stop, ok) in enumerate(zip(starts, stops, valid, strict=True)):
            if ok and table and table[-1][1:] == [row, start, stop]:
                table[-1][1] = row + 1
            elif ok:
                table.append([row, row + 1, start, stop])
        tables.append((len(tables), table))
    merged = []
    for _, same in groupby(tables, key=lambda item: item[1]):
        group = list(same)
        merged += [[group[0][0], group[-1][0] + 1, *line] for line in group[0][1]]
    return torch.tensor(merged, dtype=torch.int32).reshape(-1, 6)

"""How the mass of softmax(q k^T) lies in blocks of tokens, without ever holding N x N of it.

For orders of the tokens c and blocks I, J of ``block_size`` consecutive ones in that order,
sum_cIJ = sum of p_ij over the tokens i in I and j in J, and the same with max. Sums say which blocks may be left out
(PAROAttention, arXiv:2506.16054, sec. 3.2 and 3.3); maxima over means how badly one scale fits a block. Influence also
looks at the values: mass on values that are like the output may be left out, however much it is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Bytes of probabilities held at a time, and twice that for a reordered copy.
_CHUNK_BYTES = 2**25


def block_mass_ref(
    q: Tensor, k: Tensor, block_size: int, orders: Tensor, attn_mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, with all N x N probabilities. Arguments: ``block_mass``."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q.float() @ k.float().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    p = scores.softmax(-1).nan_to_num()
    fill = -q.shape[2] % block_size
    tiles = [
        F.pad(p[:, :, order][..., order], (0, fill, 0, fill))
        .unflatten(3, (-1, block_size))
        .unflatten(2, (-1, block_size))
        for order in orders
    ]
    sums = [tile.sum((0, 3, 5)) for tile in tiles]
    maxima = [tile.amax((0, 3, 5)) for tile in tiles]
    return torch.stack(sums), torch.stack(maxima)


def block_influence_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    orders: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The definition, block by block. Arguments: ``block_influence``."""
    group, n = q.shape[1] // k.shape[1], -(-q.shape[2] // block_size)
    k, v = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    scores = q.float() @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    p = scores.softmax(-1).nan_to_num()
    found = torch.zeros(len(orders), q.shape[1], n, n)
    for c, order in enumerate(orders):
        for j, columns in enumerate(order.split(block_size)):
            part = p[..., columns] @ v[:, :, columns] - p[..., columns].sum(-1, keepdim=True) * (p @ v)
            for i, rows in enumerate(order.split(block_size)):
                found[c, :, i, j] = part[:, :, rows].square().sum((0, 2, 3))
    return found


def block_mass(
    q: Tensor,
    k: Tensor,
    block_size: int,
    orders: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    maxima: bool = True,
    queries: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Sums and maxima of the probabilities in each block, over the batch.

    Args:
        q: [B, H, N, D], any floating dtype; computed in float32.
        k: [B, H or Hkv, N, D].
        block_size: tokens in a block; the last may be partial.
        orders: int64 [C, N], or [C, H, N] for heads with orders of their own; place i holds token ``order[i]``.
        attn_mask: as in ``scaled_dot_product_attention``.
        scale: factor on the scores, D ** -0.5 unless given.
        maxima: also the maxima.
        queries: int64 [R], the queries to look at; all unless given.

    Returns:
        float32 [C, H, n, n] with n = ceil(N / block_size); sums of one order and head add up to B * N (less queries
        that are masked throughout). And the maxima, or None.
    """
    grid = _Blocks(q, block_size, orders)
    sums, peaks = grid.zeros(), grid.zeros() if maxima else None
    for h, at, p, _ in _probabilities(q, k, attn_mask, scale, queries, _CHUNK_BYTES // (4 * q.shape[2])):
        for c in range(len(orders)):
            tiles, lines = grid.tiles(p, c, h), grid.lines(c, h, at)
            sums[c, h].index_add_(0, lines, tiles.sum(-1))
            if peaks is not None:
                peaks[c, h].scatter_reduce_(0, lines[:, None].expand(-1, grid.n), tiles.amax(-1), "amax")
    return sums, peaks


def block_influence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    orders: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    queries: Tensor | None = None,
) -> Tensor:
    """What leaving out each block alone would change in the output, squared, to first order: float32 [C, H, n, n].

    influence_cIJ = sum over i in I of || sum over j in J of p_ij (v_j - o_i) ||^2, o the attention's output; over the
    batch. ``v`` is [B, H or Hkv, N, Dv]; the others as in `block_mass`.
    """
    (N, D), grid = v.shape[2:], _Blocks(q, block_size, orders)
    found = grid.zeros()
    rows = _CHUNK_BYTES // (4 * max(N, grid.n * D))
    for h, at, p, b in _probabilities(q, k, attn_mask, scale, queries, rows):
        values = v[b, h // (q.shape[1] // v.shape[1])].float()
        out = p @ values  # [rows, D]
        for c in range(len(orders)):
            tiles = grid.tiles(p, c, h)  # [rows, n, block_size]
            own = F.pad(values[grid.order(c, h)], (0, 0, 0, grid.n * block_size - N)).unflatten(0, (grid.n, block_size))
            part = torch.bmm(tiles.transpose(0, 1), own)  # [n, rows, D]
            part -= tiles.sum(-1).T[..., None] * out
            found[c, h].index_add_(0, grid.lines(c, h, at), part.square().sum(-1).T)
    return found


class _Blocks:
    """Where tokens fall in each order."""

    def __init__(self, q: Tensor, block_size: int, orders: Tensor) -> None:
        orders = orders.to(q.device)
        self._heads, self._device = q.shape[1], q.device
        self._orders = orders[:, None] if orders.ndim == 2 else orders  # [C, H or 1, N]
        self._size, self._tokens = block_size, q.shape[2]
        self.n = -(-q.shape[2] // block_size)
        self._block_of = self._orders.argsort(-1) // block_size
        self._natural = (self._orders == torch.arange(q.shape[2], device=q.device)).all(-1).tolist()

    def zeros(self) -> Tensor:
        return torch.zeros(len(self._orders), self._heads, self.n, self.n, device=self._device)

    def order(self, c: int, h: int) -> Tensor:
        """[N]."""
        return self._orders[c, h % self._orders.shape[1]]

    def tiles(self, p: Tensor, c: int, h: int) -> Tensor:
        """Rows of probabilities [R, N] with their columns in order c: [R, n, block_size], the last block filled up."""
        p = p if self._natural[c][h % self._orders.shape[1]] else p[:, self.order(c, h)]
        return F.pad(p, (0, self.n * self._size - self._tokens)).unflatten(1, (self.n, self._size))

    def lines(self, c: int, h: int, queries: Tensor) -> Tensor:
        """The blocks that ``queries`` [R] fall into."""
        return self._block_of[c, h % self._orders.shape[1], queries]


def _probabilities(
    q: Tensor, k: Tensor, attn_mask: Tensor | None, scale: float | None, queries: Tensor | None, rows: int
) -> Iterator[tuple[int, Tensor, Tensor, int]]:
    """Head, queries [R] (at most ``rows``), float32 [R, N], and sample."""
    B, H, N, D = q.shape
    queries = torch.arange(N, device=q.device) if queries is None else queries.to(q.device)
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)].expand(B, H, N, N)
    for b in range(B):
        for h in range(H):
            keys = k[b, h // (H // k.shape[1])].float().T * (D**-0.5 if scale is None else scale)
            for at in queries.split(max(rows, 1)):
                p = q[b, h, at].float() @ keys
                if attn_mask is not None:
                    mask = attn_mask[b, h, at]
                    p = p.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else p.add_(mask)
                p = torch.softmax(p, -1, out=p)
                yield h, at, p if attn_mask is None else p.nan_to_num_(), b

"""How the mass of softmax(q k^T) lies in blocks of tokens, without ever holding N x N of it.

For orders of the tokens c and blocks I, J of ``block_size`` consecutive ones in that order,
sum_cIJ = sum of p_ij over the tokens i in I and j in J, and the same with max. Sums say which blocks may be left out
(PAROAttention, arXiv:2506.16054, sec. 3.2 and 3.3); maxima over means how badly one scale fits a block.
"""

from __future__ import annotations

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


def block_mass(
    q: Tensor,
    k: Tensor,
    block_size: int,
    orders: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    maxima: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Sums and maxima of the probabilities in each block, over the batch.

    Args:
        q: [B, H, N, D], any floating dtype; computed in float32.
        k: [B, H or Hkv, N, D].
        block_size: tokens in a block; the last may be partial.
        orders: int64 [C, N], permutations: place i holds token ``order[i]``.
        attn_mask: as in ``scaled_dot_product_attention``.
        scale: factor on the scores, D ** -0.5 unless given.
        maxima: also the maxima.

    Returns:
        float32 [C, H, n, n] with n = ceil(N / block_size); sums of one order and head add up to B * N (less queries
        that are masked throughout). And the maxima, or None.
    """
    return _mass(q, k, block_size, orders[:, None], attn_mask, scale, maxima)


def head_block_mass(
    q: Tensor,
    k: Tensor,
    block_size: int,
    orders: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The sums with an order for each head, ``orders`` int64 [H, N]: float32 [H, n, n]."""
    return _mass(q, k, block_size, orders[None], attn_mask, scale, False)[0][0]


def _mass(
    q: Tensor, k: Tensor, bs: int, orders: Tensor, attn_mask: Tensor | None, scale: float | None, maxima: bool
) -> tuple[Tensor, Tensor | None]:
    """``orders`` [C, H or 1, N]."""
    (B, H, N, D), C = q.shape, len(orders)
    n = -(-N // bs)
    scale = D**-0.5 if scale is None else scale
    orders = orders.to(q.device)
    block_of = orders.argsort(-1) // bs  # [C, H or 1, N]
    natural = (orders == torch.arange(N, device=q.device)).all(-1).tolist()
    sums = torch.zeros(C, H, n, n, device=q.device)
    peaks = torch.zeros(C, H, n, n, device=q.device) if maxima else None
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)].expand(B, H, N, N)
    rows = max(_CHUNK_BYTES // (4 * N), 1)
    for b in range(B):
        for h in range(H):
            keys = k[b, h // (H // k.shape[1])].float().T * scale  # [D, N]
            for i in range(0, N, rows):
                p = q[b, h, i : i + rows].float() @ keys
                if attn_mask is not None:
                    mask = attn_mask[b, h, i : i + rows]
                    p = p.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else p.add_(mask)
                p = torch.softmax(p, -1, out=p)
                if attn_mask is not None:
                    p = p.nan_to_num_()
                for c in range(C):
                    own = h if orders.shape[1] > 1 else 0
                    tiles = F.pad(p if natural[c][own] else p[:, orders[c, own]], (0, n * bs - N)).unflatten(1, (n, bs))
                    line = block_of[c, own, i : i + rows]
                    sums[c, h].index_add_(0, line, tiles.sum(-1))
                    if peaks is not None:
                        peaks[c, h].scatter_reduce_(0, line[:, None].expand(-1, n), tiles.amax(-1), "amax")
    return sums, peaks

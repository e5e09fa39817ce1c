"""Block-sparse attention whose blocks are chosen in every call from the means of blocks, without calibration.

score_IJ = mean(q in I) . mean(k in J) * scale: of each query block I the key blocks with the highest scores are kept
(SpargeAttn, arXiv:2502.18137, sec. 3.3, with a fixed share of blocks instead of a share of their softmax; keys less
their mean shift all scores of a row alike, so smoothing them changes no choice). Text stays dense.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.kernels.block_choice import reordered
from diffaccel.kernels.block_pattern import BlockPattern, inverse_order
from diffaccel.kernels.block_sparse import block_sparse_attention


@dataclass(frozen=True, eq=False)
class OnlinePattern:
    """How blocks are chosen: of the first ``image`` ones ``keep`` for each query block; the others are text, dense.

    order, inverse: int32 [1, N], see `BlockPattern`.
    """

    image: int
    keep: int
    block_size: int
    order: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, order: Tensor, image: int, keep: int, block_size: int) -> OnlinePattern:
        """From ``order`` [N]."""
        order = order[None].int()
        return cls(image, keep, block_size, order, inverse_order(order))

    def to(self, device: torch.device | str) -> OnlinePattern:
        """The same on ``device``."""
        return OnlinePattern(self.image, self.keep, self.block_size, self.order.to(device), self.inverse.to(device))

    @property
    def density(self) -> float:
        """Kept share of all blocks; the diagonal, always kept, is counted as chosen."""
        n = -(-self.order.shape[1] // self.block_size)
        text = n - self.image
        return (self.image * (self.keep + text) + text * n) / (n * n)

    @property
    def whole(self) -> bool:
        return self.keep >= self.image


def chosen_blocks(q: Tensor, k: Tensor, image: int, keep: int, block_size: int) -> Tensor:
    """The kept blocks, bool [H, n, n], of reordered ``q`` [B, H, N, D] and ``k`` [B, H or Hkv, N, D].

    Samples of a batch share them: the mean of their softmaxes decides. The diagonal is always kept.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = _means(q, block_size)[:, :, :image] @ _means(k, block_size)[:, :, :image].mT * q.shape[-1] ** -0.5
    share = scores.softmax(-1).mean(0)
    own = torch.eye(image, dtype=torch.bool, device=q.device)
    best = share.masked_fill(own, torch.inf).topk(min(keep, image), dim=-1).indices
    n = -(-q.shape[2] // block_size)
    kept = torch.ones(q.shape[1], n, n, dtype=torch.bool, device=q.device)
    kept[:, :image, :image] = torch.zeros_like(share, dtype=torch.bool).scatter_(-1, best, True)
    return kept


def online_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: OnlinePattern,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Arguments as of `block_sparse_attention`, N queries on as many keys.

    Returns:
        [B, H, N, Dv], stored as [B, N, H, Dv].
    """
    keep, num, indices, ranges, rows = torch.ops.diffaccel.online_blocks(
        q, k, pattern.order, pattern.image, pattern.keep, pattern.block_size
    )
    chosen = BlockPattern(keep, pattern.block_size, num, indices, ranges, rows, pattern.order, pattern.inverse)
    return block_sparse_attention(q, k, v, chosen, attn_mask=attn_mask, scale=scale, enable_gqa=enable_gqa)


@torch.library.custom_op("diffaccel::online_blocks", mutates_args=())
def _op(
    q: Tensor, k: Tensor, order: Tensor, image: int, keep: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    kept = chosen_blocks(reordered(q, order), reordered(k, order), image, keep, block_size)
    made = BlockPattern.from_mask(kept, block_size, merge=False)
    return made.keep, made.kv_num_blocks, made.kv_indices, made.ranges, made.rows


@_op.register_fake
def _fake(
    q: Tensor, k: Tensor, order: Tensor, image: int, keep: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    H, n = q.shape[1], -(-q.shape[2] // block_size)
    context = torch.library.get_ctx()
    lists = q.new_empty(1, H, n, dtype=torch.int32), q.new_empty(1, H, n, n, dtype=torch.int32)
    ranges = torch.empty(context.new_dynamic_size(), 6, dtype=torch.int32, device="cpu")
    rows = torch.empty(context.new_dynamic_size(), 3, dtype=torch.int64, device="cpu")
    return q.new_empty(H, n, n, dtype=torch.bool), *lists, ranges, rows


def _means(x: Tensor, size: int) -> Tensor:
    """Of blocks of tokens: [B, H, N, D] -> float32 [B, H, n, D]; those of a partial last block are of what it holds."""
    N = x.shape[2]
    sums = F.pad(x.float(), (0, 0, 0, -N % size)).unflatten(2, (-1, size)).sum(3)
    held = (N - torch.arange(sums.shape[2], device=x.device) * size).clamp_max(size)
    return sums / held[:, None]

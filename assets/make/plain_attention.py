"""Attention by two matrix products, for training with few keys.

On a processor with matrix instructions for bfloat16 this takes half the time of the fused operator forward and backward
at 256 keys (41 against 80 ms for [16, 6, 256, 32] on one core), and the same at 1,000, where the fused one needs less
memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

MOST_KEYS = 512


def plain_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """softmax(query key^T / sqrt(d) + mask) value; a bool mask is True where a key counts."""
    scores = (query * query.shape[-1] ** -0.5) @ key.mT
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -1e4)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1).to(value.dtype) @ value


class PlainAttention(TorchFunctionMode):
    """While entered, attention calls with few keys and nothing unusual go through ``plain_attention``."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            call = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
            rest = {k: v for k, v in call.items() if k not in ("query", "key", "value", "attn_mask") and v}
            if not rest and len(args) <= 4 and call["key"].shape[-2] <= MOST_KEYS:
                return plain_attention(call["query"], call["key"], call["value"], call.get("attn_mask"))
        return func(*args, **kwargs)

"""Activations of 4 bits (W4A4), for what it does to the picture: nothing here is faster than with 8.

As weights in `packed_weight`, a token becomes nibbles times an integer multiplier for each group of its columns, and so
int8 codes with one scale. The products are those of W4A8: Hopper and Blackwell have no tensor cores for 4-bit integers,
and Ampere's and Ada's need group scales between the sums (SVDQuant, arXiv:2411.05007, sec. 4.2), which we do not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_SCALE_FLOOR = 2.0**-100  # as in int8_linear.py


def quantize_per_token_int4(x: Tensor, group: int = 64, bits: int = 8) -> tuple[Tensor, Tensor]:
    """``x`` [..., K] -> int8 codes [..., K] and float32 scale [..., 1]; x ~ codes * scale.

    A code is a nibble, -7..7, times the multiplier of its token and ``group`` columns, which reaches to the largest
    magnitude there: 1..15, or 1..9 where sums are exact only with codes of 7 ``bits``. A token that holds NaN or
    infinity gets such a scale.
    """
    K, largest = x.shape[-1], 15 if bits == 8 else 9
    v = F.pad(x.float(), (0, -K % group)).unflatten(-1, (-1, group))  # [..., G, g]
    widest = torch.maximum(v.amax(-1, keepdim=True), v.amin(-1, keepdim=True).neg_()) / 7
    scale = (widest.amax(-2, keepdim=True) / largest).clamp_(min=_SCALE_FLOOR)
    multiplier = (widest / scale).ceil_().clamp_(1, largest)
    codes = (v / (multiplier * scale)).round_().clamp_(-7, 7).mul_(multiplier)
    return codes.flatten(-2)[..., :K].to(torch.int8), scale[..., 0]

"""The kernel of `int8_static`: rounding to int8 with a scale that is known, so that nothing is read twice.

q = clip(round(x * before / s + z), -128, 127)
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the arguments of Triton functions have no Python types)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffaccel.kernels._launch import Config, Specimen, device_of
from diffaccel.kernels.token_quantize import round_even

CONFIG = Config({"BLOCK_K": 1024}, warps=4, stages=1)


@triton.jit
def _kernel(
    x_ptr, before_ptr, scale_ptr, zero_ptr, q_ptr, K, BLOCK_K: tl.constexpr,
):  # grid: (M, ceil(K / BLOCK_K))  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * K
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    keep = k < K
    factor = tl.div_rn(1.0, tl.load(scale_ptr))
    if before_ptr is not None:
        factor = tl.load(before_ptr + k, mask=keep, other=0.0).to(tl.float32) * factor
    y = tl.load(x_ptr + row + k, mask=keep, other=0.0).to(tl.float32) * factor + tl.load(zero_ptr)
    y = round_even(tl.minimum(tl.maximum(y, -128.0), 127.0))
    tl.store(q_ptr + row + k, y.to(tl.int8), mask=keep)


def launch(x: Tensor, scale: Tensor, zero: Tensor, before: Tensor | None) -> Tensor:
    """Arguments as for `int8_static.static_quantize`, with 8 bits."""
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    K = x.shape[-1]
    if q.numel():
        factors = None if before is None else before.contiguous()
        with device_of(x):
            _kernel[(q.numel() // K, triton.cdiv(K, CONFIG.tiles["BLOCK_K"]))](
                x.contiguous(), factors, scale, zero, q, K, **CONFIG.tiles,
                num_warps=CONFIG.warps, num_stages=CONFIG.stages,
                enable_fp_fusion=False,  # one rounding less would break ties otherwise than the reference
            )  # fmt: skip
    return q


SPECIMENS = tuple(
    Specimen(
        name=f"static_quantize {dtype}{', before' if factors else ''}",
        kernel=_kernel,
        types={"x_ptr": f"*{dtype}", "scale_ptr": "*fp32", "zero_ptr": "*fp32", "q_ptr": "*i8", "K": "i32"}
        | ({"before_ptr": "*fp16"} if factors else {}),
        constants={} if factors else {"before_ptr": None},
        config=CONFIG,
        aligned=("K",),
        fp_fusion=False,
    )
    for dtype, factors in (("bf16", True), ("fp16", True), ("fp32", True), ("bf16", False))
)

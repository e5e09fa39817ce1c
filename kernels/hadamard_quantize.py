"""The kernel of `hadamard`: rotation and quantisation of a row in one pass over memory.

Sixteen rows a program. The matrix, 1 and -1, is made in registers, and tensor cores multiply with it; the second pass,
which rounds, reads the rows from L2 and multiplies once more, which is cheaper than to keep a row of 15360 in float32.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the arguments of Triton functions have no Python types)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from diffaccel.kernels._launch import INTERPRETED, Config, Specimen, device_of
from diffaccel.kernels.token_quantize import cast, round_even, row_scale_of

# The least that a tensor core takes, of rows and of products.
SMALLEST_BLOCK = 16
CONFIG = Config({"BLOCK_M": 16}, warps=4, stages=2)


@triton.jit
def _matrix(dtype: tl.constexpr, BLOCK: tl.constexpr):
    """Sylvester's, [BLOCK, BLOCK] up to 256: -1 where the numbers of row and column share an odd number of bits."""
    common = tl.arange(0, BLOCK)[:, None] & tl.arange(0, BLOCK)[None, :]
    common ^= common >> 4
    common ^= common >> 2
    common ^= common >> 1
    return (1 - 2 * (common & 1)).to(tl.float32).to(dtype)


@triton.jit
def _times(x, matrix):
    if INTERPRETED:  # it would multiply the raw bits of bfloat16
        x, matrix = x.to(tl.float32), matrix.to(tl.float32)
    return tl.dot(x, matrix)


@triton.jit
def _rotated(x_ptrs, before_ptr, after_ptr, k, matrix, BLOCK: tl.constexpr):
    """Columns ``k`` of some rows, [BLOCK_M, BLOCK] in float32. Those of float32 go in as three parts of bfloat16."""
    x = tl.load(x_ptrs + k[None, :])
    if before_ptr is not None:
        x = cast(x.to(tl.float32) * tl.load(before_ptr + k).to(tl.float32)[None, :], x.dtype)
    if x.dtype == tl.float32:
        high = x.to(tl.bfloat16)
        x -= high.to(tl.float32)
        middle = x.to(tl.bfloat16)
        y = _times(high, matrix) + _times(middle, matrix) + _times((x - middle.to(tl.float32)).to(tl.bfloat16), matrix)
    else:
        y = _times(x, matrix)
    y *= BLOCK**-0.5
    return y if after_ptr is None else y * tl.load(after_ptr + k).to(tl.float32)[None, :]


@triton.jit
def _kernel(
    x_ptr, before_ptr, after_ptr, q_ptr, row_scale_ptr, M, K,
    QMAX: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # grid: (ceil(M / BLOCK_M),); BLOCK divides K  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Rows beyond the end read the last one again and are not stored.
    row = tl.minimum(m, M - 1).to(tl.int64)[:, None] * K
    k = tl.arange(0, BLOCK)
    matrix = _matrix(tl.bfloat16 if x_ptr.dtype.element_ty == tl.float32 else x_ptr.dtype.element_ty, BLOCK)
    largest = tl.zeros((BLOCK_M,), tl.int32)  # as the bits of a float: in their order NaN comes last
    for start in range(0, K, BLOCK):
        y = _rotated(x_ptr + row, before_ptr, after_ptr, start + k, matrix, BLOCK)
        largest = tl.maximum(largest, tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1))
    row_scale, inverse = row_scale_of(largest, QMAX)
    tl.store(row_scale_ptr + m, row_scale, mask=m < M)
    for start in range(0, K, BLOCK):
        y = _rotated(x_ptr + row, before_ptr, after_ptr, start + k, matrix, BLOCK)
        q = round_even(tl.where((inverse > 0)[:, None], y * inverse[:, None], 0.0)).to(tl.int8)
        tl.store(q_ptr + row + (start + k)[None, :], q, mask=(m < M)[:, None])


def launch(
    x: Tensor, before: Tensor | None, after: Tensor | None, block: int, bits: int, q: Tensor, row_scale: Tensor
) -> None:
    """Fill ``q`` and ``row_scale``; the other arguments as for `hadamard.hadamard_quantize`."""
    M, K = row_scale.numel(), x.shape[-1]
    factors = (m if m is None else m.contiguous() for m in (before, after))
    with device_of(x):
        _kernel[(triton.cdiv(M, CONFIG.tiles["BLOCK_M"]),)](
            x.contiguous(), *factors, q, row_scale, M, K, QMAX=2.0 ** (bits - 1) - 1, BLOCK=block, **CONFIG.tiles,
            num_warps=CONFIG.warps, num_stages=CONFIG.stages,
            enable_fp_fusion=False,  # as in token_quantize.py
        )  # fmt: skip


SPECIMENS = tuple(
    Specimen(
        name=f"hadamard_quantize {dtype}, blocks of {block}{', before and after' if factors else ''}",
        kernel=_kernel,
        types={"x_ptr": f"*{dtype}", "q_ptr": "*i8", "row_scale_ptr": "*fp32", "M": "i32", "K": "i32"}
        | (dict.fromkeys(("before_ptr", "after_ptr"), "*fp32") if factors else {}),
        constants={"QMAX": 127.0, "BLOCK": block} | ({} if factors else {"before_ptr": None, "after_ptr": None}),
        config=CONFIG,
        aligned=("K",),
        tensor_cores="16-bit",
        fp_fusion=False,
    )
    for dtype, block, factors in (
        ("bf16", 128, True),
        ("fp16", 128, True),
        ("fp32", 128, True),
        ("bf16", 128, False),
        ("bf16", 16, True),
    )
)

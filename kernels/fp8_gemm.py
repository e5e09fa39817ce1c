"""Product of fp8 (e4m3fn) matrices with a scale for each row and channel, and bias, in the epilogue:

    y[m, n] = (sum_k q[m, k] w[n, k]) * scale[n] * row_scale[m] + bias[n]

Sums run in float32. The tensor cores of Ada and Hopper keep about 14 bits while they add (arXiv:2412.19437, sec. 3.3.2;
arXiv:2411.10958): over thousands of products of one sign that loses more than a percent. There they add one block of
128 products (256 for few rows), and float32 adds those sums.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the arguments of Triton functions have no Python types)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffaccel.kernels import int8_gemm
from diffaccel.kernels._launch import Config, Specimen, device_of
from diffaccel.kernels.int8_gemm import capability_of, check, configurations, tile_of, tiles
from diffaccel.kernels.token_quantize import cast, runs_here

# As for int8, whose elements are as large; but on Hopper the second accumulator leaves no registers for 256 columns.
# From sm_89 on: there are no fp8 tensor cores before.
MANY_TILES = {**int8_gemm.MANY_TILES, 90: int8_gemm.MANY_TILES[100]}
del MANY_TILES[80]


def fp8_gemm_ref(
    q: Tensor, weight: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The definition, in float32; arguments as for `fp8_gemm`."""
    y = q.float() @ weight.float().t() * scale * row_scale
    return (y if bias is None else y + bias.float()).to(dtype)


@triton.jit
def _gemm_kernel(
    q_ptr, weight_ptr, row_scale_ptr, scale_ptr, bias_ptr, y_ptr, M, N, K,
    SHORT_SUMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # grid: (tiles,)  # fmt: skip
    m, n = tile_of(M, N, BLOCK_M, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows beyond the end read the last one again and are not stored: unlike a mask that costs nothing in the loop.
    q_ptrs = q_ptr + tl.minimum(m, M - 1).to(tl.int64)[:, None] * K + k[None, :]  # [BLOCK_M, BLOCK_K]
    weight_ptrs = weight_ptr + tl.minimum(n, N - 1).to(tl.int64)[None, :] * K + k[:, None]  # [BLOCK_K, BLOCK_N]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        keep = k < K - start
        q = tl.load(q_ptrs, mask=keep[None, :], other=0.0)
        weight = tl.load(weight_ptrs, mask=keep[:, None], other=0.0)
        # 0 lets the compiler fold the addition into the product.
        acc += tl.dot(q, weight, max_num_imprecise_acc=BLOCK_K if SHORT_SUMS else 0)
        q_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    row_scale = tl.load(row_scale_ptr + m, mask=m < M, other=0.0)
    scale = tl.load(scale_ptr + n, mask=n < N, other=0.0)
    y = acc * scale[None, :] * row_scale[:, None]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptrs, cast(y, y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def short_sums(capability: int) -> bool:
    """Whether float32 adds the sums of blocks; on sm_100 it would have to fetch them from tensor memory each time."""
    return not 100 <= capability < 120


def config_for(M: int, N: int, K: int, capability: int) -> Config:
    """The configuration for ``q`` [M, K] and ``weight`` [N, K] on a chip of compute capability 89, 90, ..."""
    return int8_gemm.config_for(M, N, K, capability, MANY_TILES)


def fp8_gemm(
    q: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """float8_e4m3fn ``q`` [..., K] and ``weight`` [N, K] -> [..., N] in ``dtype`` (float32, bfloat16 or float16).

    Args:
        row_scale: float32 [..., 1], as `token_quantize` returns it.
        scale: float32 [N], one for each output channel.
        bias: [N].

    Raises:
        ValueError: Other dtypes, or shapes that do not go together.
    """
    check(q, weight, row_scale, scale, bias, torch.float8_e4m3fn)
    return _fp8_gemm(q, weight, row_scale, scale, bias, dtype)


@torch.library.custom_op("diffaccel::fp8_gemm", mutates_args=())
def _fp8_gemm(
    q: Tensor, weight: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if not runs_here(q, torch.float8_e4m3fn):
        return fp8_gemm_ref(q, weight, row_scale, scale, bias, dtype).contiguous()
    N, K = weight.shape
    y = torch.empty((*q.shape[:-1], N), dtype=dtype, device=q.device)
    M = row_scale.numel()
    if y.numel() == 0:
        return y
    capability = capability_of(q)
    config = config_for(M, N, K, capability)
    operands = (t if t is None else t.contiguous() for t in (q, weight, row_scale, scale, bias))
    with device_of(q):
        _gemm_kernel[(tiles(M, N, config),)](
            *operands, y, M, N, K,
            SHORT_SUMS=short_sums(capability), **config.tiles, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return y


@_fp8_gemm.register_fake
def _(q: Tensor, weight: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return q.new_empty((*q.shape[:-1], weight.shape[0]), dtype=dtype)


SPECIMENS = tuple(
    Specimen(
        name=f"fp8_gemm {dtype}, {name}{'' if short else ', long sums'}",
        kernel=_gemm_kernel,
        types={"q_ptr": "*fp8e4nv", "weight_ptr": "*fp8e4nv", "row_scale_ptr": "*fp32", "scale_ptr": "*fp32"}
        | {"bias_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "M": "i32", "N": "i32", "K": "i32"},
        constants={"SHORT_SUMS": short},
        config=config,
        aligned=aligned,
        tensor_cores="fp8",
        targets=chips,
    )
    for dtype in ("bf16", "fp16", "fp32")
    for name, config, aligned, targets in configurations(MANY_TILES)
    for short in (True, False)
    if (chips := tuple(chip for chip in targets if short_sums(chip) == short))
)

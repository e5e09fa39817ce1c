"""Product of int8 matrices with dequantisation and bias in the epilogue:

    y[m, n] = (sum_k q[m, k] w[n, k]) * scale[n] * row_scale[m] + bias[n]

Sums run in int32, exactly. Apart from the products this saves writing and reading the int32 sums, 4 bytes each way.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the arguments of Triton functions have no Python types)

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffaccel.kernels._launch import Config, Specimen, device_of, dot
from diffaccel.kernels.token_quantize import cast, runs_here

# 128 * 128 * K stays below 2**31.
MAX_K = 2**17 - 1

# For up to 16 and 32 rows (modulation, short text) the weight's bytes decide the time: 16 rows are the least that a
# tensor core takes, and narrow tiles give as many programs as there are SMs (3072 / 32 = 96) with 3 tiles of 8 KiB in
# flight each, more than the 18 KiB an SM that it takes to hide 700 ns at 3.35 TB/s. So K need not be split.
FEW_ROWS = {
    16: Config({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 256}, warps=4, stages=4),
    32: Config({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 256}, warps=4, stages=4),
}
# Rows that do not begin at multiples of 16 bytes are loaded byte by byte, an address each: larger tiles spill.
ODD_ROWS = FEW_ROWS[32]
# Where large tiles would not occupy every SM (512 text tokens), smaller ones. 64 rows are the least for IGMMA (sm_90).
FEW_TILES = Config({"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128}, warps=4, stages=4)
# Large tiles read less per product: 128 x 128 needs 1 byte for 64 multiplications, 128 x 256 for 85. The latter fits
# only Hopper, where the operands come from shared memory: 256 columns spill on sm_80 and sm_89, which hold operands in
# registers, and in the epilogue on sm_100. 3 stages of 32 KiB stay below the 99 KiB of sm_89 and sm_120.
_LARGE = Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128}, warps=8, stages=3)
MANY_TILES = {
    80: _LARGE,
    89: _LARGE,
    90: Config({"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 128}, warps=8, stages=4),
    100: Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128}, warps=8, stages=4),
    120: _LARGE,
}
# Tiles below which some SM has none: 108 SMs on A100, 128 on RTX 4090, 132 on H100.
_ENOUGH_TILES = 128


def int8_gemm_ref(
    q: Tensor, weight: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The definition; arguments as for `int8_gemm`. The sums run in float64, where they are exact."""
    y = (q.double() @ weight.double().t()).float() * scale * row_scale
    return (y if bias is None else y + bias.float()).to(dtype)


@triton.jit
def tile_of(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows and columns of this program's tile. Eight tiles below each other run together: they share columns in L2."""
    tile = tl.program_id(0)
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = tile // (8 * columns) * 8
    height = tl.minimum(rows - first, 8)
    tile = tile % (8 * columns)
    m = (first + tile % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile // height * BLOCK_N + tl.arange(0, BLOCK_N)
    return m, n


@triton.jit
def _gemm_kernel(
    q_ptr, weight_ptr, row_scale_ptr, scale_ptr, bias_ptr, y_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # grid: (tiles,)  # fmt: skip
    m, n = tile_of(M, N, BLOCK_M, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows beyond the end read the last one again and are not stored: unlike a mask that costs nothing in the loop.
    q_ptrs = q_ptr + tl.minimum(m, M - 1).to(tl.int64)[:, None] * K + k[None, :]  # [BLOCK_M, BLOCK_K]
    weight_ptrs = weight_ptr + tl.minimum(n, N - 1).to(tl.int64)[None, :] * K + k[:, None]  # [BLOCK_K, BLOCK_N]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, K, BLOCK_K):
        keep = k < K - start
        q = tl.load(q_ptrs, mask=keep[None, :], other=0)
        weight = tl.load(weight_ptrs, mask=keep[:, None], other=0)
        acc = dot(q, weight, acc)
        q_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    row_scale = tl.load(row_scale_ptr + m, mask=m < M, other=0.0)
    scale = tl.load(scale_ptr + n, mask=n < N, other=0.0)
    y = acc.to(tl.float32) * scale[None, :] * row_scale[:, None]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptrs, cast(y, y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def config_for(M: int, N: int, K: int, capability: int, many_tiles: Mapping[int, Config] = MANY_TILES) -> Config:
    """The configuration for ``q`` [M, K] and ``weight`` [N, K] on a chip of compute capability 80, 89, 90, ..."""
    for rows, config in FEW_ROWS.items():
        if rows >= M:
            return config
    if K % 16:
        return ODD_ROWS
    many = many_tiles[max(known for known in many_tiles if known <= capability)]
    return many if tiles(M, N, many) >= _ENOUGH_TILES else FEW_TILES


def tiles(M: int, N: int, config: Config) -> int:
    """Number of tiles, and so of programs, of a result [M, N]."""
    return triton.cdiv(M, config.tiles["BLOCK_M"]) * triton.cdiv(N, config.tiles["BLOCK_N"])


def capability_of(x: Tensor) -> int:
    """Compute capability of the device of ``x``, 90 for 9.0; in the interpreter that of RTX 4090."""
    if not x.is_cuda:
        return 89
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def int8_gemm(
    q: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """int8 ``q`` [..., K] and ``weight`` [N, K] -> [..., N] in ``dtype`` (float32, bfloat16 or float16).

    Args:
        row_scale: float32 [..., 1], as `token_quantize` returns it.
        scale: float32 [N], one for each output channel.
        bias: [N].

    Raises:
        ValueError: Other dtypes, shapes that do not go together, or K so large that a sum could overflow.
    """
    check(q, weight, row_scale, scale, bias, torch.int8)
    if q.shape[-1] > MAX_K:
        raise ValueError(f"int8_gemm sums at most K = {MAX_K} products exactly, got {q.shape[-1]}")
    return _int8_gemm(q, weight, row_scale, scale, bias, dtype)


def check(q: Tensor, weight: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
    """Raise ``ValueError`` where the operands of a scaled product do not go together."""
    N, K = weight.shape if weight.ndim == 2 else (-1, -1)
    fits = q.ndim > 0 and q.shape[-1] == K and row_scale.shape == (*q.shape[:-1], 1) and scale.shape == (N,)
    if not fits or (bias is not None and bias.shape != (N,)):
        got = [None if t is None else tuple(t.shape) for t in (q, weight, row_scale, scale, bias)]
        raise ValueError(f"expected q [..., K], weight [N, K], row_scale [..., 1], scale [N] and bias [N], got {got}")
    if q.dtype != dtype or weight.dtype != dtype or {row_scale.dtype, scale.dtype} != {torch.float32}:
        dtypes = [t.dtype for t in (q, weight, row_scale, scale)]
        raise ValueError(f"expected q and weight {dtype}, row_scale and scale float32, got {dtypes}")


@torch.library.custom_op("diffaccel::int8_gemm", mutates_args=())
def _int8_gemm(
    q: Tensor, weight: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if not runs_here(q, torch.int8):
        return int8_gemm_ref(q, weight, row_scale, scale, bias, dtype).contiguous()
    N, K = weight.shape
    y = torch.empty((*q.shape[:-1], N), dtype=dtype, device=q.device)
    M = row_scale.numel()
    if y.numel() == 0:
        return y
    config = config_for(M, N, K, capability_of(q))
    operands = (t if t is None else t.contiguous() for t in (q, weight, row_scale, scale, bias))
    with device_of(q):
        _gemm_kernel[(tiles(M, N, config),)](
            *operands, y, M, N, K, **config.tiles, num_warps=config.warps, num_stages=config.stages
        )
    return y


@_int8_gemm.register_fake
def _(q: Tensor, weight: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return q.new_empty((*q.shape[:-1], weight.shape[0]), dtype=dtype)


def configurations(many_tiles: Mapping[int, Config]) -> Iterator[tuple[str, Config, tuple[str, ...], tuple[int, ...]]]:
    """Every configuration: in words, itself, the sizes that are multiples of 16, the compute capabilities."""
    even, chips = ("N", "K"), tuple(many_tiles)
    for rows, config in FEW_ROWS.items():
        yield f"M <= {rows}", config, even, chips
    yield "odd rows", ODD_ROWS, (), chips
    yield "few tiles", FEW_TILES, even, chips
    for chip, config in many_tiles.items():
        alike = tuple(c for c in chips if many_tiles[c] is config)
        if chip == alike[0]:
            yield f"many tiles sm_{'/'.join(map(str, alike))}", config, even, alike


SPECIMENS = tuple(
    Specimen(
        name=f"int8_gemm {dtype}, {name}",
        kernel=_gemm_kernel,
        types={"q_ptr": "*i8", "weight_ptr": "*i8", "row_scale_ptr": "*fp32", "scale_ptr": "*fp32"}
        | {"bias_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "M": "i32", "N": "i32", "K": "i32"},
        constants={},
        config=config,
        aligned=aligned,
        tensor_cores="int8",
        targets=targets,
    )
    for dtype in ("bf16", "fp16", "fp32")
    for name, config, aligned, targets in configurations(MANY_TILES)
)

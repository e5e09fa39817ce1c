"""Product of int8 activations with a weight of 4 bits, or of 8 that contain 4 (`packed_weight`), into the result:

    y[m, n] = (sum_k q[m, k] codes[n, k]) * scale[n] * row_scale[m] + bias[n] + sum_r reduced[m, r] up[n, r]
    codes[n, k] = nibble[n, k] * multiplier[n, k // group]  (+ low[n, k])

Nibbles become int8 in registers, on their way to the tensor cores; sums run in int32, exactly. A byte holds columns k
and k + ceil(K / 2), so every tile of bytes is two tiles of the weight, each with its own tile of activations. The last
term is the low-rank branch (SVDQuant, arXiv:2411.05007, sec. 4.2), whose product this kernel adds in passing.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the arguments of Triton functions have no Python types)

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from diffaccel.kernels._launch import Config, Specimen, device_of, dot
from diffaccel.kernels.int8_gemm import MAX_K, capability_of, tile_of, tiles
from diffaccel.kernels.packed_weight import GROUP_STEP, half, unpack
from diffaccel.kernels.token_quantize import cast, runs_here

# BLOCK_K counts bytes of the weight, so twice as many columns; otherwise as for int8_gemm, for the same reasons.
FEW_ROWS = {
    16: Config({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 128}, warps=4, stages=4),
    32: Config({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 128}, warps=4, stages=4),
}
FEW_TILES = Config({"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64}, warps=4, stages=4)
# Rows of bytes that do not begin at multiples of 16 are loaded byte by byte, an address each: larger tiles spill.
ODD_ROWS = Config({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 64}, warps=4, stages=3)
# Half of the registers hold sums; unpacking needs the rest, so there are no tiles of 256 columns.
_LARGE = Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, warps=8, stages=3)
# On sm_120 even those spill, and a second plane needs more registers on every chip whose operands come from there.
_NARROW = Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64}, warps=8, stages=3)
_LOW = Config({"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64}, warps=8, stages=3)
MANY_TILES = {80: _LARGE, 89: _LARGE, 90: _LARGE, 100: _LARGE, 120: _NARROW}
NESTED_TILES = {80: _LOW, 89: _LOW, 90: _LARGE, 100: _LARGE, 120: _LOW}
_ENOUGH_TILES = 128  # as in int8_gemm.py
BLOCK_R = 16


def w4a8_gemm_ref(
    q: Tensor,
    nibbles: Tensor,
    multiplier: Tensor | None,
    row_scale: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    reduced: Tensor | None,
    up: Tensor | None,
    group: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """The definition; arguments as for `w4a8_gemm`. The sums run in float64, where they are exact."""
    codes = unpack(nibbles, multiplier, q.shape[-1], group, low)
    y = (q.double() @ codes.double().t()).float() * scale * row_scale
    if bias is not None:
        y = y + bias.float()
    if reduced is not None and up is not None:
        y = y + reduced.float() @ up.float().t()
    return y.to(dtype)


@triton.jit
def multipliers(multiplier_ptr, n, N, K, column, GROUP: tl.constexpr, GATHER: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of the tile of columns from ``column`` on: [1, BLOCK_N] where it is of one group, else [BLOCK_K, BLOCK_N]."""
    row = multiplier_ptr + tl.minimum(n, N - 1).to(tl.int64)[None, :] * tl.cdiv(K, GROUP)
    if GATHER:
        ptrs = row + (tl.minimum(column + tl.arange(0, BLOCK_K), K - 1) // GROUP)[:, None]
    else:
        ptrs = row + column // GROUP
    return tl.load(ptrs)


@triton.jit
def nibbles_of(packed):
    """Bytes -> the columns of the first half, and of the second, -8..7."""
    return (packed & 15).to(tl.int8) - 8, (packed >> 4).to(tl.int8) - 8


@triton.jit
def codes_of(
    nibble_ptrs, low_ptrs, multiplier_ptr, n, N, K, HALF, start, keep,
    GROUP: tl.constexpr, GATHER: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of bytes -> int8 codes of its columns in the first half, and in the second, [BLOCK_K, BLOCK_N]."""
    first, second = nibbles_of(tl.load(nibble_ptrs, mask=keep[:, None], other=0x88))
    if multiplier_ptr is not None:
        first *= multipliers(multiplier_ptr, n, N, K, start, GROUP, GATHER, BLOCK_K)
        second *= multipliers(multiplier_ptr, n, N, K, start + HALF, GROUP, GATHER, BLOCK_K)
    if low_ptrs is not None:
        more, still_more = nibbles_of(tl.load(low_ptrs, mask=keep[:, None], other=0x88))
        first += more
        second += still_more
    return first, second


@triton.jit
def add_low_rank(y, reduced_ptr, up_ptr, m, n, M, N, R, BLOCK_R: tl.constexpr):
    """y + reduced @ up^T, with ``reduced`` [M, R] and ``up`` [N, R] of 16 bits."""
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        reduced_ptrs = reduced_ptr + m.to(tl.int64)[:, None] * R + r[None, :]
        reduced = tl.load(reduced_ptrs, mask=(m < M)[:, None] & (r < R)[None, :], other=0.0)
        up_ptrs = up_ptr + n.to(tl.int64)[None, :] * R + r[:, None]
        up = tl.load(up_ptrs, mask=(n < N)[None, :] & (r < R)[:, None], other=0.0)
        y = dot(reduced, up, y)
    return y


@triton.jit
def _gemm_kernel(
    q_ptr, nibble_ptr, multiplier_ptr, row_scale_ptr, scale_ptr, bias_ptr, low_ptr, reduced_ptr, up_ptr, y_ptr,
    M, N, K, HALF, R, GROUP: tl.constexpr, GATHER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # grid: (tiles,)  # fmt: skip
    m, n = tile_of(M, N, BLOCK_M, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows beyond the end read the last one again and are not stored: unlike a mask that costs nothing in the loop.
    q_ptrs = q_ptr + tl.minimum(m, M - 1).to(tl.int64)[:, None] * K + k[None, :]  # [BLOCK_M, BLOCK_K]
    place = tl.minimum(n, N - 1).to(tl.int64)[None, :] * HALF + k[:, None]  # [BLOCK_K, BLOCK_N]
    nibble_ptrs = nibble_ptr + place
    low_ptrs = low_ptr if low_ptr is None else low_ptr + place
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, HALF, BLOCK_K):
        keep = k < HALF - start
        first, second = codes_of(
            nibble_ptrs, low_ptrs, multiplier_ptr, n, N, K, HALF, start, keep, GROUP, GATHER, BLOCK_K
        )
        acc = dot(tl.load(q_ptrs, mask=keep[None, :], other=0), first, acc)
        acc = dot(tl.load(q_ptrs + HALF, mask=(k < K - HALF - start)[None, :], other=0), second, acc)
        q_ptrs += BLOCK_K
        nibble_ptrs += BLOCK_K
        if low_ptr is not None:
            low_ptrs += BLOCK_K
    row_scale = tl.load(row_scale_ptr + m, mask=m < M, other=0.0)
    scale = tl.load(scale_ptr + n, mask=n < N, other=0.0)
    y = acc.to(tl.float32) * scale[None, :] * row_scale[:, None]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if reduced_ptr is not None:
        y = add_low_rank(y, reduced_ptr, up_ptr, m, n, M, N, R, BLOCK_R)
    y_ptrs = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptrs, cast(y, y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def config_for(M: int, N: int, K: int, group: int | None, nested: bool, capability: int) -> tuple[Config, bool]:
    """The configuration for ``q`` [M, K] and N channels on a chip of compute capability 80, 89, 90, ..., and GATHER."""
    many = NESTED_TILES if nested else MANY_TILES
    config = next((few for rows, few in FEW_ROWS.items() if rows >= M), None)
    if K % 32:
        config = ODD_ROWS
    if config is None:
        config = many[max(known for known in many if known <= capability)]
        few = _LOW if nested else FEW_TILES
        config = config if tiles(M, N, config) >= _ENOUGH_TILES else few
    return fitted_to_groups(config, K, group)


def fitted_to_groups(config: Config, K: int, group: int | None) -> tuple[Config, bool]:
    """``config`` with tiles so narrow that each lies in one group; where none is, whether to gather multipliers."""
    if group is None:
        return config, False
    block = config.tiles["BLOCK_K"]
    while block > GROUP_STEP and (group % block or half(K) % block):
        block //= 2
    gather = half(K) % block != 0
    return replace(config, tiles={**config.tiles, "BLOCK_K": block}), gather


def w4a8_gemm(
    q: Tensor,
    nibbles: Tensor,
    multiplier: Tensor | None,
    row_scale: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    low: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    group: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """int8 ``q`` [..., K] and a packed weight [N, K] -> [..., N] in ``dtype`` (float32, bfloat16 or float16).

    Args:
        nibbles, multiplier, scale, group: as in `packed_weight.Int4Weight`.
        row_scale: float32 [..., 1], as `token_quantize` returns it.
        bias: [N].
        low: as in `packed_weight.NestedWeight`, whose scale goes with it; None computes with 4 bits.
        low_rank: reduced [..., R] and up [N, R], of one dtype.

    Raises:
        ValueError: Other dtypes, shapes that do not go together, or K so large that a sum could overflow.
    """
    check_packed(q, nibbles, multiplier, scale, bias, low, low_rank, group)
    if q.dtype != torch.int8 or row_scale.dtype != torch.float32 or row_scale.shape != (*q.shape[:-1], 1):
        got = f"{q.dtype} and {row_scale.dtype} {tuple(row_scale.shape)}"
        raise ValueError(f"expected q int8 and row_scale float32 {(*q.shape[:-1], 1)}, got {got}")
    if q.shape[-1] > MAX_K:
        raise ValueError(f"w4a8_gemm sums at most K = {MAX_K} products exactly, got {q.shape[-1]}")
    reduced, up = low_rank or (None, None)
    return _w4a8_gemm(q, nibbles, multiplier, row_scale, scale, bias, low, reduced, up, group, dtype)


def check_packed(
    x: Tensor,
    nibbles: Tensor,
    multiplier: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    low_rank: tuple[Tensor, Tensor] | None,
    group: int | None,
) -> None:
    """Raise ``ValueError`` where the operands of a product with a packed weight do not go together."""
    N, K = scale.shape[0] if scale.ndim == 1 else -1, x.shape[-1] if x.ndim else -1
    planes = {nibbles.shape, nibbles.shape if low is None else low.shape}
    fits = planes == {torch.Size((N, half(K)))} and (bias is None or bias.shape == (N,))
    if group is None or multiplier is None:
        fits &= group is None and multiplier is None
    else:
        fits &= group > 0 and group % GROUP_STEP == 0 and multiplier.shape == (N, -(-K // group))
    if low_rank is not None:
        reduced, up = low_rank
        fits &= up.ndim == 2 and up.shape[0] == N and reduced.shape == (*x.shape[:-1], up.shape[1])
        fits &= reduced.dtype == up.dtype
    if not fits:
        tensors = (x, nibbles, multiplier, scale, bias, low, *(low_rank or ()))
        got = [None if t is None else tuple(t.shape) for t in tensors]
        raise ValueError(
            "expected x [..., K], nibbles [N, ceil(K / 2)], multiplier [N, ceil(K / group)] or None without groups, "
            f"scale [N], bias [N], low like nibbles, low_rank [..., R] and [N, R]; got {got} with group {group}"
        )
    if {nibbles.dtype, torch.uint8 if low is None else low.dtype} != {torch.uint8} or scale.dtype != torch.float32:
        raise ValueError(f"expected nibbles and low uint8, scale float32, got {nibbles.dtype} and {scale.dtype}")
    if multiplier is not None and multiplier.dtype != torch.int8:
        raise ValueError(f"expected multiplier int8, got {multiplier.dtype}")


@torch.library.custom_op("diffaccel::w4a8_gemm", mutates_args=())
def _w4a8_gemm(
    q: Tensor,
    nibbles: Tensor,
    multiplier: Tensor | None,
    row_scale: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    reduced: Tensor | None,
    up: Tensor | None,
    group: int | None,
    dtype: torch.dtype,
) -> Tensor:
    if not runs_here(q, torch.int8):
        branch = (bias, low, reduced, up)
        return w4a8_gemm_ref(q, nibbles, multiplier, row_scale, scale, *branch, group, dtype).contiguous()
    # In float32 it has no tensor cores, and too few registers beside the sums: a product of its own.
    apart = None
    if reduced is not None and up is not None and up.dtype == torch.float32:
        apart, reduced, up = F.linear(reduced, up), None, None
    operands = (nibbles, multiplier, row_scale, scale, bias, low, reduced, up)
    N, K = scale.shape[0], q.shape[-1]
    y = torch.empty((*q.shape[:-1], N), dtype=dtype, device=q.device)
    M = row_scale.numel()
    if y.numel() == 0:
        return y
    config, gather = config_for(M, N, K, group, low is not None, capability_of(q))
    with device_of(q):
        _gemm_kernel[(tiles(M, N, config),)](
            q.contiguous(), *(t if t is None else t.contiguous() for t in operands), y,
            M, N, K, half(K), 0 if up is None else up.shape[1], GROUP=group or 1, GATHER=gather, BLOCK_R=BLOCK_R,
            **config.tiles, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return y if apart is None else y.add_(apart)


@_w4a8_gemm.register_fake
def _(q: Tensor, nibbles: Tensor, multiplier: Tensor | None, row_scale: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    return q.new_empty((*q.shape[:-1], scale.shape[0]), dtype=rest[-1])


def _specimens() -> Iterator[Specimen]:
    """Every configuration in groups; the largest also per channel, nested, with a low-rank branch, in every dtype."""
    chips = tuple(MANY_TILES)
    configurations = [(f"M <= {rows}", config, 128) for rows, config in FEW_ROWS.items()]
    configurations += [("odd rows", ODD_ROWS, 33), ("few tiles", FEW_TILES, 128)]
    many = [("many tiles", _LARGE, 128, (80, 89, 90, 100)), ("many tiles sm_120", _NARROW, 128, (120,))]
    nested = [("many tiles sm_80/89/120", _LOW, 128, (80, 89, 120)), ("many tiles sm_90/100", _LARGE, 128, (90, 100))]
    cases = [
        *(("bf16", *case, chips, 64, "group 64") for case in configurations),
        *((dtype, *case, 64, "group 64") for dtype in ("bf16", "fp16", "fp32") for case in many),
        *(("bf16", *case, None, "per channel") for case in many),
        *(("bf16", *case, 64, "nested") for case in nested),
        *(("bf16", *case, 64, "low rank") for case in many),
    ]
    for dtype, name, config, K, targets, group, variant in cases:
        fitted, gather = fitted_to_groups(config, K, group)
        pointers = {"low_ptr": "*u8" if variant == "nested" else None, "multiplier_ptr": "*i8" if group else None}
        pointers |= dict.fromkeys(("reduced_ptr", "up_ptr"), f"*{dtype}" if variant == "low rank" else None)
        yield Specimen(
            name=f"w4a8_gemm {dtype}, {name}, {variant}",
            kernel=_gemm_kernel,
            types={"q_ptr": "*i8", "nibble_ptr": "*u8", "row_scale_ptr": "*fp32", "scale_ptr": "*fp32"}
            | {"bias_ptr": f"*{dtype}", "y_ptr": f"*{dtype}"}
            | dict.fromkeys(("M", "N", "K", "HALF", "R"), "i32")
            | {pointer: kind for pointer, kind in pointers.items() if kind},
            constants={pointer: None for pointer, kind in pointers.items() if not kind}
            | {"GROUP": group or 1, "GATHER": gather, "BLOCK_R": BLOCK_R},
            config=fitted,
            aligned=() if K % 2 else ("N", "K", "HALF", "R"),
            tensor_cores="int8",
            targets=targets,
        )


SPECIMENS = tuple(_specimens())

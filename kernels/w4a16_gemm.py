"""Product of 16-bit activations with a weight of 4 bits, or of 8 that contain 4 (`packed_weight`), into the result:

    y[m, n] = (sum_k x[m, k] codes[n, k]) * scale[n] + bias[n] + sum_r reduced[m, r] up[n, r]

Nothing is lost but what the weight lost: codes are integers up to 127, which bfloat16 and float16 hold exactly. Tensor
cores work as for 16-bit weights, so this pays where the weight's bytes decide the time (few rows) or do not fit memory.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the arguments of Triton functions have no Python types)

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffaccel.kernels._launch import Config, Specimen, device_of, dot
from diffaccel.kernels.int8_gemm import capability_of, tile_of, tiles
from diffaccel.kernels.packed_weight import half, unpack
from diffaccel.kernels.token_quantize import cast, runs_here
from diffaccel.kernels.w4a8_gemm import BLOCK_R, add_low_rank, check_packed, codes_of, fitted_to_groups

# BLOCK_K counts bytes of the weight, so twice as many columns. For few rows as in w4a8_gemm.py.
FEW_ROWS = {
    16: Config({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64}, warps=4, stages=4),
    32: Config({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 64}, warps=4, stages=4),
}
ODD_ROWS = Config({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32}, warps=4, stages=3)
FEW_TILES = Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, warps=4, stages=4)
# 20 KiB a stage: 16 of activations and 4 of the weight. On sm_120 they spill, and with two planes on others.
_LARGE = Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}, warps=8, stages=3)
_NARROW = Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32}, warps=8, stages=3)
MANY_TILES = {80: _LARGE, 89: _LARGE, 90: _LARGE, 100: _LARGE, 120: _NARROW}
_ENOUGH_TILES = 128  # as in int8_gemm.py


def w4a16_gemm_ref(
    x: Tensor,
    nibbles: Tensor,
    multiplier: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    reduced: Tensor | None,
    up: Tensor | None,
    group: int | None,
) -> Tensor:
    """The definition, in float32; arguments as for `w4a16_gemm`."""
    y = x.float() @ unpack(nibbles, multiplier, x.shape[-1], group, low).float().t() * scale
    if bias is not None:
        y = y + bias.float()
    if reduced is not None and up is not None:
        y = y + reduced.float() @ up.float().t()
    return y.to(x.dtype)


@triton.jit
def _gemm_kernel(
    x_ptr, nibble_ptr, multiplier_ptr, scale_ptr, bias_ptr, low_ptr, reduced_ptr, up_ptr, y_ptr,
    M, N, K, HALF, R, GROUP: tl.constexpr, GATHER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # grid: (tiles,)  # fmt: skip
    m, n = tile_of(M, N, BLOCK_M, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows beyond the end read the last one again and are not stored: unlike a mask that costs nothing in the loop.
    x_ptrs = x_ptr + tl.minimum(m, M - 1).to(tl.int64)[:, None] * K + k[None, :]  # [BLOCK_M, BLOCK_K]
    place = tl.minimum(n, N - 1).to(tl.int64)[None, :] * HALF + k[:, None]  # [BLOCK_K, BLOCK_N]
    nibble_ptrs = nibble_ptr + place
    low_ptrs = low_ptr if low_ptr is None else low_ptr + place
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, HALF, BLOCK_K):
        keep = k < HALF - start
        first, second = codes_of(
            nibble_ptrs, low_ptrs, multiplier_ptr, n, N, K, HALF, start, keep, GROUP, GATHER, BLOCK_K
        )
        x = tl.load(x_ptrs, mask=keep[None, :], other=0.0)
        acc = dot(x, first.to(tl.float32).to(x.dtype), acc)
        x = tl.load(x_ptrs + HALF, mask=(k < K - HALF - start)[None, :], other=0.0)
        acc = dot(x, second.to(tl.float32).to(x.dtype), acc)
        x_ptrs += BLOCK_K
        nibble_ptrs += BLOCK_K
        if low_ptr is not None:
            low_ptrs += BLOCK_K
    y = acc * tl.load(scale_ptr + n, mask=n < N, other=0.0)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if reduced_ptr is not None:
        y = add_low_rank(y, reduced_ptr, up_ptr, m, n, M, N, R, BLOCK_R)
    y_ptrs = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptrs, cast(y, y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def config_for(M: int, N: int, K: int, group: int | None, nested: bool, capability: int) -> tuple[Config, bool]:
    """The configuration for ``x`` [M, K] and N channels on a chip of compute capability 80, 89, 90, ..., and GATHER."""
    config = next((few for rows, few in FEW_ROWS.items() if rows >= M), None)
    if K % 32:
        config = ODD_ROWS
    if config is None:
        many = MANY_TILES[max(known for known in MANY_TILES if known <= capability)]
        config = many if not nested and tiles(M, N, many) >= _ENOUGH_TILES else FEW_TILES
    return fitted_to_groups(config, K, group)


def w4a16_gemm(
    x: Tensor,
    nibbles: Tensor,
    multiplier: Tensor | None,
    scale: Tensor,
    bias: Tensor | None = None,
    low: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    group: int | None = None,
) -> Tensor:
    """``x`` [..., K] bfloat16 or float16 and a packed weight [N, K] -> [..., N] in the dtype of ``x``.

    Args:
        nibbles, multiplier, scale, group: as in `packed_weight.Int4Weight`.
        bias: [N].
        low: as in `packed_weight.NestedWeight`, whose scale goes with it; None computes with 4 bits.
        low_rank: reduced [..., R] and up [N, R], in the dtype of ``x``.

    Raises:
        ValueError: Other dtypes, or shapes that do not go together.
    """
    check_packed(x, nibbles, multiplier, scale, bias, low, low_rank, group)
    reduced, up = low_rank or (None, None)
    if x.dtype not in (torch.bfloat16, torch.float16) or (up is not None and up.dtype != x.dtype):
        got = f"{x.dtype} and {None if up is None else up.dtype}"
        raise ValueError(f"expected x bfloat16 or float16, and low_rank in its dtype, got {got}")
    return _w4a16_gemm(x, nibbles, multiplier, scale, bias, low, reduced, up, group)


@torch.library.custom_op("diffaccel::w4a16_gemm", mutates_args=())
def _w4a16_gemm(
    x: Tensor,
    nibbles: Tensor,
    multiplier: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    reduced: Tensor | None,
    up: Tensor | None,
    group: int | None,
) -> Tensor:
    operands = (nibbles, multiplier, scale, bias, low, reduced, up)
    if not runs_here(x, torch.int8):
        return w4a16_gemm_ref(x, *operands, group).contiguous()
    N, K = scale.shape[0], x.shape[-1]
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    M = y.numel() // N
    config, gather = config_for(M, N, K, group, low is not None, capability_of(x))
    with device_of(x):
        _gemm_kernel[(tiles(M, N, config),)](
            x.contiguous(), *(t if t is None else t.contiguous() for t in operands), y,
            M, N, K, half(K), 0 if up is None else up.shape[1], GROUP=group or 1, GATHER=gather, BLOCK_R=BLOCK_R,
            **config.tiles, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return y


@_w4a16_gemm.register_fake
def _(x: Tensor, nibbles: Tensor, multiplier: Tensor | None, scale: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


def _specimens() -> Iterator[Specimen]:
    """Every configuration in groups; the largest also per channel, with a low-rank branch and in float16; nested."""
    chips = tuple(MANY_TILES)
    configurations = [(f"M <= {rows}", config, 128, chips) for rows, config in FEW_ROWS.items()]
    configurations += [("odd rows", ODD_ROWS, 33, chips), ("few tiles", FEW_TILES, 128, chips)]
    many = [("many tiles", _LARGE, 128, (80, 89, 90, 100)), ("many tiles sm_120", _NARROW, 128, (120,))]
    cases = [
        *(("bf16", *case, 64, "group 64") for case in configurations),
        *((dtype, *case, 64, "group 64") for dtype in ("bf16", "fp16") for case in many),
        *(("bf16", *case, None, "per channel") for case in many),
        *(("bf16", *case, 64, "low rank") for case in many),
        ("bf16", "few tiles", FEW_TILES, 128, chips, 64, "nested"),
    ]
    for dtype, name, config, K, targets, group, variant in cases:
        fitted, gather = fitted_to_groups(config, K, group)
        pointers = {"low_ptr": "*u8" if variant == "nested" else None, "multiplier_ptr": "*i8" if group else None}
        pointers |= dict.fromkeys(("reduced_ptr", "up_ptr"), f"*{dtype}" if variant == "low rank" else None)
        yield Specimen(
            name=f"w4a16_gemm {dtype}, {name}, {variant}",
            kernel=_gemm_kernel,
            types={"x_ptr": f"*{dtype}", "nibble_ptr": "*u8", "scale_ptr": "*fp32"}
            | {"bias_ptr": f"*{dtype}", "y_ptr": f"*{dtype}"}
            | dict.fromkeys(("M", "N", "K", "HALF", "R"), "i32")
            | {pointer: kind for pointer, kind in pointers.items() if kind},
            constants={pointer: None for pointer, kind in pointers.items() if not kind}
            | {"GROUP": group or 1, "GATHER": gather, "BLOCK_R": BLOCK_R},
            config=fitted,
            aligned=() if K % 2 else ("N", "K", "HALF", "R"),
            tensor_cores="16-bit",
            targets=targets,
        )


SPECIMENS = tuple(_specimens())

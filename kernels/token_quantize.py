"""Quantisation of every token (row) to int8 or fp8 e4m3, with what often precedes it in a DiT block fused in.

    y = LayerNorm(x) * weight + bias          (each part optional)
    y = y * (1 + scale) + shift               (adaLN modulation, optional; arXiv:2212.09748, sec. 3.2)
    s = max(max|y| / qmax, 2**-100),  q = round(y / s)        qmax = 127 (int8) or 448 (e4m3fn)

Fused, an element is read at 2 bytes and written at 1, once; apart, y is written and read again at 2 bytes each way.
Everything is computed in float32; rounding is to nearest, half to even.

A row that holds NaN or an infinity gets q = 0 and s = NaN or infinity, so that every product with it is NaN; the other
rows are not touched by it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the arguments of Triton functions have no Python types)

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from diffaccel.kernels._launch import INTERPRETED, Config, Specimen, device_of, runs_triton

QMAX = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# Keeps 1 / s finite for rows of zeros; the same as in int8_linear.py.
SCALE_FLOOR = tl.constexpr(2.0**-100)

# One row a program. A row of up to 16384 stays in registers, 32 elements a thread in float32; FLUX's longest is 15360.
# A longer one is read again in every pass, mostly from L2.
ROW = tuple(Config({"BLOCK_K": 1024 * warps}, warps, stages=1) for warps in (1, 2, 4, 8, 16))
LONG_ROW = Config({"BLOCK_K": 4096}, warps=8, stages=1)


def token_quantize_ref(
    x: Tensor,
    dtype: torch.dtype = torch.int8,
    eps: float | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, in float32; arguments as for `token_quantize`."""
    y = x.float()
    if eps is not None:
        y = F.layer_norm(y, y.shape[-1:], eps=eps)
    if weight is not None:
        y = y * weight.float()
    if bias is not None:
        y = y + bias.float()
    if scale is not None:
        y = y * (1 + _beside(scale, x).float())
    if shift is not None:
        y = y + _beside(shift, x).float()
    # By a tensor: on CUDA a number's inverse is multiplied with instead, which rounds twice and breaks ties otherwise.
    row_scale = (y.abs().amax(-1, keepdim=True) / y.new_full((), QMAX[dtype])).clamp(min=SCALE_FLOOR.value)
    q = torch.where(row_scale.isfinite(), y * row_scale.reciprocal(), 0.0)
    return (q.round() if dtype == torch.int8 else q).to(dtype), row_scale


@triton.jit
def cast(x, dtype: tl.constexpr):
    """``x`` float32 -> ``dtype``, to nearest even.

    The interpreter truncates to bfloat16 and loses the carry into the exponent on the way to e4m3: there ``x`` is first
    rounded to a number that ``dtype`` can hold.
    """
    if INTERPRETED and (dtype == tl.bfloat16 or dtype == tl.float8e4nv):
        power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)  # of two, at most |x|
        if dtype == tl.bfloat16:
            spacing = tl.maximum(power, 2.0**-126) * 2.0**-7
        else:
            spacing = tl.maximum(power, 2.0**-6) * 2.0**-3
        x = tl.where(power < float("inf"), round_even(x / spacing) * spacing, x)
    return x.to(dtype)


@triton.jit
def round_even(x):
    """To the nearest integer, half to even, for |x| < 2**22: beyond 2**23 float32 has no fraction left."""
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2**23


@triton.jit
def _row(ptr, k, keep):
    return tl.load(ptr + k, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def _of_row(ptr, row, stride, tokens):
    """Where the modulation of ``row`` begins: ``tokens`` rows in turn share one."""
    return ptr if ptr is None else ptr + row // tokens * stride


@triton.jit
def _modulated(y, k, keep, weight_ptr, bias_ptr, scale_ptr, shift_ptr):
    """``y`` with weight, bias, scale and shift, as far as there are any; 0 where ``keep`` is not."""
    if weight_ptr is not None:
        y *= _row(weight_ptr, k, keep)
    if bias_ptr is not None:
        y += _row(bias_ptr, k, keep)
    if scale_ptr is not None:
        y *= 1 + _row(scale_ptr, k, keep)
    if shift_ptr is not None:
        y += _row(shift_ptr, k, keep)
    return y


@triton.jit
def _largest(y):
    """max|y| as the bits of a float: in their order NaN comes last, whereas `tl.max` of floats passes over it."""
    return tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF)


@triton.jit
def row_scale_of(largest, QMAX: tl.constexpr):
    """Bits of max|y| -> s, and 1 / s or, in a row with NaN or infinity, 0."""
    magnitude = largest.to(tl.float32, bitcast=True)
    finite = magnitude < float("inf")
    row_scale = tl.where(finite, tl.maximum(tl.div_rn(magnitude, QMAX), SCALE_FLOOR), magnitude)
    return row_scale, tl.where(finite, tl.div_rn(1.0, row_scale), 0.0)


@triton.jit
def _store_quantized(q_ptr, k, keep, y, inverse):
    q = tl.where(inverse > 0, y * inverse, 0.0)
    if q_ptr.dtype.element_ty == tl.int8:
        q = round_even(q).to(tl.int8)
    else:
        q = cast(q, q_ptr.dtype.element_ty)
    tl.store(q_ptr + k, q, mask=keep)


@triton.jit
def _row_kernel(
    x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, q_ptr, row_scale_ptr,
    K, scale_stride, scale_tokens, shift_stride, shift_tokens, eps,
    NORM: tl.constexpr, QMAX: tl.constexpr, BLOCK_K: tl.constexpr,
):  # grid: (M,); BLOCK_K >= K  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scale_ptr = _of_row(scale_ptr, row, scale_stride, scale_tokens)
    shift_ptr = _of_row(shift_ptr, row, shift_stride, shift_tokens)
    k = tl.arange(0, BLOCK_K)
    keep = k < K
    y = _row(x_ptr + row * K, k, keep)
    if NORM:
        y = tl.where(keep, y - tl.sum(y) / K, 0.0)
        y *= tl.rsqrt(tl.sum(y * y) / K + eps)
    y = _modulated(y, k, keep, weight_ptr, bias_ptr, scale_ptr, shift_ptr)
    row_scale, inverse = row_scale_of(_largest(y), QMAX)
    tl.store(row_scale_ptr + row, row_scale)
    _store_quantized(q_ptr + row * K, k, keep, y, inverse)


@triton.jit
def _long_row_kernel(
    x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, q_ptr, row_scale_ptr,
    K, scale_stride, scale_tokens, shift_stride, shift_tokens, eps,
    NORM: tl.constexpr, QMAX: tl.constexpr, BLOCK_K: tl.constexpr,
):  # grid: (M,); any K  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scale_ptr = _of_row(scale_ptr, row, scale_stride, scale_tokens)
    shift_ptr = _of_row(shift_ptr, row, shift_stride, shift_tokens)
    x_ptr += row * K
    q_ptr += row * K
    mean = 0.0
    factor = 1.0
    if NORM:
        total = tl.zeros((BLOCK_K,), tl.float32)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            total += _row(x_ptr, k, k < K)
        mean = tl.sum(total) / K
        square = tl.zeros((BLOCK_K,), tl.float32)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            centred = tl.where(k < K, _row(x_ptr, k, k < K) - mean, 0.0)
            square += centred * centred
        factor = tl.rsqrt(tl.sum(square) / K + eps)
    largest = tl.zeros((), tl.int32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        keep = k < K
        y = tl.where(keep, (_row(x_ptr, k, keep) - mean) * factor, 0.0)
        y = _modulated(y, k, keep, weight_ptr, bias_ptr, scale_ptr, shift_ptr)
        largest = tl.maximum(largest, _largest(y))
    row_scale, inverse = row_scale_of(largest, QMAX)
    tl.store(row_scale_ptr + row, row_scale)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        keep = k < K
        y = (_row(x_ptr, k, keep) - mean) * factor
        y = _modulated(y, k, keep, weight_ptr, bias_ptr, scale_ptr, shift_ptr)
        _store_quantized(q_ptr, k, keep, y, inverse)


def config_for(K: int) -> Config:
    """The smallest block that holds a row of ``K``, or, where none does, the one to go through it with."""
    return next((config for config in ROW if config.tiles["BLOCK_K"] >= K), LONG_ROW)


def token_quantize(
    x: Tensor,
    dtype: torch.dtype = torch.int8,
    eps: float | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``x`` [..., K] float32, bfloat16 or float16 -> q [..., K] and float32 row scale [..., 1]; y ~ q * row scale.

    Args:
        dtype: ``torch.int8`` (q in -127..127) or ``torch.float8_e4m3fn`` (-448..448).
        eps: of the LayerNorm; None leaves ``x`` as it is.
        weight, bias: [K].
        scale, shift: [B, K], [B, 1, K] or [B, S, K] for ``x`` [B, S, K]; in general one row for every index of leading
            dimensions of ``x``. They may be slices of a wider tensor.

    Raises:
        ValueError: Another dtype, or shapes that do not go together.
    """
    if dtype not in QMAX or x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"expected x [..., K > 0] and one of {list(QMAX)}, got {tuple(x.shape)} and {dtype}")
    if any(p is not None and p.shape != x.shape[-1:] for p in (weight, bias)):
        raise ValueError(f"expected weight and bias [{x.shape[-1]}]")
    for modulation in (scale, shift):
        if modulation is not None:
            _beside(modulation, x)
    return _token_quantize(x, dtype, eps, weight, bias, scale, shift)


def _beside(modulation: Tensor, x: Tensor) -> Tensor:
    """``modulation`` as a view that has the dimensions of ``x``, size 1 where it does not depend on them."""
    lead = list(modulation.shape[:-1])
    while lead and lead[-1] == 1:
        lead.pop()
    if modulation.shape[-1:] != x.shape[-1:] or lead != list(x.shape[: len(lead)]) or len(lead) >= x.ndim:
        got = f"{tuple(modulation.shape)} for x {tuple(x.shape)}"
        raise ValueError(f"expected scale and shift [B, K] or [B, S, K] beside x [B, S, K], got {got}")
    return modulation.reshape(*lead, *[1] * (x.ndim - 1 - len(lead)), x.shape[-1])


@torch.library.custom_op("diffaccel::token_quantize", mutates_args=())
def _token_quantize(
    x: Tensor,
    dtype: torch.dtype,
    eps: float | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if not runs_here(x, dtype):
        q, row_scale = token_quantize_ref(x, dtype, eps, weight, bias, scale, shift)
        return q.contiguous(), row_scale.contiguous()
    K = x.shape[-1]
    q = torch.empty(x.shape, dtype=dtype, device=x.device)
    row_scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    M = row_scale.numel()
    if M == 0:
        return q, row_scale
    vectors = [None if v is None else v.contiguous() for v in (weight, bias)]
    modulations = [None if m is None else _rows(m) for m in (scale, shift)]
    strides = [number for m in modulations for number in ((0, 1) if m is None else (m.stride(0), M // len(m)))]
    config = config_for(K)
    with device_of(x):
        (_row_kernel if config.tiles["BLOCK_K"] >= K else _long_row_kernel)[(M,)](
            x.contiguous(), *vectors, *modulations, q, row_scale, K, *strides, 0.0 if eps is None else eps,
            NORM=eps is not None, QMAX=QMAX[dtype], **config.tiles, num_warps=config.warps, num_stages=config.stages,
            # y * inverse + 1.5 * 2**23 in one rounding would break ties otherwise than the reference.
            enable_fp_fusion=False,
        )  # fmt: skip
    return q, row_scale


@_token_quantize.register_fake
def _(x: Tensor, dtype: torch.dtype, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _rows(modulation: Tensor) -> Tensor:
    """[..., K] -> [R, K], in place where a row is contiguous."""
    rows = modulation.reshape(-1, modulation.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def runs_here(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels for ``dtype`` run on the device of ``x``: int8 from sm_80 on, e4m3 from sm_89 on."""
    if not runs_triton(x) or torch.version.hip:
        return False
    return not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (
        (8, 9) if dtype.is_floating_point else (8, 0)
    )


def _specimens() -> Iterator[Specimen]:
    """Each input dtype to each output, alone and after the LayerNorm and modulation of a DiT block.

    The shorter rows only from bfloat16: every block has 32 elements a thread, so it is the same code.
    """
    outputs = {"int8": ("*i8", 127.0, (80, 89, 90, 100, 120)), "fp8": ("*fp8e4nv", 448.0, (89, 90, 100, 120))}
    numbers = {"K": "i32", "scale_stride": "i32", "scale_tokens": "i32", "shift_stride": "i32", "shift_tokens": "i32"}
    cases = itertools.product(("fp32", "bf16", "fp16"), outputs.items(), (False, True), (*ROW, LONG_ROW))
    for dtype, (output, (q, qmax, targets)), fused, config in cases:
        if dtype != "bf16" and config not in (ROW[-1], LONG_ROW):
            continue
        pointers = ["x_ptr", *(("scale_ptr", "shift_ptr") if fused else ())]
        absent = {"weight_ptr", "bias_ptr", "scale_ptr", "shift_ptr"}.difference(pointers)
        length = "any K" if config is LONG_ROW else f"K <= {config.tiles['BLOCK_K']}"
        yield Specimen(
            name=f"token_quantize {dtype} to {output}{', adaLN' if fused else ''}, {length}",
            kernel=_long_row_kernel if config is LONG_ROW else _row_kernel,
            types=dict.fromkeys(pointers, f"*{dtype}")
            | {"q_ptr": q, "row_scale_ptr": "*fp32", **numbers, "eps": "fp32"},
            constants=dict.fromkeys(absent) | {"NORM": fused, "QMAX": qmax},
            config=config,
            aligned=("K", "scale_stride", "shift_stride"),
            targets=targets,
            fp_fusion=False,
        )


SPECIMENS = tuple(_specimens())

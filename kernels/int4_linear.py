"""Linear layer with a weight of 4 bits, or of 8 that contain 4 (`packed_weight`), and activations of 8 or 16 (or 4):

    W4A8:   y = (q_x codes^T) * s_x * s_w + b + (x down^T) up^T        q_x, s_x: per token, as in `int8_linear`
    W4A16:  y = (x codes^T) * s_w + b + (x down^T) up^T

The last term is the optional low-rank branch in the dtype of x (SVDQuant, arXiv:2411.05007, sec. 4.2). Given both
planes of a nested weight the same products run with its 8-bit codes. W4A4 is W4A8 with coarser activations
(`int4_activations`), and no faster.

The weight stays packed. On CUDA our Triton kernels unpack it in registers (`w4a8_gemm`, `w4a16_gemm`); elsewhere, and
in the library's candidates, some channels at a time are unpacked into a temporary and multiplied. On the CPU that takes
a quarter to a third more than the int8 product of 1024 tokens alone, and several times as much as that of few tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.kernels._candidates import Trial, choose, has_triton, token_bucket, worst_row_error
from diffaccel.kernels.fit_int4 import quantize_int4, quantize_nested
from diffaccel.kernels.int4_activations import quantize_per_token_int4
from diffaccel.kernels.int8_linear import activation_bits, saturating_data
from diffaccel.kernels.int8_rows import PLAIN, Conditioner, conditioned, quantize_rows
from diffaccel.kernels.packed_weight import Int4Weight, NestedWeight, unpack

# Codes unpacked at a time: on the CPU they stay in the second-level cache; on a GPU so many that it is busy.
_CODES = {"cpu": 1 << 20}
_CODES_ELSEWHERE = 1 << 26
_INT4_GROUP = 64  # of activations, where the weight has no groups
ACTIVATIONS = ("int8", "int4", "float")


def int4_linear_ref(
    x: Tensor,
    packed: Int4Weight | NestedWeight,
    bias: Tensor | None = None,
    activations: str = "int8",
    low_rank: tuple[Tensor, Tensor] | None = None,
    bits: int = 8,
    how: Conditioner = PLAIN,
) -> Tensor:
    """The definition, its products in float64; arguments as for `int4_linear`, ``bits`` of int8 activations."""
    x = conditioned(x, how)
    if activations != "float":
        group = packed.high.group if isinstance(packed, NestedWeight) else packed.group
        q, row_scale = _quantized(x, activations, group, bits)
        y = (q.double() @ packed.codes().double().t()) * packed.scale * row_scale
    else:
        y = x.double() @ packed.codes().double().t() * packed.scale
    if low_rank is not None:
        down, up = low_rank
        y = y + (x.double() @ down.double().t()).to(x.dtype).double() @ up.double().t()
    return (y if bias is None else y + bias.double()).to(x.dtype)


def int4_linear(
    x: Tensor,
    packed: Int4Weight | NestedWeight,
    bias: Tensor | None = None,
    activations: str = "int8",
    low_rank: tuple[Tensor, Tensor] | None = None,
    path: str = "auto",
    how: Conditioner = PLAIN,
) -> Tensor:
    """``x`` [..., K] float32, bfloat16 or float16 -> [..., N] in ``x.dtype``. Forward only.

    Args:
        packed: [N, K]. A `NestedWeight` computes with its 8-bit codes, its ``high`` with 4 bits.
        bias: [N].
        activations: "int8", quantised per token (7 bits where `int8_linear.activation_bits` says so); "int4", per token
            and group of the weight (64 columns where it has none); or "float".
        low_rank: down [R, K] and up [N, R], both in ``x.dtype``.
        path: "auto" measures the candidates at the first call of a shape class. "onednn", "int_mm", "triton" or "dense"
            (activations not quantised to int8) fixes one.
        how: what is done to ``x`` beforehand, with int8 activations in the same pass.

    Raises:
        ValueError: Wrong dtype, shape or device, or a candidate that does not exist here.
    """
    nibbles, multiplier, scale, low, group = _planes(packed)
    down, up = low_rank or (None, None)
    columns = packed.shape[1]
    return _int4_linear(x, nibbles, multiplier, scale, low, bias, down, up, columns, group, activations, path, *how)


@torch.library.custom_op("diffaccel::int4_linear", mutates_args=())
def _int4_linear(
    x: Tensor,
    nibbles: Tensor,
    multiplier: Tensor | None,
    scale: Tensor,
    low: Tensor | None,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    columns: int,
    group: int | None,
    activations: str,
    path: str,
    before: Tensor | None = None,
    after: Tensor | None = None,
    block: int = 1,
) -> Tensor:
    N, K = scale.shape[0], columns
    if x.shape[-1] != K or nibbles.device != x.device or (bias is not None and bias.shape != (N,)):
        got = f"{tuple(x.shape)} on {x.device} and {None if bias is None else tuple(bias.shape)}"
        raise ValueError(f"expected x [..., {K}] on {nibbles.device} and bias [{N}], got {got}")
    if (
        down is not None
        and up is not None
        and (down.shape != (up.shape[-1], K) or up.shape[:-1] != (N,) or {down.dtype, up.dtype} != {x.dtype})
    ):
        pair = [(t.dtype, tuple(t.shape)) for t in (down, up)]
        raise ValueError(f"expected low_rank [R, {K}] and [{N}, R] in {x.dtype}, got {pair}")
    if activations not in ACTIVATIONS:
        raise ValueError(f"expected activations to be one of {ACTIVATIONS}, got {activations!r}")
    names = _paths(x.device, activations, x.dtype)
    if path not in ("auto", *names):
        raise ValueError(f"int4_linear has no candidate {path!r} here, expected one of {('auto', *names)}")
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], N))
    rows = x.reshape(-1, K)  # [M, K]
    weight = Planes(nibbles, multiplier, scale, low, group)
    if path == "auto":
        path = _resolve(rows, weight, activations, names)
    how = Conditioner(before, after, block)
    if activations == "int8" and path != "dense" and down is None:  # nothing but the integers needs what goes in
        y = _RUN[path, activations](rows, weight, bias, None, how)
    else:
        rows = conditioned(rows, how)
        low_rank = None if down is None or up is None else (F.linear(rows, down), up)
        y = _RUN[path, activations](rows, weight, bias, low_rank)
    return y.to(x.dtype).view(*x.shape[:-1], N)


@_int4_linear.register_fake
def _(x: Tensor, nibbles: Tensor, multiplier: Tensor | None, scale: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


class Planes(NamedTuple):
    """The tensors of a packed weight, as the operator gets them."""

    nibbles: Tensor
    multiplier: Tensor | None
    scale: Tensor
    low: Tensor | None
    group: int | None

    def channels(self, part: slice, columns: int) -> Tensor:
        """Codes of some channels, int8 [n, K]."""
        multiplier, low = (t if t is None else t[part] for t in (self.multiplier, self.low))
        return unpack(self.nibbles[part], multiplier, columns, self.group, low)


LowRank = tuple[Tensor, Tensor] | None  # reduced [M, R] = x down^T, and up [N, R]


def _quantized(
    x: Tensor, activations: str, group: int | None, bits: int, how: Conditioner = PLAIN
) -> tuple[Tensor, Tensor]:
    """Integers and the scale of each token."""
    if activations == "int4":
        return quantize_per_token_int4(x, group or _INT4_GROUP, bits)
    return quantize_rows(x, how, bits)


def _onednn(
    activations: str,
    x: Tensor,
    weight: Planes,
    bias: Tensor | None,
    low_rank: LowRank,
    how: Conditioner = PLAIN,
) -> Tensor:
    """As in `int8_linear`, but codes go in as they are: bringing them into oneDNN's blocked layout takes as long as the
    product of 1024 tokens, whereas the product itself orders what it reads for next to nothing.
    """
    bits = activation_bits()
    q, row_scale = _quantized(x, activations, weight.group, bits, how)
    zero_point = 64 if bits == 7 else 128
    q = (q.add_(64) if bits == 7 else q.bitwise_xor_(-128)).view(torch.uint8)
    zero = torch.zeros(len(weight.scale), dtype=torch.int64)
    plain: tuple[object, ...] = (None, 1.0, 0, torch.float32, "none", [], "")  # no bias, float32 out, nothing fused

    def product(codes: Tensor, part: slice) -> Tensor:
        codes = codes.to_mkldnn().transpose(0, 1)
        return torch.ops.onednn.qlinear_pointwise(q, 1.0, zero_point, codes, weight.scale[part], zero[part], *plain)

    return _completed(_by_channels(x, weight, product), row_scale, bias, low_rank)


def _int_mm(
    activations: str,
    x: Tensor,
    weight: Planes,
    bias: Tensor | None,
    low_rank: LowRank,
    how: Conditioner = PLAIN,
) -> Tensor:
    q, row_scale = _quantized(x, activations, weight.group, 8, how)
    y = _by_channels(x, weight, lambda codes, part: torch._int_mm(q, codes.t()).float().mul_(weight.scale[part]))
    return _completed(y, row_scale, bias, low_rank)


def _triton_integer(
    activations: str,
    x: Tensor,
    weight: Planes,
    bias: Tensor | None,
    low_rank: LowRank,
    how: Conditioner = PLAIN,
) -> Tensor:
    from diffaccel.kernels.w4a8_gemm import w4a8_gemm

    q, row_scale = _quantized(x, activations, weight.group, 8, how)
    nibbles, multiplier, scale, low, group = weight
    return w4a8_gemm(q, nibbles, multiplier, row_scale, scale, bias, low, low_rank, group, x.dtype)


def _triton_float(x: Tensor, weight: Planes, bias: Tensor | None, low_rank: LowRank) -> Tensor:
    from diffaccel.kernels.w4a16_gemm import w4a16_gemm

    nibbles, multiplier, scale, low, group = weight
    return w4a16_gemm(x, nibbles, multiplier, scale, bias, low, low_rank, group)


def _dense(x: Tensor, weight: Planes, bias: Tensor | None, low_rank: LowRank) -> Tensor:
    if x.device.type == "cpu":  # in float32: half-precision matmul is slower
        x = x.float()
        y = _by_channels(x, weight, lambda codes, _: F.linear(x, codes.float()))
        return _completed(y, weight.scale, bias, low_rank)

    def product(codes: Tensor, part: slice) -> Tensor:
        return F.linear(x, (codes * weight.scale[part, None]).to(x.dtype))

    y = _by_channels(x, weight, product)
    y = y if bias is None else y + bias
    return y if low_rank is None else torch.addmm(y, low_rank[0], low_rank[1].t())


def _dense_int4(x: Tensor, weight: Planes, bias: Tensor | None, low_rank: LowRank) -> Tensor:
    """Unlike int8, 4 bits are not skipped where that is faster: they are asked for to see what they do."""
    q, row_scale = _quantized(x, "int4", weight.group, 8 if x.is_cuda else activation_bits())
    return _dense((q * row_scale).to(x.dtype), weight, bias, low_rank)


def _by_channels(x: Tensor, weight: Planes, product: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """``product`` of the codes of some channels at a time, put together: [M, N]."""
    (M, K), N = x.shape, len(weight.scale)
    step = max(64, _CODES.get(x.device.type, _CODES_ELSEWHERE) // K // 64 * 64)
    if step >= N:
        return product(weight.channels(slice(None), K), slice(None))
    y: Tensor | None = None
    for start in range(0, N, step):
        part = slice(start, start + step)
        columns = product(weight.channels(part, K), part)
        y = columns.new_empty((M, N)) if y is None else y
        y[:, part] = columns
    assert y is not None
    return y


def _completed(y: Tensor, scale: Tensor, bias: Tensor | None, low_rank: LowRank) -> Tensor:
    """y * scale + bias + reduced up^T in place, for ``y`` float32 [M, N] and a scale for each row or column."""
    y = y.mul_(scale) if bias is None else torch.addcmul(bias.float(), y, scale, out=y)
    return y if low_rank is None else y.addmm_(low_rank[0].float(), low_rank[1].float().t())


_RUN: dict[tuple[str, str], Callable[..., Tensor]] = {
    **{("onednn", integers): partial(_onednn, integers) for integers in ("int8", "int4")},
    **{("int_mm", integers): partial(_int_mm, integers) for integers in ("int8", "int4")},
    **{("triton", integers): partial(_triton_integer, integers) for integers in ("int8", "int4")},
    ("triton", "float"): _triton_float,
    ("dense", "int8"): _dense,
    ("dense", "int4"): _dense_int4,
    ("dense", "float"): _dense,
}


def _paths(device: torch.device, activations: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Candidates that exist on ``device``."""
    if device.type == "cpu":
        return ("onednn", "dense") if activations != "float" and _has_onednn() else ("dense",)
    library = ("int_mm",) if activations != "float" and device.type == "cuda" else ()
    ours = has_triton(device, (8, 0)) and (activations != "float" or dtype != torch.float32)
    return (*library, *(("triton",) if ours else ()), "dense")


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")


def _resolve(x: Tensor, weight: Planes, activations: str, paths: tuple[str, ...]) -> str:
    """The candidate for ``x`` [M, K]."""
    (M, K), N = x.shape, len(weight.scale)
    names = list(paths)
    if "int_mm" in names and (M <= 16 or K % 8 or N % 8):  # what cuBLASLt does not take
        names.remove("int_mm")
    if names == ["dense"]:
        return "dense"
    tokens = token_bucket(M)
    bits = {"int8": f"A{activation_bits(x.device)}", "int4": "A4", "float": "A16"}[activations]
    form = "nested" if weight.low is not None else f"group {weight.group}"
    shape = (names[0], f"M{tokens}", f"K{K}", f"N{N}", x.dtype, bits, form)
    build = partial(_trial, tokens, N, x, weight, activations, names)
    return choose("int4_linear", shape, x.device, names, build, default="dense")


def _trial(M: int, N: int, like: Tensor, weight: Planes, activations: str, names: list[str]) -> Trial:
    """Gaussian data, half of it one-signed or nearly constant: the pattern that saturates."""
    x, dense = saturating_data(M, like.shape[1], N, like.device)
    packed: Int4Weight | NestedWeight = quantize_int4(dense, weight.group)
    if weight.low is not None:
        packed = quantize_nested(dense, weight.group or 64)
    x = x.to(like.dtype)
    planes = _planes(packed)
    check = torch.arange(0, M, max(1, M // 64), device=like.device)  # the reference in float64 is slow
    bits = activation_bits(like.device)
    reference = int4_linear_ref(x[check].float(), packed, activations=activations, bits=bits)
    dense = dense.to(like.dtype)
    eps = max(1e-5, 2 * torch.finfo(x.dtype).eps)
    return Trial(
        runs={path: partial(_RUN[path, activations], x, planes, None, None) for path in names},
        error=lambda y: worst_row_error(y[check], reference),
        # Same integers, so only the rounding of the result differs; dense does not quantise activations.
        tolerance={path: 0.1 if path == "dense" and activations == "int8" else eps for path in names},
        baseline=lambda: F.linear(x, dense),
    )


def _planes(packed: Int4Weight | NestedWeight) -> Planes:
    high, low = (packed.high, packed.low) if isinstance(packed, NestedWeight) else (packed, None)
    return Planes(high.nibbles, high.multiplier, packed.scale, low, high.group)

"""Linear layer with int8 weights and int8 activations whose range is known beforehand, one for the whole tensor:

    q = clip(round(x * before / s + z)),    y = ((q - z) q_w^T) * s * s_w + b

What few-step models get (MixDQ, arXiv:2405.17873): their activations hardly differ between prompts, so that a
range measured once will do, and no row has to be read before it can be rounded. The zero point z gives activations of
one sign, such as those behind a GELU, all the codes. Coarser than a scale for each token (`int8_linear`) wherever
tokens differ. Values beyond the range are clipped, infinite ones too; NaN becomes any number within it: where that
should be seen, take scales that are measured.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.kernels._candidates import Trial, choose, has_triton, token_bucket, worst_row_error
from diffaccel.kernels.int8_linear import _paths, _plain, pack, quantize_per_channel, saturating_data
from diffaccel.kernels.per_token import SCALE_FLOOR

# Elements rounded at a time on the CPU, so that they stay in cache.
_CHUNK = 1 << 18


def levels(bits: int) -> tuple[int, int]:
    """Least and largest code."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def grid(low: Tensor, high: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Scale s and zero point z, float32 and as many as ranges: codes reach from ``low`` to ``high``, and one is 0."""
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=SCALE_FLOOR)
    return scale, levels(bits)[0] - (low / scale).round()


def static_quantize_ref(x: Tensor, scale: Tensor, zero: Tensor, before: Tensor | None = None, bits: int = 8) -> Tensor:
    """The definition; arguments as for `static_quantize`."""
    factor = scale.float().reciprocal() if before is None else before.float() * scale.float().reciprocal()
    return (x.float() * factor + zero).clamp(*levels(bits)).round().to(torch.int8)


def static_quantize(x: Tensor, scale: Tensor, zero: Tensor, before: Tensor | None = None, bits: int = 8) -> Tensor:
    """``x`` [..., K] -> int8 [..., K], -128..127 (bits=7: -64..63); (q - zero) * scale ~ x * before.

    Args:
        scale, zero: float32 [1], as `grid` gives them.
        before: multiplier of each channel, [K].
    """
    return _static_quantize(x, scale, zero, before, bits)


@torch.library.custom_op("diffaccel::static_quantize", mutates_args=())
def _static_quantize(x: Tensor, scale: Tensor, zero: Tensor, before: Tensor | None, bits: int) -> Tensor:
    if x.device.type != "cpu":
        if bits == 8 and has_triton(x.device, (8, 0)):
            from diffaccel.kernels.static_quantize import launch

            return launch(x, scale, zero, before)
        return static_quantize_ref(x, scale, zero, before, bits).contiguous()
    q = torch.empty(x.shape, dtype=torch.int8)
    if not x.numel():
        return q
    rows, into = x.reshape(-1, x.shape[-1]), q.view(-1, x.shape[-1])
    inverse = scale.reciprocal()
    factor = None if before is None else before.float() * inverse
    step = max(1, _CHUNK // rows.shape[1])
    buffer = torch.empty(min(step, len(rows)), rows.shape[1])
    for i in range(0, len(rows), step):
        out, part = buffer[: len(rows) - i], rows[i : i + step]
        if factor is None:
            torch.add(zero, part, alpha=float(inverse), out=out)
        else:
            torch.addcmul(zero, part.float(), factor, out=out)
        into[i : i + step] = out.clamp_(*levels(bits)).round_()  # to uint8 it would be ten times as slow
    return q


@_static_quantize.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor, before: Tensor | None, bits: int) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.int8)


def int8_static_linear_ref(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_scale: Tensor,
    x_zero: Tensor,
    before: Tensor | None = None,
    bits: int = 8,
) -> Tensor:
    """The definition, its sums in float64, where they are exact; ``qweight`` plain, the others as for the operator."""
    q = static_quantize_ref(x, x_scale, x_zero, before, bits)
    y = ((q.double() - x_zero.double()) @ qweight.double().t()).float() * (scale * x_scale)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def int8_static_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_scale: Tensor,
    x_zero: Tensor,
    sums: Tensor | None = None,
    before: Tensor | None = None,
    path: str = "auto",
    bits: int = 8,
) -> Tensor:
    """``x`` [..., K] float32, bfloat16 or float16 -> [..., N] in its dtype. Forward only.

    Args:
        weight, scale: of `int8_linear.pack`. bias: [N].
        x_scale, x_zero: float32 [1], of ``x * before``; see `grid`.
        sums: of each row of the weight, float32 [N]; see `row_sums`. Not needed on the CPU, where oneDNN has its own.
        before: multiplier of each channel, [K].
        path: as for `int8_linear.pack`.

    Raises:
        ValueError: Shapes or devices that do not go together, or sums that are missing.
    """
    return _int8_static_linear(x, weight, scale, bias, x_scale, x_zero, sums, before, path, bits)


def row_sums(weight: Tensor) -> Tensor | None:
    """Of a plain ``weight`` [N, K], with which a zero point adds to the product: float32 [N]; None on the CPU."""
    return None if weight.device.type == "cpu" else weight.sum(1, dtype=torch.int32).float()


@torch.library.custom_op("diffaccel::int8_static_linear", mutates_args=())
def _int8_static_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_scale: Tensor,
    x_zero: Tensor,
    sums: Tensor | None,
    before: Tensor | None,
    path: str,
    bits: int,
) -> Tensor:
    N, K = weight.shape[::-1] if weight.is_mkldnn else weight.shape
    if x.shape[-1] != K or weight.device != x.device or (x_scale.shape, x_zero.shape) != ((1,), (1,)):
        got = f"{tuple(x.shape)} on {x.device}, {tuple(x_scale.shape)} and {tuple(x_zero.shape)}"
        raise ValueError(f"expected x [..., {K}] on {weight.device}, x_scale [1] and x_zero [1], got {got}")
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], N))
    rows = x.reshape(-1, K)
    path = _resolve(rows, weight, bits) if path == "auto" else path
    y = _RUN[path](rows, weight, scale, bias, x_scale, x_zero, sums, before, bits)
    return y.to(x.dtype).view(*x.shape[:-1], N)


@_int8_static_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


def _onednn(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_scale: Tensor,
    x_zero: Tensor,
    sums: Tensor | None,
    before: Tensor | None,
    bits: int,
) -> Tensor:
    """oneDNN's quantised matmul, scales and bias in its epilogue; uint8 as in `int8_linear`."""
    q = static_quantize(x, x_scale, x_zero, before, bits)
    q = (q.add_(64) if bits == 7 else q.bitwise_xor_(-128)).view(torch.uint8)
    zero_point = int(x_zero) + (64 if bits == 7 else 128)
    zeros = torch.zeros(len(scale), dtype=torch.int64)
    plain: tuple[object, ...] = (1.0, 0, torch.float32, "none", [], "")  # float32 out, nothing fused
    bias = None if bias is None else bias.float()
    return torch.ops.onednn.qlinear_pointwise(q, float(x_scale), zero_point, weight, scale, zeros, bias, *plain)


def _shifted(scale: Tensor, bias: Tensor | None, x_zero: Tensor, sums: Tensor | None) -> Tensor:
    """The bias less what the zero point adds; ``scale`` [N] of weight and activations."""
    if sums is None:
        raise ValueError("int8_static_linear needs the weight's row_sums here")
    return torch.addcmul(scale.new_zeros(()) if bias is None else bias.float(), sums * scale, x_zero, value=-1)


def _int_mm(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_scale: Tensor,
    x_zero: Tensor,
    sums: Tensor | None,
    before: Tensor | None,
    bits: int,
) -> Tensor:
    q, scale = static_quantize(x, x_scale, x_zero, before, bits), scale * x_scale
    sums = weight.sum(1, dtype=torch.int32).float() if sums is None else sums
    return torch.addcmul(_shifted(scale, bias, x_zero, sums), torch._int_mm(q, weight.t()).float(), scale)


def _triton(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_scale: Tensor,
    x_zero: Tensor,
    sums: Tensor | None,
    before: Tensor | None,
    bits: int,
) -> Tensor:
    from diffaccel.kernels.int8_gemm import int8_gemm

    q, scale = static_quantize(x, x_scale, x_zero, before), scale * x_scale
    ones = torch.ones(len(x), 1, device=x.device)
    return int8_gemm(q, weight, ones, scale, _shifted(scale, bias, x_zero, sums), x.dtype)


def _dense(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_scale: Tensor,
    x_zero: Tensor,
    sums: Tensor | None,
    before: Tensor | None,
    bits: int,
) -> Tensor:
    """Activations are not rounded."""
    dtype = torch.float32 if x.device.type == "cpu" else x.dtype
    weight = (_plain(weight).float() * scale[:, None]).to(dtype)
    x = x if before is None else x * before.to(x.dtype)
    return F.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype))


_RUN = {"onednn": _onednn, "int_mm": _int_mm, "triton": _triton, "dense": _dense}


def _resolve(x: Tensor, weight: Tensor, bits: int) -> str:
    """The candidate for ``x`` [M, K], among those that can read this form of the weight."""
    (M, K), N = x.shape, weight.shape[1] if weight.is_mkldnn else weight.shape[0]
    names = [path for path in _paths(x.device) if path == "dense" or (path == "onednn") == weight.is_mkldnn]
    if x.device.type == "cuda" and (M <= 16 or K % 8 or N % 8):  # what cuBLASLt does not take
        names.remove("int_mm")
    if names == ["dense"]:
        return "dense"
    tokens = token_bucket(M)
    shape = (names[0], f"M{tokens}", f"K{K}", f"N{N}", x.dtype, f"A{bits}")
    build = partial(_trial, tokens, K, N, x, names, bits)
    return choose("int8_static_linear", shape, x.device, names, build, default="dense")


def _trial(M: int, K: int, N: int, like: Tensor, names: list[str], bits: int) -> Trial:
    """Gaussian data, half of it one-signed or nearly constant: the pattern that saturates."""
    x, weight = saturating_data(M, K, N, like.device)
    x = x.to(like.dtype)
    qweight, scale = quantize_per_channel(weight)
    packed = {path: pack(qweight, scale, path).data for path in names}
    x_scale, x_zero = grid(x.amin()[None], x.amax()[None], bits)
    sums = row_sums(qweight)
    check = torch.arange(0, M, max(1, M // 64), device=like.device)  # the reference in float64 is slow
    reference = int8_static_linear_ref(x[check].float(), qweight, scale, None, x_scale, x_zero, None, bits)
    weight = weight.to(like.dtype)

    def run(path: str) -> Tensor:
        return _RUN[path](x, packed[path], scale, None, x_scale, x_zero, sums, None, bits).to(x.dtype)

    return Trial(
        runs={path: partial(run, path) for path in names},
        error=lambda y: worst_row_error(y[check], reference),
        # Same integers, so only the rounding of the result differs; dense does not quantise activations.
        tolerance={path: 0.2 if path == "dense" else max(2e-5, torch.finfo(x.dtype).eps) for path in names},
        baseline=lambda: F.linear(x, weight),
    )

"""Linear layer with fp8 weights and fp8 activations (e4m3fn): y = (q_x q_w^T) * s_x * s_w + b.

Weights are scaled per output channel, activations per token when they arrive, so that the largest magnitude becomes 448
(arXiv:2209.05433, sec. 3). Four significant bits at every magnitude: coarser than int8 on even rows, finer on rows with
outliers.

On CUDA from sm_89 on this is `torch._scaled_mm`, our Triton kernels (`token_quantize`, `fp8_gemm`) or a dense product
with dequantised weights; elsewhere the latter.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.kernels._candidates import Trial, choose, token_bucket, worst_row_error
from diffaccel.kernels.int8_linear import has_triton, saturating_data

FP8 = torch.float8_e4m3fn
_QMAX = 448.0
_SCALE_FLOOR = 2.0**-100  # as in int8_linear.py


def quantize_per_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``weight`` [N, K] -> e4m3fn [N, K] and float32 scale [N]; weight ~ q * scale[:, None]."""
    q, scale = quantize_per_token(weight.detach())
    return q, scale[:, 0]


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` [..., K] -> e4m3fn [..., K] and float32 scale [..., 1]; x ~ q * scale."""
    x = x.float()
    # By a tensor: on CUDA a number's inverse is multiplied with instead, which rounds twice and breaks ties otherwise.
    scale = x.abs().amax(-1, keepdim=True).div_(x.new_full((), _QMAX)).clamp_(min=_SCALE_FLOOR)
    return (x * scale.reciprocal()).to(FP8), scale


def fp8_linear_ref(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition. ``x`` [..., K], ``qweight`` [N, K], ``scale`` [N], ``bias`` [N] -> [..., N] in ``x.dtype``."""
    q, row_scale = quantize_per_token(x)
    y = (q.double() @ qweight.double().t()) * scale * row_scale
    return (y if bias is None else y + bias.double()).to(x.dtype)


def fp8_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None, path: str = "auto") -> Tensor:
    """``x`` [..., K] float32, bfloat16 or float16 -> [..., N] in ``x.dtype``. Forward only.

    Args:
        qweight: e4m3fn [N, K], with ``scale`` float32 [N] from `quantize_per_channel`; 1 byte per weight.
        bias: [N].
        path: "auto" measures the candidates at the first call of a shape class. "scaled_mm", "triton" or "dense"
            (weights dequantised at every call, activations not quantised) fixes one.

    Raises:
        ValueError: Wrong dtype, shape or device, or a candidate that does not exist here.
    """
    return _fp8_linear(x, qweight, scale, bias, path)


@torch.library.custom_op("diffaccel::fp8_linear", mutates_args=())
def _fp8_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, path: str) -> Tensor:
    N, K = qweight.shape
    if qweight.dtype != FP8 or scale.shape != (N,) or scale.dtype != torch.float32:
        got = f"{qweight.dtype} {tuple(qweight.shape)} and {scale.dtype} {tuple(scale.shape)}"
        raise ValueError(
            f"expected qweight {FP8} [N, K] and scale float32 [N], got {got}; quantize_per_channel makes both"
        )
    if x.shape[-1] != K or qweight.device != x.device or (bias is not None and bias.shape != (N,)):
        got = f"{tuple(x.shape)} on {x.device} and {None if bias is None else tuple(bias.shape)}"
        raise ValueError(f"expected x [..., {K}] on {qweight.device} and bias [{N}], got {got}")
    if path not in ("auto", *_paths(x.device)):
        raise ValueError(f"fp8_linear has no candidate {path!r} here, expected one of {('auto', *_paths(x.device))}")
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], N))
    rows = x.reshape(-1, K)  # [M, K]
    y = _RUN[_resolve(rows, qweight) if path == "auto" else path](rows, qweight, scale, bias)
    return y.to(x.dtype).view(*x.shape[:-1], N)


@_fp8_linear.register_fake
def _(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, path: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


def _scaled_mm(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """cuBLASLt or CUTLASS with a scale for each row and channel, which return bfloat16 only.

    Without fast accumulation: on Hopper that loses more than a percent over thousands of products of one sign.
    """
    q, row_scale = quantize_per_token(x)
    bias = None if bias is None else bias.bfloat16()
    return torch._scaled_mm(q, qweight.t(), row_scale, scale[None], bias, out_dtype=torch.bfloat16)


def _triton(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    from diffaccel.kernels.fp8_gemm import fp8_gemm
    from diffaccel.kernels.token_quantize import token_quantize

    q, row_scale = token_quantize(x, FP8)
    return fp8_gemm(q, qweight, row_scale, scale, bias, x.dtype)


def _dense(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    # float32 on the CPU, where half-precision matmul is slower.
    dtype = torch.float32 if x.device.type == "cpu" else x.dtype
    weight = (qweight.float() * scale[:, None]).to(dtype)
    return F.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype))


_RUN = {"scaled_mm": _scaled_mm, "triton": _triton, "dense": _dense}


def _paths(device: torch.device) -> tuple[str, ...]:
    """Candidates that exist on ``device``."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 9):
        return ("dense",)
    return ("scaled_mm", "triton", "dense") if has_triton(device, (8, 9)) else ("scaled_mm", "dense")


def _resolve(x: Tensor, qweight: Tensor) -> str:
    """The candidate for ``x`` [M, K]."""
    (M, K), N = x.shape, qweight.shape[0]
    names = list(_paths(x.device))
    if "scaled_mm" in names and (K % 16 or N % 16):  # what cuBLASLt does not take
        names.remove("scaled_mm")
    if names == ["dense"]:
        return "dense"
    tokens = token_bucket(M)
    shape = (names[0], f"M{tokens}", f"K{K}", f"N{N}", x.dtype)
    return choose("fp8_linear", shape, x.device, names, lambda: _trial(tokens, K, N, x, names), default="dense")


def _trial(M: int, K: int, N: int, like: Tensor, names: list[str]) -> Trial:
    """Gaussian data, half of it one-signed or nearly constant: where short accumulators lose most."""
    x, weight = saturating_data(M, K, N, like.device)
    x = x.to(like.dtype)
    qweight, scale = quantize_per_channel(weight)
    check = torch.arange(0, M, max(1, M // 64), device=like.device)  # the reference in float64 is slow
    reference = fp8_linear_ref(x[check].float(), qweight, scale)
    weight = weight.to(like.dtype)

    def run(path: str) -> Tensor:
        return _RUN[path](x, qweight, scale, None).to(x.dtype)

    return Trial(
        runs={path: partial(run, path) for path in names},
        error=lambda y: worst_row_error(y[check], reference),
        # The same products: the sums may be short of bits, but not so short that it shows beside the 3 % of fp8 itself.
        tolerance={path: 0.1 if path == "dense" else 0.01 for path in names},
        baseline=lambda: F.linear(x, weight),
    )

"""Linear layer with int8 weights and int8 activations (W8A8): y = (q_x q_w^T) * s_x * s_w + b.

Weights are quantised per output channel, activations per token when they arrive (vector-wise quantisation,
arXiv:2208.07339, sec. 3.1); both symmetric, s = max|v| / 127.

Sums over products run in integers. On x86 without VNNI the library kernels add two uint8 * int8 products in int16
first, which saturates without a word (255 * 127 * 2 > 32767): one-signed weights meeting one-signed activations come
out wrong by up to 100 %. There activations get 7 bits, stored around 64 (127 * 127 * 2 < 32767). `activation_bits`
says which holds; it is measured, not looked up.

On CUDA this is `torch._int_mm`, our Triton kernels (`token_quantize`, `int8_gemm`) or a dense product with dequantised
weights; elsewhere the latter.
"""

from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from diffaccel.kernels._candidates import (
    Trial,
    choose,
    has_triton,
    may_measure,
    override,
    token_bucket,
    worst_row_error,
)
from diffaccel.kernels.int8_rows import PLAIN, Conditioner, conditioned, quantize_rows
from diffaccel.kernels.per_token import SCALE_FLOOR, quantize_per_token

_PATHS = ("onednn", "int_mm", "dense")


def quantize_per_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``weight`` [N, K] -> int8 [N, K] in -127..127 and float32 scale [N]; weight ~ q * scale[:, None]."""
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=1).div_(127).clamp_(min=SCALE_FLOOR)
    return (weight / scale[:, None]).round_().to(torch.int8), scale


def int8_linear_ref(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None, bits: int = 8, how: Conditioner = PLAIN
) -> Tensor:
    """The definition. ``x`` [..., K], ``qweight`` int8 [N, K], ``scale`` [N], ``bias`` [N] -> [..., N] in ``x.dtype``.

    The integer product runs in float64, where it is exact (K * 127 * 127 < 2**53): integer matmul is not vectorised.
    """
    q, row_scale = quantize_per_token(conditioned(x, how), bits)
    y = (q.double() @ qweight.double().t()).float() * scale * row_scale
    return (y if bias is None else y + bias.float()).to(x.dtype)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """An int8 weight [N, K] as the product wants it; the only copy a layer needs (1 byte per weight, 4 per channel).

    data: int8, plain [N, K] or, for oneDNN, a blocked [K, N] tensor without storage (``data.is_mkldnn``): it can be
    cloned and passed to operators, compiled or not, but not saved or viewed; `unpack` gives the plain form back.
    scale: float32 [N]. path: "auto" (measured at each shape class) or one candidate. bits: of the activations, 8 or 7.
    """

    data: Tensor
    scale: Tensor
    path: str = "auto"
    bits: int = 8

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) = (out_features, in_features)."""
        rows, columns = self.data.shape
        return (columns, rows) if self.data.is_mkldnn else (rows, columns)

    @property
    def nbytes(self) -> int:
        """Bytes held, scales included."""
        return self.data.nbytes + self.scale.nbytes

    def unpack(self) -> Tensor:
        """The plain int8 weight [N, K], bit for bit what went into `pack`."""
        return _plain(self.data)

    def to(self, device: torch.device | str) -> "PackedWeight":
        """Packed anew for ``device``, with the same path if it exists there."""
        device = torch.device(device)
        if device == self.data.device:
            return self
        path = self.path if self.path in ("auto", *_paths(device)) else "auto"
        return pack(self.unpack().to(device), self.scale.to(device), path)

    def __deepcopy__(self, memo: dict) -> "PackedWeight":
        return PackedWeight(self.data.clone(), self.scale.clone(), self.path, self.bits)

    def __reduce__(self) -> tuple:
        # Packed anew where it is loaded: that machine may lack this one's instructions.
        return pack, (self.unpack(), self.scale, "auto")


def pack(qweight: Tensor, scale: Tensor, candidate: str = "auto") -> PackedWeight:
    """Bring ``qweight`` int8 [N, K] with ``scale`` [N] into the form that is fastest on its device.

    Args:
        candidate: "auto": blocked for oneDNN on the CPU, plain elsewhere, and the candidates that can read it are
            measured at each shape class. "onednn", "int_mm", "triton" or "dense" (weights dequantised at every call,
            activations not quantised) fixes one.

    Raises:
        ValueError: Wrong dtype or shape, or a candidate that does not exist here or saturates on this CPU.
    """
    if qweight.dtype != torch.int8 or qweight.ndim != 2 or not qweight.numel() or scale.shape != qweight.shape[:1]:
        got = f"{qweight.dtype} {tuple(qweight.shape)} and {tuple(scale.shape)}"
        raise ValueError(f"expected qweight int8 [N, K] and scale [N], got {got}; quantize_per_channel makes both")
    scale = scale.detach().float().contiguous()
    paths = _paths(qweight.device) if _is_real(qweight) else ("dense",)
    if candidate not in ("auto", *paths):
        raise ValueError(
            f"int8_linear has no candidate {candidate!r} on this {qweight.device.type}, expected one of "
            f"{('auto', *paths)}; a candidate that saturates here is left out"
        )
    wanted = override("int8_linear") if candidate == "auto" else candidate
    blocked = "onednn" in paths and wanted not in ("int_mm", "dense")
    data = torch.ops.onednn.qlinear_prepack(qweight.contiguous(), None) if blocked else qweight.detach().contiguous()
    bits = activation_bits(qweight.device) if _is_real(qweight) else 8
    return PackedWeight(data, scale, candidate, bits)


def activation_bits(device: torch.device | str = "cpu") -> int:
    """8, or 7 on a CPU whose int8 kernels are exact only with 7-bit activations (x86 without VNNI)."""
    return 7 if torch.device(device).type == "cpu" and not _exact("onednn", 8) and _exact("onednn", 7) else 8


def int8_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None, how: Conditioner = PLAIN) -> Tensor:
    """``x`` [..., K] float32, bfloat16 or float16, ``bias`` [N] -> [..., N] in ``x.dtype``. Forward only.

    The first call at a shape class measures the candidates (tens of milliseconds up to a second for the largest).

    Args:
        how: what is done to ``x`` on the way to int8, in the same pass.
    """
    return _int8_linear(x, packed.data, packed.scale, bias, packed.path, packed.bits, *how)


@torch.library.custom_op("diffaccel::int8_linear", mutates_args=())
def _int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    path: str,
    bits: int,
    before: Tensor | None = None,
    after: Tensor | None = None,
    block: int = 1,
) -> Tensor:
    N, K = weight.shape[::-1] if weight.is_mkldnn else weight.shape
    if x.shape[-1] != K or weight.device != x.device or (bias is not None and bias.shape != (N,)):
        got = f"{tuple(x.shape)} on {x.device} and {None if bias is None else tuple(bias.shape)}"
        raise ValueError(f"expected x [..., {K}] on {weight.device} and bias [{N}], got {got}")
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], N))
    rows = x.reshape(-1, K)  # [M, K]
    path = _resolve(rows, weight, bits) if path == "auto" else path
    y = _RUN[path](rows, weight, scale, bias, bits, Conditioner(before, after, block))
    return y.to(x.dtype).view(*x.shape[:-1], N)


@_int8_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


def _onednn(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, bits: int, how: Conditioner = PLAIN
) -> Tensor:
    """oneDNN's quantised matmul, told that the activation scale is 1; the scale of each row is applied afterwards."""
    q, row_scale = quantize_rows(x, how, bits)
    # uint8 around 64 or 128 (the sign bit flipped). For int8 and the layout of `qlinear_prepack` oneDNN only has a
    # scalar kernel on AVX512-VNNI: 1.3 s at [591, 168] x [168, 168], where this takes 0.14 ms.
    zero_point = 64 if bits == 7 else 128
    q = (q.add_(64) if bits == 7 else q.bitwise_xor_(-128)).view(torch.uint8)
    zero = torch.zeros(scale.shape[0], dtype=torch.int64)
    plain: tuple[object, ...] = (None, 1.0, 0, torch.float32, "none", [], "")  # no bias, float32 out, nothing fused
    y = torch.ops.onednn.qlinear_pointwise(q, 1.0, zero_point, weight, scale, zero, *plain)  # [M, N]
    return y.mul_(row_scale) if bias is None else torch.addcmul(bias.float(), y, row_scale, out=y)


def _int_mm(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, bits: int, how: Conditioner = PLAIN
) -> Tensor:
    q, row_scale = quantize_rows(x, how, bits)
    y = torch._int_mm(q, weight.t()).float().mul_(scale)  # [M, N]
    return y.mul_(row_scale) if bias is None else torch.addcmul(bias.float(), y, row_scale, out=y)


def _triton(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, bits: int, how: Conditioner = PLAIN
) -> Tensor:
    from diffaccel.kernels.int8_gemm import int8_gemm

    q, row_scale = quantize_rows(x, how)
    return int8_gemm(q, weight, row_scale, scale, bias, x.dtype)


def _dense(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, bits: int, how: Conditioner = PLAIN
) -> Tensor:
    # float32 on the CPU, where half-precision matmul is slower.
    dtype = torch.float32 if x.device.type == "cpu" else x.dtype
    weight = (_plain(weight).float() * scale[:, None]).to(dtype)
    return F.linear(conditioned(x, how).to(dtype), weight, None if bias is None else bias.to(dtype))


_RUN = {"onednn": _onednn, "int_mm": _int_mm, "triton": _triton, "dense": _dense}


def _plain(weight: Tensor) -> Tensor:
    return weight.to_dense().t().contiguous() if weight.is_mkldnn else weight


def _is_real(tensor: Tensor) -> bool:
    return may_measure(tensor.device) and not isinstance(tensor, FakeTensor)


def _paths(device: torch.device) -> tuple[str, ...]:
    """Candidates that exist on ``device`` and do not saturate there."""
    if device.type == "cpu":
        bits = activation_bits()
        return tuple(path for path in _PATHS if path == "dense" or _exact(path, bits))
    if device.type != "cuda":
        return ("dense",)
    return ("int_mm", "triton", "dense") if has_triton(device, (8, 0)) else ("int_mm", "dense")


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
    return choose("int8_linear", shape, x.device, names, lambda: _trial(tokens, K, N, x, names, bits), default="dense")


def _trial(M: int, K: int, N: int, like: Tensor, names: list[str], bits: int) -> Trial:
    """Gaussian data, half of it one-signed or nearly constant: the pattern that saturates."""
    x, weight = saturating_data(M, K, N, like.device)
    x = x.to(like.dtype)
    qweight, scale = quantize_per_channel(weight)
    packed = {path: pack(qweight, scale, path).data for path in names}
    check = torch.arange(0, M, max(1, M // 64), device=like.device)  # the reference in float64 is slow
    reference = int8_linear_ref(x[check].float(), qweight, scale, None, bits)
    weight = weight.to(like.dtype)

    def run(path: str) -> Tensor:
        return _RUN[path](x, packed[path], scale, None, bits).to(x.dtype)

    return Trial(
        runs={path: partial(run, path) for path in names},
        error=lambda y: worst_row_error(y[check], reference),
        # Same integers, so only the rounding of the result differs; dense does not quantise activations.
        tolerance={path: 0.1 if path == "dense" else max(1e-5, torch.finfo(x.dtype).eps) for path in names},
        baseline=lambda: F.linear(x, weight),
    )


def saturating_data(M: int, K: int, N: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``x`` [M, K] and ``weight`` [N, K]: by row gaussian, positive, negative, nearly constant."""
    generator = torch.Generator(device).manual_seed(M * 31 + K * 7 + N)  # its own: the user's noise stays as it is
    x, weight = (torch.randn(rows, K, generator=generator, device=device) for rows in (M, N))
    for values in (x, weight):
        values[1::4] = values[1::4].abs()
        values[2::4] = -values[2::4].abs()
        values[3::4] = 1 + values[3::4] * 0.01
    return x, weight


@lru_cache(maxsize=8)
def _exact(path: str, bits: int) -> bool:
    """Whether a CPU path sums ``bits``-bit activations exactly, tried on full-scale rows of every sign."""
    with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
        for M, K, N in ((1, 64, 16), (9, 67, 33), (64, 1152, 64)):
            x, weight = saturating_data(M + 4, K, N + 4, torch.device("cpu"))
            x, qweight = x[-M:].contiguous(), quantize_per_channel(weight)[0]
            ones = torch.ones(N + 4)
            try:
                data = torch.ops.onednn.qlinear_prepack(qweight, None) if path == "onednn" else qweight
                y = _RUN[path](x, data, ones, None, bits)
            except (RuntimeError, AttributeError, NotImplementedError):
                return False
            if worst_row_error(y, int8_linear_ref(x, qweight, ones, None, bits)) > 1e-5:
                return False
    return True

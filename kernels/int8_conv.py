"""2D convolution with int8 weights and int8 activations (W8A8): y = conv(q_x, q_w) * s_x * s_w + b.

Weights are quantised per output channel. Activations are quantised per sample when they arrive, or with a static scale:
one per token, as linears have it, is impossible, because a sum runs over the neighbourhood of a pixel, and the scale
must leave it. Both symmetric, s = max|v| / 127; 7 bits of activations where `int8_linear.activation_bits` says so.

On the CPU this is oneDNN's quantised convolution, whose weight is kept in its blocked layout: bringing it there takes
as long as one convolution or several. On CUDA the neighbourhoods are written out as rows (im2col, in int8: k^2 bytes
for each pixel and channel) for our `int8_gemm` or `torch._int_mm`. The other candidate is a convolution with
dequantised weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

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
from diffaccel.kernels.int8_linear import activation_bits

_SCALE_FLOOR = 2.0**-100  # as in int8_linear.py


@dataclass(frozen=True)
class Geometry:
    """How a 2D convolution moves, with zeros beyond the edges; pairs are (height, width)."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def flat(self) -> list[int]:
        """As an operator takes it."""
        return [*self.stride, *self.padding, *self.dilation, self.groups]

    def output(self, size: tuple[int, int], kernel: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the result for an input of ``size``."""
        sides = zip(size, kernel, self.stride, self.padding, self.dilation, strict=True)
        height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides)
        return height, width


def _geometry(flat: list[int]) -> Geometry:
    return Geometry((flat[0], flat[1]), (flat[2], flat[3]), (flat[4], flat[5]), flat[6])


def quantize_filters(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``weight`` [N, C / groups, kh, kw] -> int8 alike, in -127..127, and float32 scale [N]."""
    weight = weight.detach().float()
    scale = weight.abs().amax((1, 2, 3)).div_(127).clamp_(min=_SCALE_FLOOR)
    return (weight / scale[:, None, None, None]).round_().to(torch.int8), scale


def quantize_samples(x: Tensor, bits: int = 8, static: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``x`` [B, C, H, W] -> float32 integers in -127..127 (bits=7: -63..63) and float32 scale [B, 1, 1, 1].

    Args:
        static: the scale of 127 (whatever ``bits``), of one element, instead of that of each sample; larger values are
            clipped.
    """
    most = 2 ** (bits - 1) - 1
    if static is not None:
        scale = (static.float() * (127 / most)).view(1, 1, 1, 1).expand(len(x), 1, 1, 1)
        return (x.float() / scale).round_().clamp_(-most, most), scale
    scale = torch.maximum(x.amax((1, 2, 3), keepdim=True), x.amin((1, 2, 3), keepdim=True).neg_()).float()
    scale = scale.div_(scale.new_full((), most)).clamp_(min=_SCALE_FLOOR)
    return torch.mul(x.float(), scale.reciprocal()).round_(), scale


def int8_conv_ref(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    bits: int = 8,
    static: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The definition; ``dtype`` of the sums, exact in float64. ``x`` [B, C, H, W] -> [B, N, H', W'] in its dtype."""
    q, row_scale = quantize_samples(x, bits, static)
    y = _conv(q.to(dtype), qweight.to(dtype), None, geometry)
    y = y * scale[:, None, None] * row_scale
    return (y if bias is None else y + bias.to(dtype)[:, None, None]).to(x.dtype)


@dataclass(frozen=True, eq=False)
class PackedFilters:
    """An int8 weight [N, C / groups, kh, kw] as the convolution wants it; the only copy a layer needs.

    data: int8, plain (channels last) or, for oneDNN, blocked and without storage (``data.is_mkldnn``): it can be cloned
    and passed to operators, compiled or not, but not saved or viewed; `unpack` gives the plain form back.
    scale: float32 [N]. path: "auto" (measured at each shape class) or one candidate. bits: of the activations, 8 or 7.
    """

    data: Tensor
    scale: Tensor
    geometry: Geometry
    path: str = "auto"
    bits: int = 8

    @property
    def nbytes(self) -> int:
        """Bytes held, scales included."""
        return self.data.numel() + self.scale.nbytes

    def unpack(self) -> Tensor:
        """The plain int8 weight, bit for bit what went into `pack_filters`."""
        return _plain(self.data)

    def to(self, device: torch.device | str) -> PackedFilters:
        """Packed anew for ``device``, with the same path if it exists there."""
        device = torch.device(device)
        if device == self.data.device:
            return self
        path = self.path if self.path in ("auto", *_paths(device, self.geometry.groups)) else "auto"
        return pack_filters(self.unpack().to(device), self.scale.to(device), self.geometry, path)

    def __deepcopy__(self, memo: dict) -> PackedFilters:
        return replace(self, data=self.data.clone(), scale=self.scale.clone())

    def __reduce__(self) -> tuple:
        # Packed anew where it is loaded: that machine may lack this one's instructions.
        return pack_filters, (self.unpack(), self.scale, self.geometry)


def pack_filters(qweight: Tensor, scale: Tensor, geometry: Geometry, candidate: str = "auto") -> PackedFilters:
    """Bring ``qweight`` int8 [N, C / groups, kh, kw] with ``scale`` [N] into the form that is fastest on its device.

    Args:
        candidate: "auto": blocked for oneDNN on the CPU, plain elsewhere, and the candidates that can read it are
            measured at each shape class. "onednn", "int_mm", "triton" or "dense" (weights dequantised at every call,
            activations not quantised) fixes one.

    Raises:
        ValueError: Wrong dtype or shape, or a candidate that does not exist here.
    """
    if qweight.dtype != torch.int8 or qweight.ndim != 4 or not qweight.numel() or scale.shape != qweight.shape[:1]:
        got = f"{qweight.dtype} {tuple(qweight.shape)} and {tuple(scale.shape)}"
        raise ValueError(f"expected qweight int8 [N, C, kh, kw] and scale [N], got {got}; quantize_filters makes both")
    if geometry.groups < 1 or qweight.shape[0] % geometry.groups:
        raise ValueError(f"expected groups that divide the {qweight.shape[0]} channels, got {geometry.groups}")
    scale = scale.detach().float().contiguous()
    real = may_measure(qweight.device) and not isinstance(qweight, FakeTensor)
    paths = _paths(qweight.device, geometry.groups) if real else ("dense",)
    if candidate not in ("auto", *paths):
        raise ValueError(f"int8_conv has no candidate {candidate!r} here, expected one of {('auto', *paths)}")
    wanted = override("int8_conv") if candidate == "auto" else candidate
    data = qweight.detach().contiguous(memory_format=torch.channels_last)
    bits = activation_bits(qweight.device) if real else 8
    if "onednn" in paths and wanted != "dense":
        moves = (list(geometry.stride), list(geometry.padding), list(geometry.dilation), geometry.groups)
        data = torch.ops.onednn.qconv_prepack(qweight.contiguous(), scale, 1.0, _zero_point(bits), *moves, None)
    return PackedFilters(data, scale, geometry, candidate, bits)


def int8_conv(x: Tensor, packed: PackedFilters, bias: Tensor | None = None, static: Tensor | None = None) -> Tensor:
    """``x`` [B, C, H, W] float32, bfloat16 or float16, ``bias`` [N] -> [B, N, H', W'] in its dtype and memory format.

    A sample that holds NaN or infinity comes out without a finite value, and leaves the others as they are.

    Args:
        static: as for `quantize_samples`. None: measured for each sample.

    Raises:
        ValueError: Shapes or devices that do not go together.
    """
    geometry, path, bits = packed.geometry.flat(), packed.path, packed.bits
    return _int8_conv(x, packed.data, packed.scale, bias, static, geometry, path, bits)


@torch.library.custom_op("diffaccel::int8_conv", mutates_args=())
def _int8_conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    static: Tensor | None,
    geometry: list[int],
    path: str,
    bits: int,
) -> Tensor:
    moves = _geometry(geometry)
    N, C = weight.shape[0], weight.shape[1] * moves.groups
    if x.ndim != 4 or x.shape[1] != C or weight.device != x.device or (bias is not None and bias.shape != (N,)):
        got = f"{tuple(x.shape)} on {x.device} and {None if bias is None else tuple(bias.shape)}"
        raise ValueError(f"expected x [B, {C}, H, W] on {weight.device} and bias [{N}], got {got}")
    if static is not None and static.numel() != 1:
        raise ValueError(f"expected one static scale, got {tuple(static.shape)}")
    y = _result(x, weight, geometry)
    if y.numel() == 0:
        return y
    if path == "auto":
        path = _resolve(x, weight, moves, bits, static)
    return y.copy_(_RUN[path](x, weight, scale, bias, static, moves, bits))


@_int8_conv.register_fake
def _result(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
    """Where the result goes: channels last where ``x`` is, contiguous otherwise."""
    flat = next(item for item in rest if isinstance(item, list))
    size = _geometry(flat).output((x.shape[2], x.shape[3]), (weight.shape[2], weight.shape[3]))
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    form = torch.channels_last if last else torch.contiguous_format
    return torch.empty((len(x), weight.shape[0], *size), dtype=x.dtype, device=x.device, memory_format=form)


def _onednn(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, static: Tensor | None, moves: Geometry, bits: int
) -> Tensor:
    """oneDNN's quantised convolution, told that the activation scale is 1; that of the sample is applied afterwards."""
    q, row_scale = quantize_samples(x, bits, static)
    zero_point = _zero_point(bits)
    q = q.add_(zero_point).to(
        torch.uint8
    )  # where x is not channels last oneDNN reorders it, six times as fast as we do
    zero = torch.zeros(len(scale), dtype=torch.int64)
    path = (list(moves.stride), list(moves.padding), list(moves.dilation), moves.groups)
    plain: tuple[object, ...] = (1.0, 0, torch.float32, "none", [], "")  # float32 out, nothing fused
    y = torch.ops.onednn.qconv2d_pointwise(q, 1.0, zero_point, weight, scale, zero, None, *path, *plain)
    return y.mul_(row_scale) if bias is None else torch.addcmul(bias.float()[:, None, None], y, row_scale, out=y)


def _rows(
    x: Tensor, weight: Tensor, static: Tensor | None, moves: Geometry
) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """im2col: q [B, H' W', K], weight [N, K], row scale [B, H' W', 1], (H', W'), with K = kh kw C."""
    q, row_scale = quantize_samples(x, 8, static)
    (kh, kw), (ph, pw) = weight.shape[2:], moves.padding
    q = F.pad(q.to(torch.int8).permute(0, 2, 3, 1), (0, 0, pw, pw, ph, ph)).contiguous()  # [B, H, W, C]
    height, width = moves.output((x.shape[2], x.shape[3]), (kh, kw))
    B, _, _, C = q.shape
    b, h, w, c = q.stride()
    steps = (b, h * moves.stride[0], w * moves.stride[1], h * moves.dilation[0], w * moves.dilation[1], c)
    windows = q.as_strided((B, height, width, kh, kw, C), steps).reshape(B, height * width, kh * kw * C)
    filters = weight.permute(0, 2, 3, 1).reshape(len(weight), -1)
    return windows, filters, row_scale.view(B, 1, 1).expand(B, height * width, 1), (height, width)


def _int_mm(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, static: Tensor | None, moves: Geometry, bits: int
) -> Tensor:
    rows, filters, row_scale, size = _rows(x, weight, static, moves)
    y = torch._int_mm(rows.flatten(0, 1), filters.t()).float().mul_(scale).view(*rows.shape[:2], -1).mul_(row_scale)
    return (y if bias is None else y + bias.float()).unflatten(1, size).permute(0, 3, 1, 2)


def _triton(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, static: Tensor | None, moves: Geometry, bits: int
) -> Tensor:
    from diffaccel.kernels.int8_gemm import int8_gemm

    rows, filters, row_scale, size = _rows(x, weight, static, moves)
    y = int8_gemm(rows, filters, row_scale.contiguous(), scale, bias, x.dtype)
    return y.unflatten(1, size).permute(0, 3, 1, 2)


def _dense(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, static: Tensor | None, moves: Geometry, bits: int
) -> Tensor:
    # float32 on the CPU, where half-precision convolution is slower.
    dtype = torch.float32 if x.device.type == "cpu" else x.dtype
    weight = (_plain(weight).float() * scale[:, None, None, None]).to(dtype)
    return _conv(x.to(dtype), weight, None if bias is None else bias.to(dtype), moves)


Run = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Geometry, int], Tensor]
_RUN: dict[str, Run] = {"onednn": _onednn, "int_mm": _int_mm, "triton": _triton, "dense": _dense}


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, moves: Geometry) -> Tensor:
    return F.conv2d(x, weight, bias, moves.stride, moves.padding, moves.dilation, moves.groups)


def _zero_point(bits: int) -> int:
    return 64 if bits == 7 else 128


def _plain(weight: Tensor) -> Tensor:
    return weight.to_dense() if weight.is_mkldnn else weight


def _paths(device: torch.device, groups: int) -> tuple[str, ...]:
    """Candidates that exist on ``device``. Those with rows are for one group."""
    if device.type == "cpu":
        exists = torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qconv2d_pointwise")
        return ("onednn", "dense") if exists else ("dense",)
    if device.type != "cuda" or groups > 1:
        return ("dense",)
    return ("int_mm", "triton", "dense") if has_triton(device, (8, 0)) else ("int_mm", "dense")


def _resolve(x: Tensor, weight: Tensor, moves: Geometry, bits: int, static: Tensor | None) -> str:
    """The candidate for ``x``, among those that can read this form of the weight."""
    (N, _, kh, kw), (B, C, H, W) = weight.shape, x.shape
    names = [
        path for path in _paths(x.device, moves.groups) if path == "dense" or (path == "onednn") == weight.is_mkldnn
    ]
    height, width = moves.output((H, W), (kh, kw))
    if "int_mm" in names and (B * height * width <= 16 or kh * kw * C % 8 or N % 8):  # what cuBLASLt does not take
        names.remove("int_mm")
    if names == ["dense"]:
        return "dense"
    pixels = token_bucket(B * height * width)
    kind = f"C{C} N{N} k{kh}x{kw} s{moves.stride} d{moves.dilation} g{moves.groups}".replace(" ", "_")
    shape = (names[0], f"P{pixels}", kind, x.dtype, f"A{bits}", "dynamic" if static is None else "static")
    build = partial(_trial, x, weight, moves, bits, static, names)
    return choose("int8_conv", shape, x.device, names, build, default="dense")


def _trial(x: Tensor, weight: Tensor, moves: Geometry, bits: int, static: Tensor | None, names: list[str]) -> Trial:
    """Gaussian data, half of it one-signed: the pattern that saturates."""
    generator = torch.Generator(x.device).manual_seed(x.numel())  # its own: the user's noise stays as it is
    data, filters = (torch.randn(t.shape, generator=generator, device=x.device) for t in (x, weight))
    data[:, :, : x.shape[2] // 2].abs_()
    filters[1::4], filters[2::4] = filters[1::4].abs(), -filters[2::4].abs()
    data = data.to(x.dtype)
    step = None if static is None else data.float().abs().amax() / 127
    qweight, scale = quantize_filters(filters)
    packed = {path: pack_filters(qweight, scale, moves, path).data for path in names}
    # Integers whose products are exact, and sums nearly so: float64 would take seconds.
    reference = _by_pixel(int8_conv_ref(data.float(), qweight, scale, None, moves, bits, step, torch.float32))
    filters = filters.to(x.dtype)

    def run(path: str) -> Tensor:
        return _RUN[path](data, packed[path], scale, None, step, moves, bits).to(x.dtype)

    return Trial(
        runs={path: partial(run, path) for path in names},
        error=lambda y: worst_row_error(_by_pixel(y), reference),
        # Same integers, so only the rounding of the result differs; dense does not quantise activations.
        tolerance={path: 0.2 if path == "dense" else max(1e-5, torch.finfo(x.dtype).eps) for path in names},
        baseline=lambda: _conv(data, filters, None, moves),
    )


def _by_pixel(y: Tensor) -> Tensor:
    """[B, N, H, W] -> [B, H W, N]."""
    return y.permute(0, 2, 3, 1).flatten(1, 2)

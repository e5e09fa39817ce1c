"""Cases of the self-test for packed weights, rotations and convolutions; `selftest_cases` has the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.kernels import int4_linear, int8_conv
from diffaccel.kernels.fit_int4 import quantize_int4, quantize_nested
from diffaccel.kernels.hadamard import block_for, hadamard_quantize, hadamard_ref
from diffaccel.kernels.int8_linear import activation_bits
from diffaccel.kernels.int8_static import grid, static_quantize, static_quantize_ref
from diffaccel.kernels.packed_weight import Int4Weight, NestedWeight
from diffaccel.kernels.roofline import Linear
from diffaccel.kernels.selftest import Case, Subject, Surroundings
from diffaccel.kernels.selftest_cases import DTYPES, has_kernels, linears, name_of, refused, sampled_rows, signed_rows

# B, C, H, W, N, kernel, stride of convolutions of SDXL at 1024 x 1024, guided: residual block, downsampling, shortcut.
_CONVOLUTIONS = ((2, 320, 128, 128, 320, 3, 1), (2, 640, 64, 64, 640, 3, 2), (2, 960, 64, 64, 640, 1, 1))


def packed_cases(device: torch.device) -> list[Case]:
    """Those for ``device``."""
    return [*_linear_cases(device), *_hadamard_cases(device), *_static_cases(device), *_conv_cases(device)]


def _linear_cases(device: torch.device) -> Iterator[Case]:
    """Some of the shapes, each with one form of the weight."""
    for activations in ("int8", "float"):
        for dtype in DTYPES:
            paths = int4_linear._paths(device, activations, dtype)
            # On the CPU our kernels are no candidates, but can be interpreted.
            interpreted = (
                device.type == "cpu" and has_kernels(device) and (activations == "int8" or dtype.itemsize == 2)
            )
            for path in (*paths, *(["triton"] if interpreted else [])):
                for index, shape in enumerate(linears(device)[:: 3 if device.type == "cuda" else 2]):
                    if path == "int_mm" and device.type == "cuda" and refused(shape):
                        continue
                    form = ("group 64", "nested", "per channel")[index % 3]
                    make = partial(_linear, shape=shape, dtype=dtype, activations=activations, path=path, form=form)
                    name = f"{activations} activations, {form}, {name_of(shape)}"
                    disables = () if path == "dense" else (("int4_linear", path),)
                    yield Case("int4_linear", path, dtype, name, make, disables)


def _linear(around: Surroundings, shape: Linear, dtype: torch.dtype, activations: str, path: str, form: str) -> Subject:
    generator = torch.Generator(around.device).manual_seed(shape.M + shape.N + shape.K)
    x = around.place(signed_rows(shape.M, shape.K, dtype, generator))
    dense = signed_rows(shape.N, shape.K, torch.float32, generator)
    bias = around.place(signed_rows(1, shape.N, dtype, generator)[0])
    rows = sampled_rows(shape.M, generator)
    packed: Int4Weight | NestedWeight = quantize_int4(dense, 64 if form == "group 64" else None)
    if form == "nested":
        packed = quantize_nested(dense)
    packed = _placed(around, packed)
    bits = 8 if path == "triton" else activation_bits(around.device)
    dense = dense.to(dtype)
    reference = int4_linear.int4_linear_ref(x[rows].float(), packed, bias, activations, None, bits)
    # The same integers, so that only the result is rounded; 16-bit products sum in float32.
    tolerance = max(2e-5, 2 * torch.finfo(dtype).eps)
    planes = int4_linear._planes(packed)

    def run(x: Tensor, bias: Tensor) -> Tensor:
        if path == "triton":  # on the CPU, too
            return int4_linear._RUN[path, activations](x, planes, bias, None)
        return int4_linear.int4_linear(x, packed, bias, activations, path=path)

    return Subject(
        run=run,
        inputs=(x, bias),
        sample=lambda y: y[rows],
        reference=reference,
        tolerance=0.1 if path == "dense" and activations == "int8" else tolerance,
        dense=lambda: F.linear(x, dense, bias),
    )


def _placed(around: Surroundings, packed: Int4Weight | NestedWeight) -> Int4Weight | NestedWeight:
    if isinstance(packed, NestedWeight):
        high = _placed(around, packed.high)
        assert isinstance(high, Int4Weight)
        return NestedWeight(high, around.place(packed.low), around.place(packed.scale))
    multiplier = None if packed.multiplier is None else around.place(packed.multiplier)
    return replace(
        packed, nibbles=around.place(packed.nibbles), multiplier=multiplier, scale=around.place(packed.scale)
    )


def _hadamard_cases(device: torch.device) -> Iterator[Case]:
    if not has_kernels(device):
        return
    for shape in linears(device)[::3]:
        shape = replace(shape, K=-(-shape.K // 16) * 16)
        for dtype in DTYPES:
            make = partial(_hadamard, shape=shape, dtype=dtype)
            disables = (("hadamard_quantize", "triton"),)
            yield Case("hadamard_quantize", "triton", dtype, name_of(shape), make, disables, **_here(device))


def _static_cases(device: torch.device) -> Iterator[Case]:
    if not has_kernels(device):
        return
    for shape in linears(device)[::3]:
        for dtype in DTYPES:
            make = partial(_static, shape=shape, dtype=dtype)
            disables = (("int8_static_linear", "triton"), ("int8_static_linear", "int_mm"))  # both round with it
            yield Case("static_quantize", "triton", dtype, name_of(shape), make, disables, **_here(device))


def _static(around: Surroundings, shape: Linear, dtype: torch.dtype) -> Subject:
    from diffaccel.kernels.static_quantize import launch

    generator = torch.Generator(around.device).manual_seed(shape.M + shape.K)
    x = around.place(signed_rows(shape.M, shape.K, dtype, generator))
    before = around.place(signed_rows(1, shape.K, torch.float32, generator)[0])
    scale, zero = (around.place(t) for t in grid(x.amin()[None] / 2, x.amax()[None] / 2))
    rows = sampled_rows(shape.M, generator)
    exact = static_quantize_ref(x[rows], scale, zero, before).double() - zero.double()

    def run(x: Tensor, before: Tensor) -> Tensor:
        q = static_quantize(x, scale, zero, before) if x.is_cuda else launch(x, scale, zero, before)
        return q.float() - zero

    # A number that lies between two may be rounded either way: a few of the row, by one step.
    return Subject(run, (x, before), lambda y: y[rows], exact, 5e-3)


def _here(device: torch.device) -> dict[str, bool]:
    """On the CPU what is launched is no operator, so there is nothing to compile."""
    return {} if device.type == "cuda" else {"compiles": False}


def _hadamard(around: Surroundings, shape: Linear, dtype: torch.dtype) -> Subject:
    from diffaccel.kernels.hadamard_quantize import launch

    generator = torch.Generator(around.device).manual_seed(shape.M + shape.K)
    x = around.place(signed_rows(shape.M, shape.K, dtype, generator))
    before = around.place(signed_rows(1, shape.K, torch.float32, generator)[0].sign())
    rows = sampled_rows(shape.M, generator)
    block = block_for(shape.K)

    def run(x: Tensor, before: Tensor) -> Tensor:
        if x.device.type == "cuda":
            q, row_scale = hadamard_quantize(x, before)
        else:
            q, row_scale = x.new_empty(x.shape, dtype=torch.int8), x.new_empty((len(x), 1), dtype=torch.float32)
            launch(x, before, None, block, 8, q, row_scale)
        return q.float() * row_scale

    # Against the rows before they are rounded: half a step of 1 / 127, a root mean square of a sixth of it.
    return Subject(run, (x, before), lambda y: y[rows], hadamard_ref(x[rows], before, None, block).double(), 0.05)


def _conv_cases(device: torch.device) -> Iterator[Case]:
    for B, C, H, W, N, kernel, stride in _CONVOLUTIONS:
        if device.type == "cpu":
            C, H, W, N = C // 32 + 1, H // 8 + 1, W // 8, N // 32 + 8
        moves = int8_conv.Geometry((stride, stride), (kernel // 2, kernel // 2))
        for dtype in DTYPES:
            interpreted = device.type == "cpu" and has_kernels(device)
            for path in (*int8_conv._paths(device, 1), *(["triton"] if interpreted else [])):
                make = partial(
                    _conv, size=(B, C, H, W), filters=(N, C, kernel, kernel), moves=moves, dtype=dtype, path=path
                )
                name = f"SDXL: {B} x {C} x {H} x {W} to {N}, {kernel} x {kernel}, stride {stride}"
                disables = () if path == "dense" else (("int8_conv", path),)
                yield Case("int8_conv", path, dtype, name, make, disables)


def _conv(
    around: Surroundings,
    size: tuple[int, int, int, int],
    filters: tuple[int, int, int, int],
    moves: int8_conv.Geometry,
    dtype: torch.dtype,
    path: str,
) -> Subject:
    generator = torch.Generator(around.device).manual_seed(sum(size))
    x = around.place(signed_rows(size[0] * size[1] * size[2], size[3], dtype, generator).view(size))
    weight = signed_rows(filters[0], filters[1] * filters[2] * filters[3], torch.float32, generator).view(filters)
    bias = around.place(signed_rows(1, filters[0], dtype, generator)[0])
    qweight, scale = int8_conv.quantize_filters(weight)
    plain = around.place(qweight.contiguous(memory_format=torch.channels_last))
    packed = None if path == "triton" else int8_conv.pack_filters(qweight, scale, moves, path)
    bits = 8 if packed is None else packed.bits
    # Sums of integers in float32: exact up to 2**24, beyond nearly so. float64 would take minutes.
    exact = int8_conv.int8_conv_ref(x.float(), qweight, scale, bias, moves, bits, None, torch.float32)
    rows = sampled_rows(exact[:, 0].numel(), generator)
    weight = weight.to(dtype)

    def by_pixel(y: Tensor) -> Tensor:
        return y.permute(0, 2, 3, 1).flatten(0, 2)[rows]

    def run(x: Tensor, bias: Tensor) -> Tensor:
        if packed is None:
            return int8_conv._RUN[path](x, plain, scale, bias, None, moves, bits).to(dtype)
        return int8_conv.int8_conv(x, packed, bias)

    return Subject(
        run=run,
        inputs=(x, bias),
        sample=by_pixel,
        reference=by_pixel(exact).double(),
        tolerance=0.2 if path == "dense" else max(2e-5, torch.finfo(dtype).eps),
        dense=lambda: F.conv2d(x, weight, bias, moves.stride, moves.padding),
    )

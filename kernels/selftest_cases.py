"""What the self-test runs: every candidate of every operator, at the shapes of real models, against float64.

On CUDA the shapes are those of `roofline`. On the CPU, where Triton's kernels are interpreted, there are fewer, smaller
ones, no multiples of the tile sizes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.kernels import fp8_linear, int8_linear
from diffaccel.kernels.block_pattern import BlockPattern
from diffaccel.kernels.block_sparse import block_sparse_attention, path_for
from diffaccel.kernels.roofline import ATTENTIONS, DENSITIES, LINEARS, Attention, Linear
from diffaccel.kernels.selftest import Case, NotHere, Subject, Surroundings

# Rows whose result is compared: float64 over all of them would take longer than everything else, and not fit the card.
_SAMPLES = 64
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_BLOCK = 128
_QUANTIZED = {"int8_linear": torch.int8, "fp8_linear": fp8_linear.FP8}


def cases(device: torch.device) -> list[Case]:
    """Those for ``device``, one operator after the other."""
    from diffaccel.kernels.selftest_packed import packed_cases  # which takes shapes and data from here

    found = [*_quantize_cases(device), *_linear_cases(device), *_attention_cases(device), *_permute_cases(device)]
    found += packed_cases(device)
    if device.type == "cpu":
        found = [replace(case, timed=case.candidate != "triton") for case in found]
    # What is compiled is an operator of torch.library, whatever the shape: once for each dtype says all.
    first = {(case.operator, case.candidate, case.dtype): case.name for case in reversed(found)}.values()
    return [replace(case, compiles=case.compiles and case.name in first) for case in found]


def linears(device: torch.device) -> list[Linear]:
    if device.type == "cuda":
        return list(LINEARS)
    return [replace(s, M=min(s.M // 128, 90) + 1, N=s.N // 32 + 8, K=s.K // 32 + 8) for s in LINEARS[::3]]


def _attentions(device: torch.device) -> list[Attention]:
    if device.type == "cuda":
        return list(ATTENTIONS)
    return [replace(s, heads=2, tokens=min(s.tokens // 8, 400) + 5) for s in ATTENTIONS]


def has_kernels(device: torch.device, dtype: torch.dtype = torch.int8) -> bool:
    """Whether kernels that multiply ``dtype`` run on ``device``."""
    if find_spec("triton") is None:
        return False
    from diffaccel.kernels.token_quantize import runs_here

    return runs_here(torch.empty(1, device=device), dtype)


def signed_rows(rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Gaussian, every other row of one sign: those are the sums that overflow first."""
    values = torch.randn(rows, columns, generator=generator, device=generator.device, dtype=dtype)
    values[::4].abs_()
    values[2::4].abs_().neg_()
    return values


def sampled_rows(rows: int, generator: torch.Generator) -> Tensor:
    """Indices of `_SAMPLES` rows, the last among them: what is left of a tile is where bounds go wrong."""
    chosen = torch.randperm(rows, generator=generator, device=generator.device)[:_SAMPLES]
    chosen[0] = rows - 1
    return chosen.unique()


def name_of(shape: Linear) -> str:
    return f"{shape.model.split()[0]} {shape.where}: M {shape.M}, N {shape.N}, K {shape.K}"


def _quantize_cases(device: torch.device) -> Iterator[Case]:
    """After the adaptive LayerNorm of a block, which the kernel does in passing."""
    for operator, to in _QUANTIZED.items():
        if not has_kernels(device, to):
            continue
        for shape in linears(device):
            for dtype in DTYPES:
                make = partial(_quantize, shape=shape, dtype=dtype, to=to)
                name = f"to {str(to).removeprefix('torch.')}, {name_of(shape)}"
                yield Case("token_quantize", "triton", dtype, name, make, ((operator, "triton"),))


def _quantize(around: Surroundings, shape: Linear, dtype: torch.dtype, to: torch.dtype) -> Subject:
    from diffaccel.kernels.token_quantize import token_quantize, token_quantize_ref

    generator = torch.Generator(around.device).manual_seed(shape.M + shape.K)
    x = around.place(signed_rows(shape.M, shape.K, dtype, generator))
    scale, shift = (around.place(signed_rows(1, shape.K, dtype, generator)) for _ in range(2))
    rows = sampled_rows(shape.M, generator)
    q, row_scale = token_quantize_ref(x[rows].double(), to, 1e-6, scale=scale[0], shift=shift[0])

    def run(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        q, row_scale = token_quantize(x, to, 1e-6, scale=scale[0], shift=shift[0])
        return q.float() * row_scale

    # A number that lies between two may be rounded either way: a few of the row, by one step.
    return Subject(run, (x, scale, shift), lambda y: y[rows], q.double() * row_scale, 5e-3)


def _linear_cases(device: torch.device) -> Iterator[Case]:
    for operator, paths in (("int8_linear", int8_linear._paths), ("fp8_linear", fp8_linear._paths)):
        # On the CPU our kernel is no candidate, but can be interpreted.
        interpreted = device.type == "cpu" and has_kernels(device)
        for path in (*paths(device), *(["triton"] if interpreted else [])):
            for shape in linears(device):
                for dtype in DTYPES:
                    make = partial(_linear, shape=shape, dtype=dtype, operator=operator, path=path)
                    # Dense stands in for the others: a failure is reported and disables nothing.
                    disables = () if path == "dense" else ((operator, path),)
                    if not (path in ("int_mm", "scaled_mm") and device.type == "cuda" and refused(shape)):
                        yield Case(operator, path, dtype, name_of(shape), make, disables)


def refused(shape: Linear) -> bool:
    """What cuBLASLt does not take, so that the library is no candidate there."""
    return shape.M <= 16 or shape.K % 16 != 0 or shape.N % 16 != 0


def _linear(around: Surroundings, shape: Linear, dtype: torch.dtype, operator: str, path: str) -> Subject:
    generator = torch.Generator(around.device).manual_seed(shape.M + shape.N + shape.K)
    x = around.place(signed_rows(shape.M, shape.K, dtype, generator))
    weight = signed_rows(shape.N, shape.K, torch.float32, generator)
    bias = around.place(signed_rows(1, shape.N, dtype, generator)[0])
    rows = sampled_rows(shape.M, generator)
    module = int8_linear if operator == "int8_linear" else fp8_linear
    qweight, scale = module.quantize_per_channel(weight)
    scale = around.place(scale)
    if operator == "int8_linear":
        bits = 8 if path == "triton" else int8_linear.activation_bits(around.device)
        reference = int8_linear.int8_linear_ref(x[rows].float(), qweight, scale, bias, bits)
        # The same integers, so that only the result is rounded.
        tolerance = max(1e-5, torch.finfo(dtype).eps)
    else:
        reference = fp8_linear.fp8_linear_ref(x[rows].float(), qweight, scale, bias)
        # Sums of fp8 products are short of bits on some chips; bfloat16 is all that the library returns.
        tolerance = 0.01
    weight = weight.to(dtype)
    return Subject(
        run=_linear_run(around, operator, path, qweight, scale),
        inputs=(x, bias),
        sample=lambda y: y[rows],
        reference=reference,
        tolerance=0.1 if path == "dense" else tolerance,  # dense does not quantise activations
        dense=lambda: F.linear(x, weight, bias),
    )


def _linear_run(
    around: Surroundings, operator: str, path: str, qweight: Tensor, scale: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """``x`` [M, K], ``bias`` [N] -> [M, N]."""
    if path == "triton":
        from diffaccel.kernels.fp8_gemm import fp8_gemm
        from diffaccel.kernels.int8_gemm import int8_gemm
        from diffaccel.kernels.token_quantize import token_quantize

        gemm = int8_gemm if operator == "int8_linear" else fp8_gemm
        data = around.place(qweight)

        def run(x: Tensor, bias: Tensor) -> Tensor:
            q, row_scale = token_quantize(x, _QUANTIZED[operator])
            return gemm(q, data, row_scale, scale, bias, x.dtype)

        return run
    if operator == "fp8_linear":
        data = around.place(qweight)
        return lambda x, bias: fp8_linear.fp8_linear(x, data, scale, bias, path)
    packed = replace(int8_linear.pack(qweight, scale, path), scale=scale)
    if not packed.data.is_mkldnn:  # which has no storage to place
        packed = replace(packed, data=around.place(packed.data))
    return lambda x, bias: int8_linear.int8_linear(x, packed, bias)


def _attention_cases(device: torch.device) -> Iterator[Case]:
    for path in ("triton", "flex", "blocks"):
        if path == "triton" and not has_kernels(device):
            continue
        for index, shape in enumerate(_attentions(device)):
            for dtype, density in itertools.product(DTYPES, DENSITIES[: 1 if index else None]):
                if path == "flex" and device.type == "cpu" and dtype != torch.float32:
                    continue  # each dtype takes many seconds to compile, and on the CPU no other is fast
                name = f"{shape.model.split()[0]} {shape.where}: H {shape.heads}, N {shape.tokens}, D {shape.size}"
                make = partial(_attention, shape=shape, dtype=dtype, density=density, path=path)
                disables = () if path == "blocks" else (("block_sparse_attention", path),)
                # Gathered blocks are listed on the host, which a graph cannot do again.
                captures = path != "blocks"
                name = f"{name}, density {density}"
                yield Case("block_sparse_attention", path, dtype, name, make, disables, captures=captures)


def _attention(around: Surroundings, shape: Attention, dtype: torch.dtype, density: float, path: str) -> Subject:
    H, N, D = shape.heads, shape.tokens, shape.size
    generator = torch.Generator(around.device).manual_seed(N + D)
    q, k, v = (around.place(signed_rows(H * N, D, dtype, generator).view(1, H, N, D)) for _ in range(3))
    n = -(-N // _BLOCK)
    keep = torch.rand(H, n, n, generator=generator, device=around.device) < density
    keep |= torch.eye(n, dtype=torch.bool, device=around.device)
    pattern = BlockPattern.from_mask(keep, _BLOCK)
    pattern = replace(
        pattern,
        kv_num_blocks=around.place(pattern.kv_num_blocks),
        kv_indices=around.place(pattern.kv_indices),
    )
    taken = path_for(q, k, v, pattern, path=path)
    if taken.name != path:
        raise NotHere(taken.reason)
    rows = sampled_rows(N, generator)
    return Subject(
        run=lambda q, k, v: block_sparse_attention(q, k, v, pattern, path=path),
        inputs=(q, k, v),
        sample=lambda y: y[0][:, rows],
        reference=torch.stack([_attend(q[0, h, rows], k[0, h], v[0, h], keep[h], rows) for h in range(H)]),
        tolerance={torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}[dtype],
        dense=lambda: F.scaled_dot_product_attention(q, k, v),
    )


def _attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, rows: Tensor) -> Tensor:
    """One head in float64: queries [R, D] with indices ``rows``, keys and values [N, D], blocks [n, n] -> [R, D]."""
    scores = q.double() @ k.double().T * q.shape[-1] ** -0.5
    mask = keep[rows // _BLOCK].repeat_interleave(_BLOCK, 1)[:, : len(k)]
    return torch.softmax(scores.masked_fill(~mask, float("-inf")), -1) @ v.double()


def _permute_cases(device: torch.device) -> Iterator[Case]:
    if not has_kernels(device):
        return
    for shape in _attentions(device):
        for dtype in DTYPES:
            name = f"{shape.model.split()[0]} {shape.where}: H {shape.heads}, N {shape.tokens}, D {shape.size}"
            make = partial(_permute, shape=shape, dtype=dtype)
            yield Case("permute_tokens", "triton", dtype, name, make, (("permute_tokens", "triton"),))


def _permute(around: Surroundings, shape: Attention, dtype: torch.dtype) -> Subject:
    from diffaccel.kernels.permute_tokens import permute_tokens

    H, N, D = shape.heads, shape.tokens, shape.size
    generator = torch.Generator(around.device).manual_seed(N + D)
    x = around.place(signed_rows(H * N, D, dtype, generator).view(1, H, N, D))
    order = torch.stack([torch.randperm(N, generator=generator, device=around.device) for _ in range(H)])
    placed = around.place(order.int())
    rows = sampled_rows(N, generator)
    expected = torch.stack([x[0, h, order[h, rows]] for h in range(H)]).double()
    return Subject(permute_tokens, (x, placed), lambda y: y[0][:, rows], expected, 0.0)

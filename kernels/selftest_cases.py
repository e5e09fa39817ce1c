"""What the self-test runs: every candidate of every operator, at the shapes of real models, against float64.

On CUDA the shapes are those of `roofline`. On the CPU, where Triton's kernels are interpreted, they are smaller, and no
multiples of the tile sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.kernels import int8_linear
from diffaccel.kernels.block_pattern import BlockPattern
from diffaccel.kernels.block_sparse import block_sparse_attention
from diffaccel.kernels.roofline import ATTENTIONS, DENSITIES, LINEARS, Attention, Linear
from diffaccel.kernels.selftest import Case, Subject, Surroundings

# Rows whose result is compared: float64 over all of them would take longer than everything else, and not fit the card.
_SAMPLES = 64
_BLOCK = 128
# Stand in for the others, so that a failure is reported but disables nothing.
_LAST_RESORT = ("dense", "blocks")


def cases(device: torch.device) -> list[Case]:
    """Those for ``device``, one operator after the other."""
    found = [*_linear_cases(device), *_attention_cases(device)]
    if device.type == "cpu":
        found = [replace(case, timed=case.candidate != "triton") for case in found]
    # One operator of torch.library whatever the shape: compiling it once for each dtype says all.
    first = {(case.operator, case.candidate, case.dtype): case for case in reversed(found)}
    return [replace(case, compiles=case in first.values()) for case in found]


def _shapes(device: torch.device) -> tuple[list[Linear], list[Attention]]:
    if device.type == "cuda":
        return list(LINEARS), list(ATTENTIONS)
    linears = [replace(s, M=s.M // 128 + 1, N=s.N // 32 + 8, K=s.K // 32 + 8) for s in LINEARS]
    attentions = [replace(s, heads=2, tokens=min(s.tokens // 8, 1000) + 5) for s in ATTENTIONS]
    return linears, attentions


def _dtypes(index: int) -> tuple[torch.dtype, ...]:
    """bfloat16, what users run, at every shape; the others at the first shape of a list."""
    return (torch.bfloat16, torch.float16, torch.float32) if index == 0 else (torch.bfloat16,)


def _disables(operator: str, candidate: str) -> tuple[tuple[str, str], ...]:
    return () if candidate in _LAST_RESORT else ((operator, candidate),)


def _linear_cases(device: torch.device) -> Iterator[Case]:
    for path in int8_linear._paths(device):
        for index, shape in enumerate(_shapes(device)[0]):
            for dtype in _dtypes(index):
                name = f"{shape.model.split()[0]} {shape.where}: M {shape.M}, N {shape.N}, K {shape.K}"
                make = partial(_int8_linear, shape=shape, dtype=dtype, path=path)
                yield Case("int8_linear", path, dtype, name, make, _disables("int8_linear", path))


def _int8_linear(around: Surroundings, shape: Linear, dtype: torch.dtype, path: str) -> Subject:
    generator = torch.Generator(around.device).manual_seed(shape.M + shape.N + shape.K)
    x = around.place(_rows(shape.M, shape.K, dtype, generator))
    weight = _rows(shape.N, shape.K, torch.float32, generator)
    bias = around.place(torch.randn(shape.N, generator=generator, device=around.device).to(dtype))
    qweight, scale = int8_linear.quantize_per_channel(weight)
    packed = int8_linear.pack(qweight, scale, path)
    packed = replace(packed, scale=around.place(packed.scale))
    if not packed.data.is_mkldnn:
        packed = replace(packed, data=around.place(packed.data))
    weight = weight.to(dtype)
    rows = _sampled(shape.M, generator)
    return Subject(
        run=lambda x, bias: int8_linear.int8_linear(x, packed, bias),
        inputs=(x, bias),
        sample=lambda y: y[rows],
        reference=int8_linear.int8_linear_ref(x[rows].float(), qweight, scale, bias, packed.bits),
        # The same integers, so that only the result is rounded; dense does not quantise activations.
        tolerance=0.1 if path == "dense" else max(1e-5, torch.finfo(dtype).eps),
        dense=lambda: F.linear(x, weight, bias),
    )


def _rows(rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Gaussian, every other row of one sign: those are the sums that overflow first."""
    values = torch.randn(rows, columns, generator=generator, device=generator.device, dtype=dtype)
    values[::4].abs_()
    values[2::4].abs_().neg_()
    return values


def _sampled(rows: int, generator: torch.Generator) -> Tensor:
    """Indices of `_SAMPLES` rows, the last among them: what is left of a tile is where bounds go wrong."""
    chosen = torch.randperm(rows, generator=generator, device=generator.device)[:_SAMPLES]
    chosen[0] = rows - 1
    return chosen.unique()


def _attention_cases(device: torch.device) -> Iterator[Case]:
    for path in ("flex", "blocks"):
        for index, shape in enumerate(_shapes(device)[1]):
            for dtype, density in ((t, d) for t in _dtypes(index) for d in DENSITIES[: 1 if index else None]):
                name = f"{shape.model.split()[0]} {shape.where}: H {shape.heads}, N {shape.tokens}, D {shape.size}"
                make = partial(_attention, shape=shape, dtype=dtype, density=density, path=path)
                disables = _disables("block_sparse_attention", path)
                yield Case("block_sparse_attention", path, dtype, f"{name}, density {density}", make, disables)


def _attention(around: Surroundings, shape: Attention, dtype: torch.dtype, density: float, path: str) -> Subject:
    H, N, D = shape.heads, shape.tokens, shape.size
    generator = torch.Generator(around.device).manual_seed(N + D)
    q, k, v = (
        around.place(torch.randn(1, H, N, D, generator=generator, device=around.device, dtype=dtype)) for _ in range(3)
    )
    n = -(-N // _BLOCK)
    keep = torch.rand(H, n, n, generator=generator, device=around.device) < density
    keep |= torch.eye(n, dtype=torch.bool, device=around.device)
    pattern = BlockPattern.from_mask(keep, _BLOCK)
    pattern = replace(
        pattern,
        kv_num_blocks=around.place(pattern.kv_num_blocks),
        kv_indices=around.place(pattern.kv_indices),
    )
    rows = _sampled(N, generator)
    return Subject(
        run=lambda q, k, v: block_sparse_attention(q, k, v, pattern, path=path),
        inputs=(q, k, v),
        sample=lambda y: y[0, :, rows],
        reference=torch.stack([_attend(q[0, h, rows], k[0, h], v[0, h], keep[h], rows) for h in range(H)]),
        tolerance={torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}[dtype],
        dense=lambda: F.scaled_dot_product_attention(q, k, v),
    )


def _attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, rows: Tensor) -> Tensor:
    """One head in float64: queries [R, D] with indices ``rows``, keys and values [N, D], blocks [n, n] -> [R, D]."""
    scores = q.double() @ k.double().T * q.shape[-1] ** -0.5
    mask = keep[rows // _BLOCK].repeat_interleave(_BLOCK, 1)[:, : len(k)]
    return torch.softmax(scores.masked_fill(~mask, float("-inf")), -1) @ v.double()

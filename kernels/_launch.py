"""What the Triton kernels here share: where they run, how they are configured, what they are compiled for.

Imports Triton: import it, and every module that holds a kernel, only where a kernel is about to run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def runs_triton(x: Tensor) -> bool:
    """Whether a kernel can be launched on ``x``: on CUDA, or on the CPU in Triton's interpreter."""
    return x.is_cuda or (bool(INTERPRETED.value) and x.device.type == "cpu")


@contextmanager
def device_of(x: Tensor) -> Iterator[None]:
    """Launch inside: Triton takes the current device, which need not be that of ``x``."""
    if not x.is_cuda:
        yield
        return
    with torch.cuda.device(x.device):
        yield


@triton.jit
def dot(a, b, acc):  # type: ignore[no-untyped-def]
    """acc + a @ b in float32 (int32 for int8). The interpreter multiplies the raw bits of bfloat16: it gets floats."""
    if INTERPRETED and (a.dtype == tl.bfloat16 or a.dtype == tl.float8e4nv):
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, out_dtype=acc.dtype)


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel: ``tiles`` are its constexpr block sizes."""

    tiles: Mapping[str, int]
    warps: int
    stages: int


@dataclass(frozen=True)
class Specimen:
    """One kernel in one configuration, as it is compiled ahead of time (no GPU needed) and judged.

    Args:
        name: operator, dtype and configuration in words, such as ``"int8_gemm bf16 large-M"``; unique.
        kernel: the ``@triton.jit`` function.
        types: every argument that is no constexpr, in order: ``{"x_ptr": "*bf16", "M": "i32", "scale": "fp32"}``.
        constants: every constexpr argument but the tiles of ``config``.
        config: tiles, warps and stages.
        aligned: integer arguments that are multiples of 16 at the sizes this is meant for; pointers always are.
        tensor_cores: which multiply instructions it should use: ``"int8"``, ``"fp8"``, ``"16-bit"`` or None.
        targets: compute capabilities it is meant for (fp8 needs 89 and later).
        fp_fusion: False where the launch forbids to round a product and a sum only once.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    config: Config
    aligned: tuple[str, ...] = ()
    tensor_cores: str | None = None
    targets: tuple[int, ...] = field(default=(80, 89, 90, 100, 120))
    fp_fusion: bool = True

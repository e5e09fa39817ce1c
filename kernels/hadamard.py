"""Block Hadamard rotation of the last dimension, alone or on the way to int8:

    y = ((x * before) (I kron H_B / sqrt(B))) * after        before, after: [K], optional

H_B is Sylvester's matrix, entries 1 and -1. The block is orthogonal and symmetric, so that rotating twice gives x back
up to rounding, and with random signs in ``before`` this is the randomised Hadamard transform (QuIP#, arXiv:2402.04396,
sec. 3): an outlying channel spreads over B channels, which lowers the largest magnitude of the row by up to sqrt(B),
and with it the step of int8. Multipliers of a channel balance go into ``before`` or ``after`` as well.

B is the largest power of two that divides the width, at most 128. So every even width has blocks; those of two, such as
1152 = 9 * 128, have no matrix over the whole width of this kind, and where they have, larger blocks spread further but
cost more, while random signs make sums of 128 terms nearly normal already.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor

from diffaccel.kernels._candidates import Trial, choose, has_triton, token_bucket, worst_row_error
from diffaccel.kernels.per_token import quantize_per_token

LARGEST_BLOCK = 128
# Elements rotated at a time on the CPU, so that they are still in the second-level cache when they are quantised.
_CHUNK = 1 << 18
# A product with H of this size is as fast as the sums and differences that it replaces.
SMALL = 32


def block_for(width: int) -> int:
    """B for rows of ``width``; 1, where nothing is rotated, if it is odd."""
    return min(width & -width, LARGEST_BLOCK)


def hadamard_matrix(block: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """H_B / sqrt(B), [B, B], for a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix * block**-0.5).to(device, dtype)


def hadamard_ref(x: Tensor, before: Tensor | None, after: Tensor | None, block: int) -> Tensor:
    """The definition, float32 [..., K]. ``x * before`` is rounded to the dtype of ``x``, in which it is multiplied."""
    x = x if before is None else (x.float() * before.float()).to(x.dtype)
    y = x.double().unflatten(-1, (-1, block)) @ hadamard_matrix(block, x.device, torch.float64)
    y = y.flatten(-2)
    return (y if after is None else y * after.double()).float()


def hadamard_quantize_ref(
    x: Tensor, before: Tensor | None, after: Tensor | None, block: int, bits: int = 8
) -> tuple[Tensor, Tensor]:
    """The definition; arguments as for `hadamard_quantize`."""
    return quantize_per_token(hadamard_ref(x, before, after, block), bits)


def hadamard(x: Tensor, before: Tensor | None = None, after: Tensor | None = None, block: int | None = None) -> Tensor:
    """``x`` [..., K] -> [..., K] in its dtype.

    Args:
        before, after: multipliers of each channel, [K].
        block: a power of two that divides K; None: `block_for` K.

    Raises:
        ValueError: Shapes that do not go together.
    """
    return _hadamard(x, before, after, _block(x, before, after, block))


def hadamard_quantize(
    x: Tensor,
    before: Tensor | None = None,
    after: Tensor | None = None,
    block: int | None = None,
    bits: int = 8,
) -> tuple[Tensor, Tensor]:
    """``x`` [..., K] -> int8 q [..., K] and float32 row scale [..., 1]; q * row scale ~ the rotated x.

    On CUDA one kernel, which reads ``x`` and writes q; the rotated rows never reach memory. A row with NaN or infinity
    gets a scale that is NaN or infinite, so that every product with it is.

    Args:
        before, after, block: as for `hadamard`.
        bits: 8, or 7 where `int8_linear.activation_bits` says so.
    """
    return _hadamard_quantize(x, before, after, _block(x, before, after, block), bits)


def _block(x: Tensor, before: Tensor | None, after: Tensor | None, block: int | None) -> int:
    K = x.shape[-1] if x.ndim else 0
    chosen = block_for(K) if block is None else block
    if K == 0 or chosen < 1 or chosen & (chosen - 1) or K % chosen:
        raise ValueError(
            f"expected x [..., K > 0] and a block that is a power of two and divides K, got {K} and {block}"
        )
    if any(m is not None and m.shape != (K,) for m in (before, after)):
        got = [None if m is None else tuple(m.shape) for m in (before, after)]
        raise ValueError(f"expected before and after [{K}], got {got}")
    return chosen


@torch.library.custom_op("diffaccel::hadamard", mutates_args=())
def _hadamard(x: Tensor, before: Tensor | None, after: Tensor | None, block: int) -> Tensor:
    if x.device.type != "cpu":
        y = x if before is None else x * before.to(x.dtype)
        y = y.unflatten(-1, (-1, block)) @ hadamard_matrix(block, x.device, x.dtype)
        y = y.flatten(-2)
        return y if after is None else y * after.to(x.dtype)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, rotated = x.reshape(-1, x.shape[-1]), y.view(-1, x.shape[-1])
    for part in _parts(rows):
        rotated[part] = _rotated(rows[part], before, after, block)
    return y


@_hadamard.register_fake
def _(x: Tensor, before: Tensor | None, after: Tensor | None, block: int) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("diffaccel::hadamard_quantize", mutates_args=())
def _hadamard_quantize(
    x: Tensor, before: Tensor | None, after: Tensor | None, block: int, bits: int
) -> tuple[Tensor, Tensor]:
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    row_scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return q, row_scale
    run = _RUN[_resolve(x, before, block, bits)]
    run(x.reshape(-1, x.shape[-1]), before, after, block, bits, q.view(-1, x.shape[-1]), row_scale.view(-1, 1))
    return q, row_scale


@_hadamard_quantize.register_fake
def _(x: Tensor, before: Tensor | None, after: Tensor | None, block: int, bits: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _triton(
    x: Tensor, before: Tensor | None, after: Tensor | None, block: int, bits: int, q: Tensor, row_scale: Tensor
) -> None:
    from diffaccel.kernels.hadamard_quantize import launch

    launch(x, before, after, block, bits, q, row_scale)


def _dense(
    x: Tensor, before: Tensor | None, after: Tensor | None, block: int, bits: int, q: Tensor, row_scale: Tensor
) -> None:
    """Rotation, then quantisation; on the CPU for some rows at a time."""
    if x.device.type == "cpu":
        for part in _parts(x):
            q[part], row_scale[part] = quantize_per_token(_rotated(x[part], before, after, block), bits)
        return
    values, scales = quantize_per_token(_hadamard(x.float(), before, after, block), bits)
    q.copy_(values)
    row_scale.copy_(scales)


_RUN = {"triton": _triton, "dense": _dense}


def _has_kernel(x: Tensor) -> bool:
    return has_triton(x.device, (8, 0))


def _resolve(x: Tensor, before: Tensor | None, block: int, bits: int) -> str:
    """The candidate for ``x``. Tensor cores take no blocks below 16."""
    if block < 16 or not _has_kernel(x):
        return "dense"
    K = x.shape[-1]
    M = token_bucket(x.numel() // K)
    shape = ("triton", f"M{M}", f"K{K}", x.dtype, f"B{block}", f"A{bits}", "plain" if before is None else "before")
    build = partial(_trial, M, K, x, before is not None, block, bits)
    return choose("hadamard_quantize", shape, x.device, ["triton", "dense"], build, default="dense")


def _trial(M: int, K: int, like: Tensor, factors: bool, block: int, bits: int) -> Trial:
    """Gaussian rows with an outlying channel."""
    generator = torch.Generator(like.device).manual_seed(M + K)  # its own: the user's noise stays as it is
    x = torch.randn(M, K, generator=generator, device=like.device)
    x[:, K // 2] *= 50
    x = x.to(like.dtype)
    before = torch.ones(K, device=like.device) if factors else None
    reference = hadamard_ref(x[:64], before, None, block)

    def run(path: str) -> Tensor:
        q = torch.empty(M, K, dtype=torch.int8, device=like.device)
        row_scale = torch.empty(M, 1, device=like.device)
        _RUN[path](x, before, None, block, bits, q, row_scale)
        return q * row_scale

    return Trial(
        runs={path: partial(run, path) for path in ("triton", "dense")},
        error=lambda y: worst_row_error(y[:64], reference),
        tolerance=dict.fromkeys(("triton", "dense"), 8 * 2.0**-bits),  # of rounding: a third of it
        baseline=lambda: quantize_per_token(x, bits)[0],
    )


def _parts(rows: Tensor) -> list[slice]:
    step = max(1, _CHUNK // rows.shape[1])
    return [slice(start, start + step) for start in range(0, len(rows), step)]


def _rotated(rows: Tensor, before: Tensor | None, after: Tensor | None, block: int) -> Tensor:
    """``rows`` [m, K] on the CPU -> float32 [m, K]: sums and differences of halves, then a product with a matrix."""
    if before is not None:
        rows = (rows * before.float()).to(rows.dtype)
    y, size = rows.float(), block
    while size > SMALL:
        size //= 2
        halves, y = y.reshape(-1, 2, size), torch.empty_like(y, memory_format=torch.contiguous_format)
        torch.add(halves[:, 0], halves[:, 1], out=y.view(halves.shape)[:, 0])
        torch.sub(halves[:, 0], halves[:, 1], out=y.view(halves.shape)[:, 1])
    y = torch.mm(y.reshape(-1, size), _matrix(size, block)).view(rows.shape)
    return y if after is None else y.mul_(after)


@lru_cache(maxsize=8)
def _matrix(size: int, block: int) -> Tensor:
    """What is left of ``block`` for a product: H of ``size`` over sqrt(block)."""
    return hadamard_matrix(size) * (size / block) ** 0.5

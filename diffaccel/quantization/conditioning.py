"""What is done to a linear's input and weight before rounding, so that rounding loses less.

With m [K] a multiplier for each input channel and H an orthogonal matrix, x W^T = ((x m) H) ((W / m) H)^T; and with
a low-rank part L of the conditioned weight, x' W'^T = x' L^T + x' (W' - L)^T, of which only the last is rounded.

Balancing: s_k = a_k^alpha / w_k^(1 - alpha) and m = 1 / s (SmoothQuant, arXiv:2211.10438, eq. 4), so alpha is the share
of the range that goes into the weight; ViDiT-Q (arXiv:2406.02540) calls this the static part of its channel balance,
and its newer code means 1 - alpha by alpha. There a and w are the largest magnitudes of a channel, here they are root
mean squares: rounding leaves an error in proportion to (sum of m^2 a^2) (sum of w^2 / m^2), which alpha = 0.5 makes
least. SQNR of the bundled image denoiser's output in dB, no balance, then alpha 0.3, 0.5, 0.7:

                maxima                 root mean squares
    W8A8        39.3  38.0 39.0 39.2   39.2 39.6 38.3        with rotation: 41.8, maxima 41.5, mean squares 42.4
    W4A16 g64   23.5  22.7 22.7 22.0   23.3 22.8 21.2        with rotation: 23.6, maxima 23.5, mean squares 23.8

(multipliers that are powers of two, so that x m is exact, cost a further 0.7 to 1.3 dB). The largest m is 1: no
half-precision activation grows beyond its range. Channels that are always zero, in the activations or in the weight,
take the middle of the others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffaccel.kernels.hadamard import hadamard

# Of m, as a power of two: smaller ones would push half-precision activations below their range.
_SMALLEST = -10
_OVERSAMPLE = 10
_POWER_ITERATIONS = 4


def balance_multiplier(squares: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """m, float32 [K], up to 1; values that bfloat16 holds too, so that inputs of any dtype get what the weight lost.

    Args:
        squares: mean square of each input channel, [K].
        weight: [N, K].
    """
    against = weight.detach().float().square().mean(0)
    squares = squares.to(against)
    live = (squares > 0) & (against > 0) & squares.isfinite() & against.isfinite()
    if not live.any():
        return torch.ones_like(against)
    log_s = (alpha * squares.log2() - (1 - alpha) * against.log2()) / 2
    log_s = torch.where(live, log_s, log_s[live].median())
    return torch.exp2((log_s.min() - log_s).clamp(min=_SMALLEST)).bfloat16().float()


def condition_weight(weight: Tensor, before: Tensor | None, after: Tensor | None, *, rotated: bool) -> Tensor:
    """W' of ``weight`` float32 [N, K], for inputs that `diffaccel.kernels.int8_rows.conditioned` gives.

    Args:
        before: multiplier of each channel, [K]: of the balance, of the rotation's signs, or of both.
        after: another one, after the rotation, where that comes first.
        rotated: whether it is turned in between.
    """
    weight = weight if before is None else weight / before
    weight = hadamard(weight) if rotated else weight
    return weight if after is None else weight / after


def release_weight(weight: Tensor, before: Tensor | None, after: Tensor | None, *, rotated: bool) -> Tensor:
    """The inverse of `condition_weight`."""
    weight = weight if after is None else weight * after
    weight = hadamard(weight) if rotated else weight
    return weight if before is None else weight * before


def low_rank(
    weight: Tensor, rank: int, dtype: torch.dtype, rounded: Callable[[Tensor], Tensor], refine: int = 0
) -> tuple[Tensor, Tensor]:
    """``up`` [N, R] and ``down`` [R, K] in ``dtype``, whose product is kept beside the rounded rest of ``weight``.

    A truncated SVD, randomised (Halko et al., arXiv:0909.4061, alg. 4.4), of the weight (SVDQuant, arXiv:2411.05007,
    sec. 4.2). Each refinement fits the branch to what the rounding of the rest before left over, W' - rounded(rest);
    the branch with the least error is kept.

    Args:
        weight: conditioned, float32 [N, K].
        rounded: what becomes of a weight [N, K] once it is quantized.
    """
    rank = min(rank, *weight.shape)
    best, least = None, float("inf")
    target = weight
    for attempt in range(refine + 1):
        up, down = _truncated(target, rank, dtype)
        if refine == 0:
            return up, down
        product = up.float() @ down.float()
        left = rounded(weight - product)
        error = float((weight - product - left).square().sum())
        if best is None or error < least:
            best, least = (up, down), error
        if attempt < refine:
            target = weight - left
    assert best is not None
    return best


def _truncated(weight: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors with even shares of the singular values, so that neither leaves the range of half precision."""
    if rank + _OVERSAMPLE >= min(weight.shape):
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        u, s, v = u[:, :rank], s[:rank], v[:rank].T
    else:
        u, s, v = _randomised(weight, rank)
    root = s.sqrt()
    return (u * root).to(dtype).contiguous(), (v * root).T.to(dtype).contiguous()


def _randomised(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest ``rank`` singular values and vectors, from the weight's action on a few random ones."""
    generator = torch.Generator().manual_seed(0)  # its own, on the CPU: the user's noise stays as it is
    v = torch.randn(weight.shape[1], rank + _OVERSAMPLE, generator=generator).to(weight)
    q = torch.linalg.qr(weight @ v).Q
    for _ in range(_POWER_ITERATIONS):
        v = torch.linalg.qr(weight.T @ q).Q
        q = torch.linalg.qr(weight @ v).Q
    u, s, vt = torch.linalg.svd(q.T @ weight, full_matrices=False)
    return q @ u[:, :rank], s[:rank], vt[:rank].T

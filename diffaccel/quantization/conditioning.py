"""What is done to a linear's input and weight before rounding, so that rounding loses less.

With m [K] a multiplier for each input channel and H an orthogonal matrix, x W^T = ((x m) H) ((W / m) H)^T; and with
a low-rank part L of the conditioned weight, x' W'^T = x' L^T + x' (W' - L)^T, of which only the last is rounded.

Balancing: s_k = max|x_k|^alpha / max|w_k|^(1 - alpha) and m = 1 / s (SmoothQuant, arXiv:2211.10438, eq. 4), so alpha is
the share of the range that goes into the weight; ViDiT-Q (arXiv:2406.02540) calls this the static part of its channel
balance, and its newer code means 1 - alpha by alpha. Here m is rounded to powers of two, the largest 1: multiplying
with it is then exact in every dtype, and no half-precision activation grows beyond its range. Channels that are always
zero, in the activations or in the weight, take the middle of the others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffaccel.quantization.rotation import hadamard

# Smaller multipliers would push half-precision activations below their range.
_SMALLEST = -10
_OVERSAMPLE = 10
_POWER_ITERATIONS = 4


def balance_multiplier(channels: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """m, [K], powers of two up to 1.

    Args:
        channels: max|x| of each input channel over the calibration, [K].
        weight: [N, K].
    """
    size = weight.detach().float().abs().amax(0)
    channels = channels.to(size)
    live = (channels > 0) & (size > 0) & channels.isfinite() & size.isfinite()
    if not live.any():
        return torch.ones_like(size)
    log_s = alpha * channels.log2() - (1 - alpha) * size.log2()
    log_s = torch.where(live, log_s, log_s[live].median())
    return torch.exp2((log_s.min() - log_s).round().clamp(min=_SMALLEST))


def condition_weight(weight: Tensor, before: Tensor | None, after: Tensor | None, *, rotated: bool) -> Tensor:
    """W' of ``weight`` float32 [N, K]; arguments as for `condition_input`."""
    weight = weight if before is None else weight / before
    weight = hadamard(weight) if rotated else weight
    return weight if after is None else weight / after


def release_weight(weight: Tensor, before: Tensor | None, after: Tensor | None, *, rotated: bool) -> Tensor:
    """The inverse of `condition_weight`."""
    weight = weight if after is None else weight * after
    weight = hadamard(weight) if rotated else weight
    return weight if before is None else weight * before


def condition_input(x: Tensor, before: Tensor | None, after: Tensor | None, *, rotated: bool) -> Tensor:
    """x' of ``x`` [..., K], in its dtype.

    Args:
        before: multiplier of each channel, [K]: of the balance, of the rotation's signs, or of both.
        after: another one, after the rotation, where that comes first.
        rotated: whether it is turned in between.
    """
    x = x if before is None else x * before.to(x.dtype)
    x = hadamard(x) if rotated else x
    return x if after is None else x * after.to(x.dtype)


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
    """`torch.svd_lowrank`, which draws from the global generator, with that generator as it was afterwards."""
    devices = [weight.device] if weight.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(weight, rank + _OVERSAMPLE, niter=_POWER_ITERATIONS)
    return u[:, :rank], s[:rank], v[:, :rank]

"""Whether int8 linears are faster than the float ones on this denoiser's shapes and device: measured, not assumed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn

from diffaccel.denoiser import Denoiser, select
from diffaccel.errors import PlanError
from diffaccel.kernels._candidates import choices, may_measure, token_bucket
from diffaccel.kernels.int8_linear import int8_linear, pack
from diffaccel.quantization.section import Quantize

_TYPICAL_TOKENS = 1024
_TEXT_TOKENS = 256
_SHAPES = 3


def worth_it(denoiser: Denoiser, sites: str = Quantize.sites) -> tuple[bool, str]:
    """Whether quantizing ``sites`` speeds this denoiser's linears up, and the measured reason in words.

    Times the shapes that hold most of the work (at most three, a second in all; remembered on disk).
    """
    try:
        linears = [s.module for s in select([denoiser], sites, "layers") if type(s.module) is nn.Linear]
    except PlanError as error:
        return False, str(error)
    if not linears:
        return False, "no plain linear among its sites"
    factor = speedup(linears, typical_tokens(denoiser))
    shape = max(((m.in_features, m.out_features) for m in linears), key=lambda s: s[0] * s[1])
    where = (
        f"on linears up to {shape[0]} x {shape[1]} at {typical_tokens(denoiser)} tokens on {linears[0].weight.device}"
    )
    if factor is None:
        return False, f"int8 has no fast form {where}"
    return factor > 1, f"int8 measures {factor:.2f}x of the float speed {where}"


def speedup(linears: Iterable[nn.Linear], tokens: int) -> float | None:
    """Time of the float linears over that of the int8 ones at ``tokens`` rows; None where nothing can be measured."""
    count = Counter((m.in_features, m.out_features, m.weight.dtype, m.weight.device) for m in linears)
    largest = sorted(count, key=lambda s: count[s] * s[0] * s[1], reverse=True)[:_SHAPES]
    before = after = 0.0
    for shape in largest:
        seconds = _measure(*shape, tokens)
        if seconds is None:
            return None
        before, after = before + count[shape] * seconds[0], after + count[shape] * seconds[1]
    return before / after if after else None


def _measure(K: int, N: int, dtype: torch.dtype, device: torch.device, tokens: int) -> tuple[float, float] | None:
    """Seconds of the float and of the int8 linear at x [tokens, K]."""
    if not may_measure(device):
        return None
    with torch.no_grad():  # the kernel measures on data of its own
        packed = pack(torch.zeros(N, K, dtype=torch.int8, device=device), torch.ones(N, device=device))
        int8_linear(torch.zeros(tokens, K, dtype=dtype, device=device), packed)
    words = {f"M{token_bucket(tokens)}", f"K{K}", f"N{N}", str(dtype), f"A{packed.bits}"}
    choice = next((c for c in reversed(choices("int8_linear")) if words <= set(c.shape.split())), None)
    if choice is None or choice.speedup is None:
        return None
    after = choice.seconds[choice.name]
    return after * choice.speedup, after


def typical_tokens(denoiser: Denoiser) -> int:
    """Rows of the image's linears as far as the config tells: the token grid of the size it was trained at.

    Of a text encoder, those of a long prompt.
    """
    if "vocab_size" in denoiser.config:
        return _TEXT_TOKENS
    size, patch = denoiser.config.get("sample_size"), denoiser.config.get("patch_size", 1)
    if not isinstance(size, int) or not isinstance(patch, int):
        return _TYPICAL_TOKENS
    return min(max((size // patch) ** 2, 64), 4096)

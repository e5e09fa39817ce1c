"""The rows of bench/quantization.py: what is done to the pipeline in each, and which orderings they are to show."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffaccel import Plan, Quantize
from diffaccel.denoiser import Site, find_denoisers, select
from diffaccel.plan import Artefacts
from diffaccel.quantization.allocation import Allocation, allocate, allocate_in_groups, closed_form
from diffaccel.quantization.channels import channels_of
from diffaccel.quantization.eligible import keeps_activations
from diffaccel.quantization.sensitivities import Sensitivities, subset

W4 = Quantize(weights="int4", activations="float", group=64)
W8A8, W4A8 = Quantize(), Quantize(weights="int4", group=64)
STATIC = Quantize(activations="static")
RANK = 16
LEARNT = "W4 groups, learnt rounding"
CHANNEL_GROUPS = 8  # of DGQ
# Of the whole denoiser's float32 bytes; the modulation's weights then count too much to be left as they are.
SMALL_SHARE = 0.20
WIDE_SITES, WIDE_FLOAT = f"{Quantize.sites} modulation", f"{Quantize.float_activations} modulation"

ORDERINGS = (
    ("W4 per channel, naive", "W4 per tensor, naive"),
    ("W4 groups", "W4 per channel"),
    ("W4 groups + balance", "W4 groups, calibrated"),
    ("W4 groups + rotation", "W4 groups, calibrated"),
    (f"W4 groups + rank {RANK}, refined", "W4 groups, calibrated"),
    (f"W4 groups + rotation + rank {RANK}, refined", "W4 groups + rotation"),
    (LEARNT, "W4 groups, calibrated"),
    ("mixed, bytes of rank", f"W4 groups + rank {RANK}"),
    ("W8A8", "W8A8 per tensor, naive"),
    ("W8A8 + balance + rotation", "W8A8"),
    ("W8A8 static + balance", "W8A8 static"),
    ("W8A8 per tensor, channel groups, simulated", "W8A8 per tensor, naive"),
    ("log2 probabilities, first column kept, simulated", "log2 probabilities, simulated"),
)
"""Pairs of rows, the better one first by the papers."""


def rounded(x: Tensor, levels: int, dims: tuple[int, ...]) -> Tensor:
    """``x`` on a grid of 2 * levels + 1 values between its extremes over ``dims``."""
    scale = x.abs().amax(dims, keepdim=True).clamp(min=1e-30) / levels
    return (x / scale).round() * scale


def linears(pipe: object) -> list[Site]:
    """Those that `Quantize` means by default."""
    sites = select(find_denoisers(pipe), Quantize.sites, "layers")
    return [s for s in sites if isinstance(s.module, nn.Linear)]


@contextmanager
def naive(
    pipe: object,
    levels: int,
    *,
    per_channel: bool = False,
    activations: Callable[[Site], Callable[[Tensor], Tensor]] | None = None,
) -> Iterator[None]:
    """Rounded weights (and activations, by what is given for a site) in `linears`."""
    sites = linears(pipe)
    originals = [s.module.weight.data for s in sites]
    hooks = []
    for site in sites:
        weight = site.module.weight
        weight.data = rounded(weight.data, levels, (1,) if per_channel else (0, 1))
        if activations and not keeps_activations(W8A8, site):
            turn = activations(site)
            hooks.append(site.module.register_forward_pre_hook(lambda m, x, turn=turn: (turn(x[0]),)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for site, original in zip(sites, originals, strict=True):
            site.module.weight.data = original


def per_tensor(site: Site) -> Callable[[Tensor], Tensor]:
    """8 bits, one scale."""
    return lambda x: rounded(x, 127, tuple(range(x.ndim)))


def channel_groups(artefacts: Artefacts) -> Callable[[Site], Callable[[Tensor], Tensor]]:
    """8 bits, one scale for each of a few groups of channels of like range (DGQ, arXiv:2501.04304)."""

    def of(site: Site) -> Callable[[Tensor], Tensor]:
        measured = channels_of(artefacts, site)
        assert measured is not None
        groups = measured.squares([(0.0, 1.0)]).argsort().tensor_split(CHANNEL_GROUPS)

        def turn(x: Tensor) -> Tensor:
            y = torch.empty_like(x)
            for group in groups:
                y[..., group] = rounded(x[..., group], 127, tuple(range(x.ndim)))
            return y

        return turn

    return of


@contextmanager
def log2_probabilities(pipe: object, bits: int, *, keep_first: bool) -> Iterator[None]:
    """Attention probabilities as powers of two below their largest (DGQ); self- and cross-attention.

    ``keep_first`` leaves the first column of cross-attention, where a start token may be, as it is.
    """
    original = F.scaled_dot_product_attention

    def attention(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *_: object, **how: object
    ) -> Tensor:
        scores = q @ k.transpose(-1, -2) * (how.get("scale") or q.shape[-1] ** -0.5)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        p = scores.softmax(-1)
        kept = p[..., :1] if keep_first and q.shape[-2] != k.shape[-2] else p[..., :0]
        rest = p[..., kept.shape[-1] :]
        largest = rest.amax((-1, -2), keepdim=True).clamp(min=1e-30)
        code = -(rest / largest).clamp(min=1e-30).log2()
        power = torch.exp2(-code.round().clamp(0, 2**bits - 1))
        return torch.cat([kept, power * largest], -1) @ v

    with mock.patch.object(F, "scaled_dot_product_attention", functools.wraps(original)(attention)):
        yield


def simulated_rows(artefacts: Artefacts) -> dict[str, Callable]:
    """Rounded and put back as floats: their fidelity, but neither the bytes nor the speed."""
    groups = channel_groups(artefacts)
    return {
        "W4 per tensor, naive": lambda pipe: naive(pipe, 7),
        "W4 per channel, naive": lambda pipe: naive(pipe, 7, per_channel=True),
        "W8A8 per tensor, naive": lambda pipe: naive(pipe, 127, activations=per_tensor),
        "W8A8 per tensor, channel groups, simulated": lambda pipe: naive(pipe, 127, activations=groups),
        "log2 probabilities, simulated": lambda pipe: log2_probabilities(pipe, 4, keep_first=False),
        "log2 probabilities, first column kept, simulated": lambda pipe: log2_probabilities(pipe, 4, keep_first=True),
    }


def calibrated_sections() -> list[Quantize]:
    """What has to be measured for the rows."""
    rotated_first = replace(W8A8, balance=0.5, rotate=True, first="rotate")
    return [replace(W8A8, balance=0.5, sites=WIDE_SITES), rotated_first, replace(STATIC, balance=0.5)]


def plan_rows(calibrated: Plan) -> dict[str, Plan]:
    """Every scheme and conditioning by itself."""

    def plan(section: Quantize, **settings: object) -> Plan:
        section = replace(section, **settings)
        return replace(calibrated, quantization=(section,))

    return {
        "W4 per channel": Plan(quantization=replace(W4, group=None)),
        "W4 groups": Plan(quantization=W4),
        "W4 groups, calibrated": plan(W4),
        "W4 groups + balance": plan(W4, balance=0.5),
        "W4 groups + rotation": plan(W4, rotate=True),
        "W4 groups + balance + rotation": plan(W4, balance=0.5, rotate=True),
        "W4 groups + rotation + balance": plan(W4, balance=0.5, rotate=True, first="rotate"),
        f"W4 groups + rank {RANK}": plan(W4, low_rank=RANK),
        f"W4 groups + rank {RANK}, refined": plan(W4, low_rank=RANK, refine=5),
        f"W4 groups + rotation + rank {RANK}, refined": plan(W4, low_rank=RANK, refine=5, rotate=True),
        "W4A8 groups": plan(W4A8),
        "W8A8": Plan(quantization=W8A8),
        "W8A8 + balance": plan(W8A8, balance=0.5),
        "W8A8 + rotation": Plan(quantization=replace(W8A8, rotate=True)),
        "W8A8 + balance + rotation": plan(W8A8, balance=0.5, rotate=True),
        "W8A8 static": plan(STATIC),
        "W8A8 static + balance": plan(STATIC, balance=0.5),
        "W8A16": Plan(quantization=replace(W8A8, activations="float")),
    }


def candidates() -> list[Quantize]:
    """Of the allocations."""
    wide = {"sites": WIDE_SITES, "float_activations": WIDE_FLOAT}
    return [replace(W4A8, **wide), replace(W8A8, **wide)]


def allocations(found: Sensitivities, pipe: object, share: float, bits: float) -> dict[str, Allocation]:
    """``share`` of the bytes of the default sites, ``bits`` on average, and `SMALL_SHARE` of the whole denoiser."""
    usual = subset(found, torch.tensor([role != "modulation" for role in found.roles]))
    whole = sum(p.numel() * 4 for d in find_denoisers(pipe) for p in d.module.parameters())
    elements = float(found.weights.sum()) * 4
    of_sites = (SMALL_SHARE * whole - (whole - elements)) / elements
    rows = {
        "mixed, bytes of rank": allocate(usual, budget=share),
        f"mixed, {bits:g} bits, constant": allocate(usual, budget=bits, kind="bits", constant=True),
        f"mixed, {bits:g} bits, by step": allocate(usual, budget=bits, kind="bits"),
        f"mixed, {bits:g} bits, closed form": closed_form(usual, bits=bits),
        f"W4A8 mixed, {SMALL_SHARE:.2f} of the denoiser": allocate(found, budget=of_sites),
    }
    if not found.text.isnan().all():
        for ratio in (0.8, 1.0, 1.2):
            rows[f"mixed, {bits:g} bits, text apart {ratio:g}"] = allocate_in_groups(usual, bits=bits, ratio=ratio)
    return rows


def orderings(bits: float) -> list[tuple[str, str]]:
    """`ORDERINGS`, and those of allocations."""
    name = f"mixed, {bits:g} bits,"
    decoupled = [(f"{name} text apart {ratio:g}", f"{name} by step") for ratio in (0.8, 1.0, 1.2)]
    return [*ORDERINGS, (f"{name} by step", f"{name} constant"), *decoupled]

"""Presets: plans made from a model's structure and what its device measurably does faster.

A preset never fails on a model: what it would use but cannot, or what would not be faster here, is left out and named.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffaccel.caching.section import StepCache
from diffaccel.denoiser import Denoiser
from diffaccel.exact.section import ExactReuse
from diffaccel.plan import Plan, Section
from diffaccel.quantization.section import Quantize
from diffaccel.quantization.worth import worth_it

PRESETS = ("lossless", "balanced", "fast")

_CACHE = {"balanced": StepCache(threshold=0.07), "fast": StepCache(threshold=0.12)}
"""Measured by bench/step_cache.py. The threshold is relative to a model's own signal, so it holds for any denoiser."""


def preset_plan(name: str, denoisers: Sequence[Denoiser]) -> tuple[Plan, list[str]]:
    """The plan that a preset comes to on these denoisers, and what was left out and why.

    Args:
        name: ``lossless`` (what cannot have changed is not computed again), ``balanced`` (step cache, and int8 linears
            where they measure faster here) or ``fast`` (the same with a wider error budget).
    """
    if name == "lossless":
        return Plan(exact=ExactReuse(), name=name), []
    quantization, notes = _int8_where_faster(denoisers)
    notes.append("sparse attention left out: without calibration it costs more quality than a preset may spend")
    return Plan(quantization=quantization, caching=_CACHE[name], name=name), notes


def _int8_where_faster(denoisers: Sequence[Denoiser]) -> tuple[tuple[Section, ...], list[str]]:
    """W8A8 for those denoisers on whose shapes it measures faster, and why not for the others."""
    sites, notes = [], []
    for denoiser in denoisers:
        faster, reason = worth_it(denoiser)
        if faster:
            sites += [f"{denoiser.component}:{glob}" for glob in Quantize.sites.split()]
        else:
            notes.append(f"int8 linears left out on {denoiser.component}: {reason}")
    return ((Quantize(sites=" ".join(sites)),) if sites else ()), notes

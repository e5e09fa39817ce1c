"""Presets: plans made from a model's structure and what its device measurably does faster."""

from __future__ import annotations

from collections.abc import Sequence

from diffaccel.caching.section import StepCache
from diffaccel.denoiser import Denoiser
from diffaccel.plan import Plan

PRESETS = ("lossless", "balanced", "fast")

_CACHE = {"balanced": StepCache(threshold=0.06), "fast": StepCache(threshold=0.12)}
"""Measured by bench/step_cache.py. The threshold is relative to a model's own signal, so it holds for any denoiser."""


def preset_plan(name: str, denoisers: Sequence[Denoiser]) -> tuple[Plan, list[str]]:
    """The plan that a preset comes to on these denoisers, and what was left out and why."""
    if name == "lossless":
        return Plan(name=name), [
            "lossless: no technique of this version speeds up a denoiser without changing its output"
        ]
    return Plan(caching=_CACHE[name], name=name), []

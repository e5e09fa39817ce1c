"""Presets: plans made from a model's structure and what its device measurably does faster."""

from __future__ import annotations

from collections.abc import Sequence

from diffaccel.caching.section import StepCache
from diffaccel.denoiser import Denoiser
from diffaccel.plan import Plan

PRESETS = ("lossless", "balanced", "fast")


def preset_plan(name: str, denoisers: Sequence[Denoiser]) -> tuple[Plan, list[str]]:
    """The plan that a preset comes to on these denoisers, and what was left out and why."""
    if name == "lossless":
        return Plan(name=name), ["lossless: no technique of this version speeds up a denoiser without changing its output"]
    threshold = {"balanced": 0.05, "fast": 0.12}[name]
    return Plan(caching=StepCache(threshold=threshold), name=name), []

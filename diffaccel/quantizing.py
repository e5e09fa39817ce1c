"""`quantize`: small weights for a live pipeline or a bare network in one call, calibrated where that is asked for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from diffaccel.attach import Accelerated, accelerate
from diffaccel.calibration import calibrate
from diffaccel.errors import PlanError, did_you_mean
from diffaccel.plan import Plan
from diffaccel.quantization.section import Quantize


def quantize(
    model: Any,
    *sections: Quantize,
    prompts: str | Mapping[str, Any] | Iterable[Any] | None = None,
    call: Mapping[str, Any] | None = None,
    folder: str | os.PathLike[str] | None = None,
    bake: bool = False,
    originals: str = "cpu",
    **settings: Any,
) -> Accelerated:
    """Quantize a pipeline or a bare network that is in memory.

    >>> diffaccel.quantize(pipe, weights="int4", group=64, bake=True)                    # doctest: +SKIP
    >>> diffaccel.quantize(pipe, balance=0.5, prompts=["a red circle"], call={"num_inference_steps": 20})
    ...                                                                                 # doctest: +SKIP

    Args:
        model: a diffusers pipeline, a denoiser or a text encoder.
        sections: what goes where; of several that match a site at a step, the last one wins. None: one section of
            ``settings``.
        prompts, call, folder: as `diffaccel.calibrate` takes them (``call``: its further arguments), where a section
            needs what it measures (``balance``, ``protect``, static activations).
        bake: let the originals go at once, so that ``save_pretrained`` saves the small weights; nothing can be removed
            then.
        originals: where the originals wait otherwise, see `diffaccel.accelerate`.
        settings: of a single `Quantize`, W8A8 by default.

    Returns:
        The handle of `diffaccel.accelerate`; its ``plan`` holds what was measured.

    Raises:
        PlanError: settings that `Quantize` refuses or does not have, sections and settings together, sections that need
            prompts without any, or what `diffaccel.calibrate` and `diffaccel.accelerate` refuse. Nothing was changed.
        ModelError: no denoiser in ``model``.
    """
    if sections and settings:
        raise PlanError(f"quantize got sections and also {', '.join(settings)}: say those in Quantize(...) as well")
    known = {field.name for field in fields(Quantize)}
    for name in settings:
        if name not in known:
            raise PlanError(f"quantize has no setting {name!r}{did_you_mean(name, known)}")
    plan = Plan(quantization=sections or (Quantize(**settings),))
    if prompts is not None:
        plan = calibrate(model, plan, prompts=prompts, folder=folder, **(call or {}))
    elif any(section.needs_calibration for section in plan.quantization if isinstance(section, Quantize)):
        raise PlanError(
            "balance, protect and static activations need a few prompts to measure with: quantize(..., prompts=[...])"
        )
    elif call or folder:
        raise PlanError("quantize takes call and folder for calibration, which needs prompts=[...]")
    accelerated = accelerate(model, plan, originals=originals)
    if bake:
        accelerated.bake()
    return accelerated

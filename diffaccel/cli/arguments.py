"""Arguments that several commands share: models, plans, prompts, sizes."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffaccel.cli.console import note
from diffaccel.errors import InputError, PlanError, did_you_mean
from diffaccel.pipelines.prompts import read_prompts

if TYPE_CHECKING:
    from diffaccel.plan import Plan

Model = Annotated[
    str, typer.Option("--model", "-m", help="Hub id, local folder, [bold]bundled:image[/] or [bold]bundled:video[/].")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: CUDA where there is one.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; default: bfloat16 on CUDA, else float32.")
]
Measures = Annotated[
    list[str] | None,
    typer.Option(
        "--measure",
        help="Beside PSNR and SSIM: adherence, clip=ViT-B-32:openai, lpips, flicker, ...; of all samples together: "
        "fid, cmmd, fvd=torchscript:FILE, inception_score=inception:FILE. Several times.",
    ),
]
Against = Annotated[
    Path | None,
    typer.Option(help="Folder of pictures (or clips) that fid, cmmd and fvd compare with; default: the reference's."),
]
NoiseFloor = Annotated[
    bool,
    typer.Option(
        "--noise-floor", help="Add the reference with another thread count: what differs when only rounding does."
    ),
]
Lossless = Annotated[
    bool, typer.Option("--lossless", help="Keep every clip as frames without losses, .npy, beside the mp4.")
]
Details = Annotated[
    bool, typer.Option("--details", help="Print where the time goes, operations and energy too; the report has them.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs to stdout.")]


def read_plan(text: str) -> Plan | str | None:
    """A preset's name as it is, a saved plan loaded, so that a damaged one is refused early; ``none`` is None.

    Raises:
        PlanError: neither.
    """
    if text in ("none", ""):
        return None
    if "/" in text or os.sep in text or Path(text).exists():
        import diffaccel  # every section type must be known before a plan file is read

        return diffaccel.Plan.load(Path(text).expanduser())
    from diffaccel.presets import PRESETS

    if text not in PRESETS:
        raise PlanError(
            f"no preset {text!r}{did_you_mean(text, [*PRESETS, 'none'])}; write ./{text} for a saved plan's folder"
        )
    return text


def plan_identity(plan: Plan | str | None) -> str:
    """A preset's name, or a digest of what a plan says: outputs of one plan are not taken for those of another."""
    if plan is None or isinstance(plan, str):
        return plan or "none"
    digest = hashlib.sha256(json.dumps(plan.to_dict()["plan"], sort_keys=True).encode())
    if plan.artefacts:
        from safetensors.torch import save

        digest.update(save({name: t.contiguous() for name, t in plan.artefacts.items()}))
    return digest.hexdigest()[:16]


def chosen_prompts(model: str, file: Path | None, count: int, *, tuning: bool = False) -> list[str]:
    """The first ``count`` prompts of ``file``, or of the set that belongs to a bundled model.

    Args:
        tuning: whether settings are chosen by them; the bundled models have others to report on.

    Raises:
        InputError: neither is there, or the file cannot be read.
    """
    from diffaccel.pipelines.bundled import BUNDLED

    if file is None and model not in BUNDLED:
        raise InputError(f"no prompts for {model}; give --prompts FILE with one per line")
    if file is not None:
        texts = read_prompts(file)
    else:
        texts = BUNDLED[model].tuning_prompts() if tuning else BUNDLED[model].prompts()
    if count > len(texts):
        note(f"{len(texts)} prompts, fewer than the {count} asked for")
    return texts[:count]


def call_arguments(steps: int | None, size: str | None, frames: int | None) -> dict[str, Any]:
    """What these options mean as arguments of a pipeline's call.

    Raises:
        InputError: a size that is none.
    """
    wh = read_size(size)
    calls = {"num_inference_steps": steps, "num_frames": frames}
    calls |= {"width": wh[0], "height": wh[1]} if wh else {}
    return {name: value for name, value in calls.items() if value is not None}


def read_size(text: str | None) -> tuple[int, int] | None:
    """``512`` or ``832x480`` (width x height).

    Raises:
        InputError: anything else.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:[x×](\d+))?", text)
    if not match or int(match.group(1)) < 1 or int(match.group(2) or 1) < 1:
        raise InputError(f"--size must be one side or WIDTHxHEIGHT in pixels, such as 512 or 832x480, got {text!r}")
    return int(match.group(1)), int(match.group(2) or match.group(1))

"""Puts trained parts together: folders that plain ``from_pretrained`` and open_clip load, fp16, with a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DiffusionPipeline,
    PixArtSigmaPipeline,
    StableDiffusionPipeline,
    WanPipeline,
)

from diffaccel.assets.make import models
from diffaccel.assets.make.loop import write_record, write_text

ASSETS = Path(__file__).resolve().parent.parent
RECORDS = Path(__file__).resolve().parent / "records"
NAMES = {"image": "shapes-image", "video": "shapes-video", "unet": "shapes-unet"}
EVALUATOR = "shapes-clip"
# The calls that the measurement makes and a user should make.
CALLS: dict[str, dict[str, Any]] = {
    "image": dict(
        num_inference_steps=20,
        guidance_scale=4.0,
        height=256,
        width=256,
        max_sequence_length=32,
        use_resolution_binning=False,
        clean_caption=False,
    ),
    "video": dict(
        num_inference_steps=20, guidance_scale=4.0, height=96, width=96, num_frames=13, max_sequence_length=32
    ),
    "unet": dict(num_inference_steps=20, guidance_scale=4.0, height=256, width=256),
}
WHAT = {
    "image": "PixArtSigmaPipeline: a transformer over 256 tokens makes pictures of 256 x 256 pixels",
    "video": "WanPipeline: a transformer with full 3D attention over 1,008 tokens makes 13 frames of 96 x 96 pixels",
    "unet": "StableDiffusionPipeline: a UNet with v-prediction makes pictures of 256 x 256 pixels",
}


def pipeline(work: Path, kind: str) -> DiffusionPipeline:
    """The pipeline of ``kind`` from the results of the stages in ``work``, float32."""
    result = work / f"denoiser-{kind}" / "result"
    vae_class = AutoencoderKLWan if kind == "video" else AutoencoderKL
    parts = dict(
        vae=vae_class.from_pretrained(work / f"vae-{'video' if kind == 'video' else 'image'}" / "result"),
        text_encoder=type(models.text_encoder(kind)).from_pretrained(result / "encoder", dtype=torch.float32),
        tokenizer=models.tokenizer(models.CLIP_LENGTH if kind == "unet" else 512),
        scheduler=models.scheduler(kind),
    )
    denoiser = type(models.denoiser(kind)).from_pretrained(result / "denoiser")
    if kind == "unet":
        # without a checker of content: there is nothing to find in coloured shapes
        none = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        return StableDiffusionPipeline(unet=denoiser, **parts, **none)
    return (PixArtSigmaPipeline if kind == "image" else WanPipeline)(transformer=denoiser, **parts)


def assemble(work: Path, kind: str, folder: Path) -> None:
    """Saves the pipeline of ``kind`` into ``folder`` in fp16, with a model card."""
    shutil.rmtree(folder, ignore_errors=True)
    pipeline(work, kind).to(dtype=torch.float16).save_pretrained(folder)
    # transformers loads what the config says: an fp16 encoder would end up in an fp32 pipeline
    file = folder / "text_encoder" / "config.json"
    config = json.loads(file.read_text())
    config.pop("torch_dtype", None)
    file.write_text(json.dumps({**config, "dtype": "float32"}, indent=1) + "\n")
    call = ", ".join(f"{k}={v}" for k, v in CALLS[kind].items())
    usage = (
        f'pipe = DiffusionPipeline.from_pretrained("assets/{NAMES[kind]}", dtype=torch.float32)\npipe(prompt, {call})'
    )
    write_text(folder / "README.md", card(work, NAMES[kind], WHAT[kind], usage, stages_of(work, NAMES[kind])))


def stages_of(work: Path, name: str) -> list[str]:
    """The stages that made an asset."""
    if name == EVALUATOR:
        return ["evaluator"]
    kind = next(kind for kind in NAMES if NAMES[kind] == name)
    source = "video" if kind == "video" else "image"
    latents = sorted(p.name for p in work.glob(f"latents-{source}-*"))
    return [f"vae-{source}", f"text-{kind}", *latents, f"denoiser-{kind}"]


def assemble_evaluator(work: Path, folder: Path) -> None:
    """Saves the evaluator into ``folder`` in fp16, with a model card."""
    import open_clip

    from diffaccel.assets.make.evaluator import save

    shutil.rmtree(folder, ignore_errors=True)
    model, *_ = open_clip.create_model_and_transforms(f"local-dir:{work / 'evaluator' / 'result'}")
    save(model, folder, torch.float16)
    usage = (
        f'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:assets/{EVALUATOR}")\n'
        f'tokenizer = open_clip.get_tokenizer("local-dir:assets/{EVALUATOR}")'
    )
    what = "open_clip model of pictures and captions: CLIP score, features for FID, perceptual distance"
    write_text(folder / "README.md", card(work, EVALUATOR, what, usage, stages_of(work, EVALUATOR)))


def card(work: Path, name: str, what: str, usage: str, needed: Sequence[str]) -> str:
    """A model card in Markdown: what it is, how it is called, what made it, what it cannot do."""
    rows = []
    for stage in needed:
        record = json.loads((work / stage / "done.json").read_text())
        facts = ("steps", "seed", "samples", "parameters", "psnr_mean", "psnr_worst", "accuracy", "retrieval")
        told = ", ".join(f"{key} {_short(record[key])}" for key in facts if key in record)
        rows.append(f"| {stage} | {record['wall_minutes']} | {record['processor_minutes']} | {told} |")
    return "\n".join(
        [
            "---\nlicense: apache-2.0\nlibrary_name: " + ("open_clip" if name == EVALUATOR else "diffusers") + "\n---",
            f"# {name}\n",
            f"{what}. Trained from scratch by the scripts in `assets/make/` on a drawn world of coloured shapes; it "
            "knows nothing else.\n",
            f"```python\n{usage}\n```\n",
            "| stage | wall minutes | processor minutes | facts |\n|---|---|---|---|",
            *rows,
            "",
            "Training data: drawings made on the fly by `assets/make/world.py`; the combinations in "
            "`assets/prompts/heldout.json` were never drawn. Words beyond the world's are unknown to it.",
            "",
        ]
    )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}"


def assemble_all(work: Path) -> bool:
    """Stage: every asset whose training is done into ``work/assembled``; True if that is all of them."""
    out = work / "assembled"
    trained = [kind for kind in NAMES if (work / f"denoiser-{kind}" / "done.json").exists()]
    for kind in trained:
        assemble(work, kind, out / NAMES[kind])
    evaluator = (work / "evaluator" / "done.json").exists()
    if evaluator:
        assemble_evaluator(work, out / EVALUATOR)
    if len(trained) < len(NAMES) or not evaluator:
        return False
    sizes = {p.name: sum(f.stat().st_size for f in p.rglob("*") if f.is_file()) for p in sorted(out.iterdir())}
    (work / "assemble").mkdir(exist_ok=True)
    write_record(work / "assemble", "assemble", 0.0, 0.0, {"megabytes": {k: v / 1e6 for k, v in sizes.items()}})
    return True


def install_all(work: Path) -> None:
    """Replaces the folders in ``assets/`` by those that are assembled."""
    for folder in sorted((work / "assembled").iterdir()):
        target = ASSETS / folder.name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder, target)
        print(f"installed {target}")
        RECORDS.mkdir(exist_ok=True)
        for stage in stages_of(work, folder.name):  # how long each took, with what, and its learning curve
            for source, kept in (("done.json", f"{stage}.json"), ("curve.csv", f"{stage}.csv")):
                if (work / stage / "done.json").exists() and (work / stage / source).exists():
                    shutil.copyfile(work / stage / source, RECORDS / kept)

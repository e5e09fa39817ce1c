"""Goes on from what is installed: where checkpoints are gone, the assets themselves are where a longer training starts.

Weights in fp16 lose nothing that matters; the optimisers begin anew, so a training goes on only where a phase of its
recipe begins.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from diffaccel.assets.make.assemble import ASSETS, NAMES, RECORDS
from diffaccel.assets.make.denoise import DenoiserTraining
from diffaccel.assets.make.loop import BEFORE


def restore(work: Path) -> None:
    """Puts VAEs and text encoders of installed pipelines into ``work`` as results of their stages, where missing."""
    for kind, name in NAMES.items():
        asset = ASSETS / name
        parts = {
            f"vae-{'video' if kind == 'video' else 'image'}": ("vae", ""),
            f"text-{kind}": ("text_encoder", "encoder"),
        }
        for stage, (source, target) in parts.items():
            record, folder = RECORDS / f"{stage}.json", work / stage
            if not record.exists() or (folder / "done.json").exists() or (folder / "checkpoint.pt").exists():
                continue
            shutil.copytree(asset / source, folder / "result" / target, dirs_exist_ok=True)
            if stage.startswith("text-"):
                shutil.copytree(asset / "tokenizer", folder / "result" / "tokenizer", dirs_exist_ok=True)
            shutil.copyfile(record, folder / "done.json")
            print(f"{stage}: taken from {asset}")


def record_before(kind: str, folder: Path) -> None:
    """Puts the record and the learning curve of the installed denoiser where its training goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    for source, target in ((f"denoiser-{kind}.json", BEFORE), (f"denoiser-{kind}.csv", "curve.csv")):
        if (RECORDS / source).exists():
            shutil.copyfile(RECORDS / source, folder / target)


def installed_steps(kind: str, training: DenoiserTraining) -> int:
    """How far the installed denoiser of ``kind`` was trained on the recipe of ``training``; 0 where it was not."""
    record = RECORDS / f"denoiser-{kind}.json"
    if not record.exists():
        return 0
    facts = json.loads(record.read_text())
    boundaries, total = {}, 0
    for number, phase in enumerate(training.phases, 1):
        total += phase.steps
        boundaries[total] = [repr(p) for p in training.phases[:number]]
    same = boundaries.get(facts["steps"]) == facts["phases"]
    return facts["steps"] if same and facts["steps"] < training.steps else 0

"""What the assembled pipelines can do on prompts of unseen combinations, and whether measuring them tells plans apart.

For each pipeline: accuracies with 95 % intervals at default settings; PSNR between the default and twice the steps; and
rows that must come out worse: half the steps, weights of 4 bits with one scale per tensor, captions of other prompts,
added noise. Each with the checker's verdict, the CLIP score, CMMD to drawings and, with enough prompts, the Frechet
distance to them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn

from diffaccel.assets.make import world
from diffaccel.assets.make.assemble import CALLS, EVALUATOR, NAMES
from diffaccel.assets.make.evaluator import FEATURES
from diffaccel.assets.make.heldout import PROMPTS
from diffaccel.assets.make.loop import write_record, write_text
from diffaccel.eval.checker import check_image, check_video
from diffaccel.eval.measures import MEASURES, score
from diffaccel.eval.metrics.clip import load_clip
from diffaccel.eval.metrics.clip_score import clip_score
from diffaccel.eval.metrics.cmmd import cmmd
from diffaccel.eval.metrics.features import image_features
from diffaccel.eval.metrics.frechet import frechet
from diffaccel.eval.metrics.intervals import mean_interval, wilson
from diffaccel.eval.metrics.psnr import PSNR_CAP, psnr
from diffaccel.eval.scenes import BACKGROUNDS, SIZES, TEXTURES, Scene, caption, parse

BATCH = 4
PAIRED = 64  # prompts of the rows that generate anew beside the default
NOISE = 0.1  # standard deviation of the noise row, of values in [0, 1]
GENERATED = ("twice", "half", "w4")
CORE = ("color", "shape", "place", "relation", "motion")


class Evaluator:
    """Features and CLIP scores by the assembled open_clip model."""

    def __init__(self, folder: Path) -> None:
        self.clip = load_clip(f"local-dir:{folder}")

    def features(self, sample: np.ndarray) -> list[float]:
        """Of an image [H, W, 3], or the mean over three frames of a clip."""
        return image_features(self.clip, [_thinned(sample)])[0].tolist()

    def score(self, sample: np.ndarray, prompt: str) -> float:
        """CLIP score of the sample for the prompt without its motion, which the evaluator does not know."""
        still = caption(replace(parse(prompt), motion=None))
        return float(clip_score(self.clip, [_thinned(sample)], [still]))


def _thinned(sample: np.ndarray) -> np.ndarray:
    return sample if sample.ndim == 3 else sample[np.linspace(0, len(sample) - 1, 3).astype(int)]


def four_bits(model: nn.Module) -> None:
    """Rounds the weights of all linears inside repeated blocks to 4 bits with one scale a tensor."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "blocks." in name:
            weight = module.weight.data
            scale = weight.abs().max() / 7
            module.weight.data = (weight / scale).round().clamp(-8, 7) * scale


class Measurement:
    """One pipeline's records, one line per (row, prompt), appended as they are made: an interrupted run goes on."""

    def __init__(self, work: Path, kind: str, count: int) -> None:
        self.kind, self.folder = kind, work / "measure"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.assembled = work / "assembled"
        lines = (PROMPTS / f"heldout_{'video' if kind == 'video' else 'image'}.txt").read_text().splitlines()
        self.prompts = lines[:count]
        self.file = self.folder / f"{kind}.jsonl"
        self.records: dict[tuple[str, str], dict[str, Any]] = {}
        if self.file.exists():
            for line in self.file.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:  # the process was killed while it wrote this last line
                    continue
                self.records[row["row"], row["prompt"]] = row

    def run(self, evaluate: Evaluator, seconds: float) -> bool:
        """Generates and judges what is missing; True when nothing is."""
        start = time.monotonic()
        paired = self.prompts[:: max(1, len(self.prompts) // PAIRED)]
        for row in ("default", *GENERATED):
            wanted = [p for p in (self.prompts if row == "default" else paired) if (row, p) not in self.records]
            if not wanted:
                continue
            pipe: Any = DiffusionPipeline.from_pretrained(self.assembled / NAMES[self.kind], dtype=torch.float32)
            pipe.set_progress_bar_config(disable=True)
            if row == "w4":
                four_bits(pipe.unet if self.kind == "unet" else pipe.transformer)
            for first in range(0, len(wanted), BATCH):
                if time.monotonic() - start > seconds:
                    return False
                some = wanted[first : first + BATCH]
                marks = time.monotonic()
                for prompt, sample in zip(some, self.generate(pipe, row, some), strict=True):
                    self.judge(row, prompt, sample, evaluate)
                print(f"measure {self.kind} {row}: {len(some)} in {time.monotonic() - marks:.1f} s", flush=True)
        return True

    def generate(self, pipe: Any, row: str, prompts: Sequence[str]) -> list[np.ndarray]:
        """Samples [..., 3] in [0, 1]; the seed belongs to the prompt, so rows are comparable."""
        call = dict(CALLS[self.kind])
        factor = {"twice": 2.0, "half": 0.5}.get(row, 1.0)
        call["num_inference_steps"] = round(call["num_inference_steps"] * factor)
        seeds = [torch.Generator().manual_seed(self.prompts.index(prompt)) for prompt in prompts]
        out = pipe(prompt=list(prompts), generator=seeds, output_type="np", **call)
        return list(np.asarray(out.frames if self.kind == "video" else out.images, np.float32))

    def judge(self, row: str, prompt: str, sample: np.ndarray, evaluate: Evaluator) -> None:
        """Records ``sample``; from a default one also the rows that need no generation."""
        number = self.prompts.index(prompt)
        kept = self.folder / "default" / f"{self.kind}-{number:04d}.npy"
        facts: dict[str, Any] = {}
        if row == "default":
            kept.parent.mkdir(exist_ok=True)
            np.save(kept, sample.astype(np.float16))
            other = self.prompts[(number + 1) % len(self.prompts)]
            noise = np.random.default_rng(number).normal(0, NOISE, sample.shape)
            self.record("wrong", other, sample, evaluate, prompt=prompt)
            self.record("noise", prompt, np.clip(sample + noise, 0, 1).astype(np.float32), evaluate, prompt=prompt)
        else:
            reference = np.load(kept).astype(np.float32)
            facts["psnr"] = float(psnr([sample], [reference]).clamp(max=PSNR_CAP))
        self.record(row, prompt, sample, evaluate, prompt=prompt, **facts)

    def record(self, row: str, asked: str, sample: np.ndarray, evaluate: Evaluator, **facts: Any) -> None:
        features, fit = [round(x, 5) for x in evaluate.features(sample)], evaluate.score(sample, asked)
        verdict = (check_video if self.kind == "video" else check_image)(sample, asked)
        judged = {"asked": asked, "clip": fit, "verdict": verdict, "features": features}
        entry = {"row": row, **facts, **judged}
        with self.file.open("a") as stream:
            stream.write(json.dumps(entry) + "\n")
        self.records[row, facts["prompt"]] = entry

    def drawings(self, evaluate: Evaluator) -> np.ndarray:
        """Features [N, D] of drawings of the same captions, four each: what the samples should be distributed as."""
        rng = np.random.default_rng(1)
        features = []
        for prompt in self.prompts * 4:
            scene = _filled(parse(prompt), rng)
            if self.kind == "video":
                drawn = world.draw_clip(scene, world.VIDEO_SIZE, rng)
            else:
                drawn = world.draw_image(scene, world.IMAGE_SIZE, rng)
            features.append(evaluate.features(drawn))
        return np.array(features)

    def summary(self, evaluate: Evaluator) -> dict[str, Any]:
        """Accuracies with intervals by row and objects, PSNR to default, CLIP score, distances to drawings."""
        truth = self.drawings(evaluate)
        out: dict[str, Any] = {}
        for row in ("default", *GENERATED, "wrong", "noise"):
            records = [entry for (name, _), entry in self.records.items() if name == row]
            facts: dict[str, Any] = {"prompts": len(records)}
            for objects in (1, 2):
                chosen = [e["verdict"] for e in records if len(parse(e["asked"]).things) == objects]
                if chosen:
                    facts[f"objects_{objects}"] = _shares(chosen)
            facts["clip"], *facts["clip_interval"], _ = mean_interval([entry["clip"] for entry in records])
            features = np.array([entry["features"] for entry in records])
            if len(records) > 1:
                facts["cmmd"] = cmmd(features, truth, unbiased=True)
            if len(records) > FEATURES:
                facts["frechet"] = frechet(features, truth).value
            fidelity = [entry["psnr"] for entry in records if "psnr" in entry]
            if fidelity:
                whole = score(MEASURES["psnr"], fidelity, range(len(fidelity)))
                facts["psnr_mean"], facts["psnr_decile"] = whole.mean, whole.worst_decile
            out[row] = facts
        return out


def _filled(scene: Scene, rng: np.random.Generator) -> Scene:
    """``scene`` with what its caption leaves open drawn at random."""
    moving = scene.motion in ("growing", "shrinking")
    things = tuple(t if t.size or moving else replace(t, size=str(rng.choice(list(SIZES)))) for t in scene.things)
    ground = scene.background or str(rng.choice(list(BACKGROUNDS)))
    return replace(scene, things=things, texture=scene.texture or str(rng.choice(TEXTURES)), background=ground)


def _shares(verdicts: Sequence[dict[str, bool]]) -> dict[str, Any]:
    """Per attribute, and for all that a bar asks for together (``core``): right, count, share, interval."""
    out = {}
    judged = [{**v, "core": all(v[name] for name in CORE if name in v)} for v in verdicts]
    for name in dict.fromkeys(key for verdict in judged for key in verdict):
        asked = [verdict[name] for verdict in judged if name in verdict]
        share, low, high, _ = wilson(sum(asked), len(asked))
        out[name] = {"right": sum(asked), "of": len(asked), "share": share, "interval": [low, high]}
    return out


def measure_all(work: Path, counts: tuple[int, int], seconds: float) -> bool:
    """Stage: all pipelines that are assembled, for which ``table.md`` shows the numbers; True if that is every one.

    ``done.json`` then holds the numbers.
    """
    start, folder = time.monotonic(), work / "measure"
    evaluate = Evaluator(work / "assembled" / EVALUATOR)
    measured = {}
    kinds = [kind for kind, name in NAMES.items() if (work / "assembled" / name).exists()]
    for kind in kinds:
        measurement = Measurement(work, kind, counts[1] if kind == "video" else counts[0])
        if not measurement.run(evaluate, seconds - (time.monotonic() - start)):
            return False
        measured[kind] = measurement.summary(evaluate)
    write_text(folder / "table.md", table(measured))
    print((folder / "table.md").read_text())
    if len(kinds) < len(NAMES):
        return False
    write_record(folder, "measure", time.monotonic() - start, time.process_time(), {"measured": measured})
    return True


def table(measured: dict[str, Any]) -> str:
    """All rows of all pipelines in Markdown."""
    heads = ["pipeline", "row", "prompts", "one object %", "two objects %", "CLIP", "CMMD", "Frechet"]
    heads.append("PSNR mean / worst decile")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for kind, rows in measured.items():
        for row, facts in rows.items():
            cells = []
            for objects in (1, 2):
                core = facts.get(f"objects_{objects}", {}).get("core")
                span = "{:.0f}-{:.0f}".format(*(100 * x for x in core["interval"])) if core else ""
                cells.append(f"{100 * core['share']:.1f} ({span})" if core else "")
            distances = [f"{facts[name]:.3f}" if name in facts else "" for name in ("cmmd", "frechet")]
            fidelity = f"{facts['psnr_mean']:.1f} / {facts['psnr_decile']:.1f}" if "psnr_mean" in facts else ""
            clip = "{:.1f} ({:.1f} to {:.1f})".format(facts["clip"], *facts["clip_interval"])
            cells = [kind, row, str(facts["prompts"]), *cells, clip, *distances, fidelity]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"

"""What the assembled pipelines can do on prompts of unseen combinations, and whether measuring them tells plans apart.

For each pipeline: accuracies with 95 % intervals at default settings; PSNR between the default and twice the steps; and
rows that must come out worse: half the steps, weights of 4 bits with one scale per tensor, captions of other prompts,
added noise. Each with the checker's verdict, the CLIP score and the Frechet distance to drawings.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from diffusers import DiffusionPipeline
from scipy import linalg
from torch import nn
from torch.nn.functional import interpolate

from diffaccel.assets.make import world
from diffaccel.assets.make.assemble import CALLS, EVALUATOR, NAMES
from diffaccel.assets.make.evaluator import SIZE
from diffaccel.assets.make.heldout import PROMPTS
from diffaccel.assets.make.loop import write_record, write_text
from diffaccel.eval.checker import check_image, check_video
from diffaccel.eval.metrics.psnr import psnr
from diffaccel.eval.scenes import BACKGROUNDS, SIZES, TEXTURES, Scene, caption, parse

BATCH = 4
PAIRED = 64  # prompts of the rows that generate anew beside the default
NOISE = 0.1  # standard deviation of the noise row, of values in [0, 1]
GENERATED = ("twice", "half", "w4")
CORE = ("color", "shape", "place", "relation", "motion")


class Evaluator:
    """Features and CLIP scores by the assembled open_clip model."""

    def __init__(self, folder: Path) -> None:
        self.model, *_ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        self.tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        self.model.eval()

    @torch.no_grad()
    def __call__(self, sample: np.ndarray, prompt: str) -> tuple[list[float], float]:
        """Mean feature and CLIP score (100 x cosine) of an image [H, W, 3] or of three frames of a clip."""
        frames = sample[None] if sample.ndim == 3 else sample[np.linspace(0, len(sample) - 1, 3).astype(int)]
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() * 2 - 1
        pixels = interpolate(pixels, SIZE, mode="bicubic", antialias=True)
        scene = parse(prompt)
        words = self.model.encode_text(self.tokenizer([caption(replace(scene, motion=None))]), normalize=True)
        features = self.model.encode_image(pixels)
        score = (nn.functional.normalize(features, dim=-1) @ words.T).mean()
        return features.mean(0).tolist(), float(100 * score)


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share by Wilson's score, in [0, 1]."""
    z, share = 1.96, right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * np.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Distance of two sets of features [N, D] as normal distributions (arXiv:1706.08500, eq. 6)."""
    spread = [np.cov(x, rowvar=False) + 1e-6 * np.eye(x.shape[1]) for x in (a, b)]
    root = linalg.sqrtm(spread[0] @ spread[1]).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(spread[0] + spread[1] - 2 * root))


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
            facts["psnr"] = float(psnr([sample], [reference]).clamp(max=100))
        self.record(row, prompt, sample, evaluate, prompt=prompt, **facts)

    def record(self, row: str, asked: str, sample: np.ndarray, evaluate: Evaluator, **facts: Any) -> None:
        features, score = evaluate(sample, asked)
        verdict = (check_video if self.kind == "video" else check_image)(sample, asked)
        judged = {"asked": asked, "clip": score, "verdict": verdict, "features": [round(x, 5) for x in features]}
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
            features.append(evaluate(drawn.astype(np.float32) / 255, prompt)[0])
        return np.array(features)

    def summary(self, evaluate: Evaluator) -> dict[str, Any]:
        """Accuracies with intervals by row and number of objects, PSNR to default, CLIP score, Frechet distance."""
        truth = self.drawings(evaluate)
        out: dict[str, Any] = {}
        for row in ("default", *GENERATED, "wrong", "noise"):
            records = [entry for (name, _), entry in self.records.items() if name == row]
            facts: dict[str, Any] = {"prompts": len(records)}
            for objects in (1, 2):
                chosen = [e["verdict"] for e in records if len(parse(e["asked"]).things) == objects]
                if chosen:
                    facts[f"objects_{objects}"] = _shares(chosen)
            scores = np.array([entry["clip"] for entry in records])
            facts["clip"] = float(scores.mean())
            facts["clip_interval"] = float(1.96 * scores.std() / np.sqrt(len(scores)))
            if len(records) > 1:
                facts["frechet"] = frechet(np.array([entry["features"] for entry in records]), truth)
            fidelity = [entry["psnr"] for entry in records if "psnr" in entry]
            if fidelity:
                facts["psnr_mean"], facts["psnr_decile"] = float(np.mean(fidelity)), float(np.percentile(fidelity, 10))
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
        low, high = wilson(sum(asked), len(asked))
        out[name] = {"right": sum(asked), "of": len(asked), "share": sum(asked) / len(asked), "interval": [low, high]}
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
    lines = ["| pipeline | row | prompts | one object % | two objects % | CLIP | Frechet | PSNR mean / worst decile |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for kind, rows in measured.items():
        for row, facts in rows.items():
            cells = []
            for objects in (1, 2):
                core = facts.get(f"objects_{objects}", {}).get("core")
                span = "{:.0f}-{:.0f}".format(*(100 * x for x in core["interval"])) if core else ""
                cells.append(f"{100 * core['share']:.1f} ({span})" if core else "")
            distance = f"{facts['frechet']:.3f}" if "frechet" in facts else ""
            fidelity = f"{facts['psnr_mean']:.1f} / {facts['psnr_decile']:.1f}" if "psnr_mean" in facts else ""
            score = f"{facts['clip']:.1f} ± {facts['clip_interval']:.1f}"
            cells = [kind, row, str(facts["prompts"]), *cells, score, distance, fidelity]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"

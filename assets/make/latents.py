"""Scenes and their latents, encoded once before a denoiser trains on them. Resumable shard by shard."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan
from torch import Tensor

from diffaccel.assets.make import world
from diffaccel.assets.make.loop import write_record, write_text
from diffaccel.assets.make.vae import to_tensor
from diffaccel.assets.make.wan_clip import encode_clip, whole_clip
from diffaccel.eval.scenes import Scene, Thing

SHARD = 250  # samples; a shard takes seconds to a minute or two
BATCH = 10


class Latents:
    """Encoded samples in memory: ``scenes`` and ``values`` [N, C, ...] float16, normalised to unit variance."""

    def __init__(self, folder: Path) -> None:
        shards = sorted(folder.glob("*.npy"))
        if not shards:
            raise FileNotFoundError(f"no latents in {folder}: run that stage first")
        self.values = torch.from_numpy(np.concatenate([np.load(shard) for shard in shards]))
        rows = [json.loads(line) for shard in shards for line in shard.with_suffix(".jsonl").read_text().splitlines()]
        self.scenes = [Scene(**{**row, "things": tuple(Thing(**t) for t in row["things"])}) for row in rows]

    def pick(self, rng: np.random.Generator, count: int) -> tuple[Tensor, list[Scene]]:
        index = rng.integers(len(self.scenes), size=count)
        return self.values[index].float(), [self.scenes[i] for i in index]


def encode_shards(
    kind: str, size: int, count: int, vae_folder: Path, folder: Path, seconds: float, bfloat16: bool
) -> bool:
    """Draws and encodes ``count`` samples of ``size`` pixels; True when all are there."""
    folder.mkdir(parents=True, exist_ok=True)
    vae: Any = (
        AutoencoderKL.from_pretrained(vae_folder).to(memory_format=torch.channels_last)
        if kind == "image"
        else whole_clip(AutoencoderKLWan.from_pretrained(vae_folder))
    )
    vae.eval()
    spent = folder / "seconds.json"
    wall, processor = json.loads(spent.read_text()) if spent.exists() else (0.0, 0.0)
    start = time.monotonic()
    for number, first in enumerate(range(0, count, SHARD)):
        file = folder / f"{number:05d}.npy"
        if file.exists():
            continue
        if time.monotonic() - start > seconds:
            return False
        marks = time.monotonic(), time.process_time()
        rng = np.random.default_rng([size, ord(kind[0]), number])
        scenes, values = [], []
        for begin in range(0, min(SHARD, count - first), BATCH):
            some = min(BATCH, min(SHARD, count - first) - begin)
            batch = [world.draw_scene(rng) if kind == "image" else world.draw_moving_scene(rng) for _ in range(some)]
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                values.append(_encode(kind, vae, batch, size, rng).half().numpy())
            scenes += batch
        write_text(file.with_suffix(".jsonl"), "\n".join(json.dumps(asdict(scene)) for scene in scenes) + "\n")
        part = file.with_suffix(".part")
        with part.open("wb") as stream:
            np.save(stream, np.concatenate(values))
        os.replace(part, file)
        wall, processor = wall + time.monotonic() - marks[0], processor + time.process_time() - marks[1]
        write_text(spent, json.dumps([wall, processor]))
        print(f"latents-{kind}-{size}: {min(first + SHARD, count)} of {count}, {wall:.0f} s", flush=True)
    everything = Latents(folder)
    facts = {"samples": len(everything.scenes), "std": float(everything.values.float().std()), "bfloat16": bfloat16}
    write_record(folder, f"latents-{kind}-{size}", wall, processor, facts)
    return True


def _encode(kind: str, vae: Any, scenes: Sequence[Scene], size: int, rng: np.random.Generator) -> Tensor:
    if kind == "image":
        pixels = to_tensor(np.stack([world.draw_image(scene, size, rng) for scene in scenes])).permute(0, 3, 1, 2)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        return (vae.encode(pixels).latent_dist.mode().float() * vae.config.scaling_factor).contiguous()
    pixels = to_tensor(np.stack([world.draw_clip(scene, size, rng) for scene in scenes])).permute(0, 4, 1, 2, 3)
    mean, _ = encode_clip(vae, pixels.contiguous()).float().chunk(2, 1)
    shift, scale = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (mean - shift) / scale

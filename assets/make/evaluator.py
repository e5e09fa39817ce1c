"""The evaluator: a small open_clip model, trained contrastively on drawings and their captions.

It gives the CLIP score, the features of FID and the perceptual distance. It knows still pictures and frames of clips,
not motions.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from diffaccel.assets.make import models, world
from diffaccel.assets.make.loop import Metrics, Rates, Training
from diffaccel.assets.make.vae import to_tensor

SIZE = 128
FEATURES = 128
FRAMES = 0.25  # share of training pictures that are frames of clips
HARDEST = 4.6052  # log 100: the largest logit scale, as in arXiv:2103.00020
CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": FEATURES,
        "vision_cfg": {"image_size": SIZE, "layers": [1, 1, 1, 1], "width": 32, "head_width": 128},
        "text_cfg": {
            "context_length": models.CLIP_LENGTH,
            "vocab_size": models.VOCABULARY,
            "width": 128,
            "heads": 4,
            "layers": 3,
            "hf_tokenizer_name": "here",  # open_clip then takes the tokenizer of the folder
            "tokenizer_kwargs": {"clean": "lower"},
            "pool_type": "eos",  # the default takes the highest token, which is no end mark in this vocabulary
            "eos_id": models.EOS,
            "pad_id": models.PAD,
        },
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic"},
}


def build() -> Any:
    """The untrained model."""
    text = {k: v for k, v in CONFIG["model_cfg"]["text_cfg"].items() if k != "hf_tokenizer_name"}
    return open_clip.CLIP(
        FEATURES, open_clip.CLIPVisionCfg(**CONFIG["model_cfg"]["vision_cfg"]), open_clip.CLIPTextCfg(**text)
    )


class EvaluatorTraining(Training):
    """Symmetric contrastive training (arXiv:2103.00020)."""

    name = "evaluator"
    rates = Rates(muon=4e-3, adam=1.5e-3, clip=5.0)

    def __init__(self, steps: int, batch: int, seed: int = 0) -> None:
        self.steps, self.batch, self.seed = steps, batch, seed
        torch.manual_seed(seed)
        self.model = build()
        self.tokenizer = models.tokenizer(models.CLIP_LENGTH)
        self.modules = {"model": self.model}

    def is_matrix(self, name: str, parameter: nn.Parameter) -> bool:
        inside = "visual.layer" in name or "resblocks" in name
        return inside and parameter.ndim in (2, 4) and min(parameter.shape[:2]) >= 8

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, str]:
        """A picture and a caption of it."""
        if rng.random() >= FRAMES:
            scene = world.draw_scene(rng)
            return world.draw_image(scene, SIZE, rng), world.describe(scene, rng, drop=0.1)
        scene = world.draw_moving_scene(rng)
        clip = world.place(scene, rng)
        frame = int(rng.integers(world.FRAMES))
        now = [
            replace(thing, **{k: getattr(thing, k)[[frame]] for k in ("x", "y", "radius", "angle")}) for thing in clip
        ]
        picture = world.paint(scene, now, world.VIDEO_SIZE, rng)
        large = interpolate(torch.from_numpy(picture).permute(0, 3, 1, 2).float(), SIZE, mode="bicubic")
        still = replace(scene, motion=None)
        return large.clamp(0, 255).byte()[0].permute(1, 2, 0).numpy(), world.describe(still, rng, drop=0.1)

    def features(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        pictures, captions = zip(*(self.draw(rng) for _ in range(count)), strict=True)
        pixels = to_tensor(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        ids = self.tokenizer(
            list(captions), padding="max_length", max_length=models.CLIP_LENGTH, truncation=True, return_tensors="pt"
        ).input_ids
        image = self.model.encode_image(pixels, normalize=True)
        return image.float(), self.model.encode_text(ids, normalize=True).float()

    def loss(self, step: int, rng: np.random.Generator) -> tuple[Tensor, Metrics]:
        image, words = self.features(rng, self.batch)
        logits = self.model.logit_scale.clamp(max=HARDEST).exp() * image @ words.T
        target = torch.arange(len(logits))
        right = (logits.argmax(1) == target).float().mean()
        return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2, {"retrieval": float(right)}

    def finish(self, folder: Path) -> dict[str, Any]:
        self.model.logit_scale.clamp_(max=HARDEST)
        save(self.model, folder)
        rng = np.random.default_rng([self.seed, 2**31])
        image, words = self.features(rng, min(64, 4 * self.batch))
        right = ((image @ words.T).argmax(1) == torch.arange(len(image))).float().mean()
        return {"retrieval": float(right), "among": len(image), "features": FEATURES}


def save(model: Any, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """A folder that ``open_clip.create_model_and_transforms("local-dir:...")`` and ``get_tokenizer`` load."""
    folder.mkdir(parents=True, exist_ok=True)
    models.tokenizer(models.CLIP_LENGTH).save_pretrained(folder)
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    weights = {k: v.contiguous().to(dtype if v.is_floating_point() else v.dtype) for k, v in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors", metadata={"format": "pt"})

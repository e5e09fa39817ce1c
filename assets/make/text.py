"""Pre-training of the text encoders: each tells from its output what the caption says of every object.

A denoiser that starts with such an encoder binds words to objects much sooner than one that starts with a random one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from diffaccel.assets.make import models, world
from diffaccel.assets.make.loop import Metrics, Rates, Training
from diffaccel.eval.scenes import BACKGROUNDS, COLORS, MOTIONS, PLACES, RELATIONS, SHAPES, SIZES, TEXTURES, Scene

OPTIONS = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "size": tuple(SIZES),
    "place": tuple(PLACES),
    "relation": tuple(RELATIONS),
    "texture": TEXTURES,
    "background": tuple(BACKGROUNDS),
    "motion": MOTIONS,
}
IGNORE = -100  # the class that cross_entropy leaves out


def encode(kind: str, encoder: Any, tokenizer: Any, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Embeddings [B, length, width] and mask [B, length] of ``captions``, padded as the pipeline of ``kind`` pads."""
    batch = tokenizer(
        list(captions), padding="max_length", max_length=models.LENGTH[kind], truncation=True, return_tensors="pt"
    )
    # StableDiffusionPipeline attends to padding too
    mask = None if kind == "unet" else batch.attention_mask
    return encoder(batch.input_ids, attention_mask=mask).last_hidden_state, batch.attention_mask


def _answers(scene: Scene, which: int) -> dict[str, str | None]:
    thing = scene.things[which]
    relation = scene.relation if which == 0 else None  # told once
    return {
        **{name: getattr(thing, name) for name in ("shape", "color", "size", "place")},
        **{name: getattr(scene, name) for name in ("texture", "background", "motion")},
        "relation": relation,
    }


class TextTraining(Training):
    """Of one encoder. T5 reads both ways and is asked at each noun, CLIP reads forwards and is asked at the end.

    Args:
        kind: image, video or unet.
        steps: optimiser steps of 96 captions.
    """

    rates = Rates(muon=0.0, adam=2e-3, average=0.98, clip=5.0)

    def __init__(self, kind: str, steps: int, seed: int = 0) -> None:
        self.name, self.kind, self.steps, self.seed = f"text-{kind}", kind, steps, seed
        torch.manual_seed(seed)
        self.tokenizer = models.tokenizer(models.CLIP_LENGTH if kind == "unet" else 512)
        self.nouns = set(self.tokenizer.convert_tokens_to_ids(list(SHAPES)))
        heads = {
            f"{name}{i}": nn.Linear(models.TEXT_WIDTH, len(values))
            for name, values in OPTIONS.items()
            for i in ((0, 1) if kind == "unet" else (0,))
        }
        self.modules = {"encoder": models.text_encoder(kind), "heads": nn.ModuleDict(heads)}

    def loss(self, step: int, rng: np.random.Generator) -> tuple[Tensor, Metrics]:
        draw = world.draw_moving_scene if self.kind == "video" else world.draw_scene
        scenes = [draw(rng) for _ in range(96)]
        captions = [world.describe(scene, rng) for scene in scenes]
        hidden, mask = encode(self.kind, self.modules["encoder"], self.tokenizer, captions)
        rows, columns, asked = self._questions(scenes, captions, mask)
        features = hidden[rows, columns].float()
        total, right, count = torch.zeros(()), 0, 0
        for name, values in OPTIONS.items():
            for which in (0, 1) if self.kind == "unet" else (0,):
                target = torch.tensor(
                    [
                        values.index(answer)
                        if (answer := _answers(s, i)[name]) and (self.kind != "unet" or i == which)
                        else IGNORE
                        for s, i in asked
                    ]
                )
                if (target == IGNORE).all():
                    continue
                logits = self.modules["heads"][f"{name}{which}"](features)  # type: ignore[index]
                total = total + cross_entropy(logits, target, ignore_index=IGNORE)
                right += int((logits.argmax(-1) == target).sum())
                count += int((target != IGNORE).sum())
        return total, {"accuracy": right / count}

    def _questions(
        self, scenes: Sequence[Scene], captions: Sequence[str], mask: Tensor
    ) -> tuple[Tensor, Tensor, list[tuple[Scene, int]]]:
        """Where to ask (row, column) and about what (scene, number of the object)."""
        rows, columns, asked = [], [], []
        for row, (scene, text) in enumerate(zip(scenes, captions, strict=True)):
            ids = self.tokenizer(text).input_ids
            nouns = [i for i, token in enumerate(ids) if token in self.nouns]
            for which in range(len(scene.things)):
                rows.append(row)
                columns.append(int(mask[row].sum()) - 1 if self.kind == "unet" else nouns[which])
                asked.append((scene, which))
        return torch.tensor(rows), torch.tensor(columns), asked

    def finish(self, folder: Path) -> dict[str, Any]:
        self.modules["encoder"].save_pretrained(folder / "encoder")  # type: ignore[operator]
        self.tokenizer.save_pretrained(folder / "tokenizer")
        rng = np.random.default_rng([self.seed, 2**31])
        return {"accuracy": self.loss(0, rng)[1]["accuracy"]}

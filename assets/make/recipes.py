"""How long and on what each stage trains. ``FULL`` makes the assets, ``SMOKE`` runs every line in seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """A part of a training.

    Args:
        steps: optimiser steps.
        size: pixels of a side of what is trained on.
        batch: samples a step.
        shift: of the noise levels, t' = s t / (1 + (s - 1) t); larger = noisier. Larger pictures need more.
        height: factor on the learning rates.
        falls: whether the rates fall to zero by a cosine within the phase.
    """

    steps: int
    size: int
    batch: int
    shift: float = 1.0
    height: float = 1.0
    falls: bool = False


@dataclass(frozen=True)
class VaePhases:
    """``joint`` steps of encoder and decoder, then ``decoder`` steps of the decoder alone on fixed latents."""

    joint: int
    decoder: int
    batch: int
    crop: int
    frames: int = 1


@dataclass(frozen=True)
class Recipe:
    """All numbers that decide how long making the assets takes.

    Args:
        text_steps: of each text encoder's pre-training.
        image_vae, video_vae: see ``VaePhases``.
        latents: number of encoded samples by (kind, size).
        denoisers: phases by name.
        evaluator_steps, evaluator_batch: of the contrastive training.
        measure_prompts: image and video prompts of the measurement.
    """

    text_steps: int
    image_vae: VaePhases
    video_vae: VaePhases
    latents: dict[tuple[str, int], int]
    denoisers: dict[str, tuple[Phase, ...]]
    evaluator_steps: int
    evaluator_batch: int
    measure_prompts: tuple[int, int]


FULL = Recipe(
    text_steps=500,
    image_vae=VaePhases(joint=3500, decoder=2000, batch=8, crop=64),
    video_vae=VaePhases(joint=4500, decoder=2000, batch=3, crop=48, frames=9),
    latents={("image", 128): 8000, ("image", 256): 8000, ("video", 48): 6000, ("video", 96): 4000},
    denoisers={
        "image": (
            Phase(3000, 128, 32, shift=1.5),
            Phase(2400, 256, 16, shift=2.5, height=0.7, falls=True),
            Phase(6000, 256, 16, shift=2.5, height=0.5, falls=True),
        ),
        "video": (
            Phase(4000, 48, 16, shift=2.0),
            Phase(800, 96, 8, shift=4.0, height=0.7, falls=True),
            Phase(2500, 96, 8, shift=4.0, height=0.5, falls=True),
        ),
        "unet": (Phase(2000, 128, 32), Phase(4000, 256, 12, height=0.7, falls=True)),
    },
    evaluator_steps=1200,
    evaluator_batch=64,
    measure_prompts=(256, 128),
)
SMOKE = Recipe(
    text_steps=2,
    image_vae=VaePhases(joint=1, decoder=1, batch=2, crop=32),
    video_vae=VaePhases(joint=1, decoder=1, batch=1, crop=16, frames=5),
    latents={("image", 128): 4, ("image", 256): 2, ("video", 48): 2, ("video", 96): 2},
    denoisers={
        "image": (Phase(1, 128, 2, shift=1.5), Phase(1, 256, 1, shift=2.5, falls=True)),
        "video": (Phase(1, 48, 2, shift=2.0), Phase(1, 96, 1, shift=4.0, falls=True)),
        "unet": (Phase(1, 128, 2), Phase(1, 256, 1, falls=True)),
    },
    evaluator_steps=2,
    evaluator_batch=4,
    measure_prompts=(2, 1),
)

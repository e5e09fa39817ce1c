"""Training of the image and the video VAE on crops around the edges of drawn pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from diffaccel.assets.make import models, world
from diffaccel.assets.make.loop import Metrics, Rates, Training
from diffaccel.assets.make.recipes import VaePhases
from diffaccel.assets.make.wan_clip import decode_clip, encode_clip, whole_clip

FULL_SHARE = 0.1  # of the steps of each phase, at its end, are on whole pictures: statistics of normalisation settle
LATENT_NOISE = 0.25  # most noise on latents while the decoder trains alone, in their standard deviations
KL = 1.5e-3


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 [..., C] to floats in [-1, 1]."""
    return torch.from_numpy(pixels).float() / 127.5 - 1


class VaeTraining(Training):
    """Encoder and decoder together, then the decoder alone on the encoder's fixed, slightly noisy latents.

    Args:
        kind: image or video.
        phases: how long and on what.
    """

    rates = Rates(muon=6e-3, adam=3e-3, momentum=0.9, betas=(0.9, 0.99), clip=1.0, average=0.99)

    def __init__(self, kind: str, phases: VaePhases, seed: int = 0) -> None:
        self.name, self.kind, self.phases, self.seed = f"vae-{kind}", kind, phases, seed
        self.steps = phases.joint + phases.decoder
        torch.manual_seed(seed)
        self.vae: Any = models.image_vae() if kind == "image" else whole_clip(models.video_vae())
        self.modules = {"vae": self.vae}

    def is_matrix(self, name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim >= 4 and min(parameter.shape[:2]) >= 8 and "quant" not in name

    def height(self, step: int) -> float:
        """A cosine over each phase, the second from two thirds of the rates."""
        phase, at, steps = (0, step, self.phases.joint)
        if step >= self.phases.joint:
            phase, at, steps = 1, step - self.phases.joint, self.phases.decoder
        fall = max(0.02, 0.5 + 0.5 * float(np.cos(np.pi * at / steps)))
        return min(1.0, (at + 1) / 50) * fall * (1.0 if phase == 0 else 0.67)

    def loss(self, step: int, rng: np.random.Generator) -> tuple[Tensor, Metrics]:
        alone = step >= self.phases.joint
        at, steps = (step - self.phases.joint, self.phases.decoder) if alone else (step, self.phases.joint)
        pixels = self.batch(rng, whole=at >= steps * (1 - FULL_SHARE))
        if alone:
            with torch.no_grad():
                mean = self.encode(pixels).mode()
                latents = mean + LATENT_NOISE * torch.rand(()) * mean.std() * torch.randn_like(mean)
            divergence = torch.zeros(())
        else:
            posterior = self.encode(pixels)
            latents = posterior.sample()
            divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        error = (self.decode(latents) - pixels).float().abs()
        square = error.square().mean()
        loss = error.mean() + 2 * square + error.pow(1.5).mean() + KL * divergence
        return loss, {"psnr": float(10 * torch.log10(4 / square.detach())), "kl": float(divergence.detach())}

    def encode(self, pixels: Tensor) -> DiagonalGaussianDistribution:
        if self.kind == "image":
            return DiagonalGaussianDistribution(self.vae.quant_conv(self.vae.encoder(pixels)).float())
        return DiagonalGaussianDistribution(encode_clip(self.vae, pixels).float())

    def decode(self, latents: Tensor) -> Tensor:
        if self.kind == "image":
            return self.vae.decoder(self.vae.post_quant_conv(latents))
        return decode_clip(self.vae, latents)

    def batch(self, rng: np.random.Generator, *, whole: bool) -> Tensor:
        """Crops around the edges of objects, where the detail is; or ``whole`` pictures, fewer of them."""
        phases = self.phases
        if self.kind == "image":
            if whole:
                size = 2 * phases.crop
                drawn = [world.draw_image(world.draw_scene(rng), size, rng) for _ in range(max(1, phases.batch // 4))]
            else:
                drawn = [c for _ in range(max(1, phases.batch // 2)) for c in self._image_crops(rng, 2)]
            pixels = to_tensor(np.stack(drawn)).permute(0, 3, 1, 2)
            return pixels.contiguous(memory_format=torch.channels_last)
        if whole:
            size = 2 * phases.crop
            count, frames = max(1, phases.batch // 3), world.FRAMES if phases.joint > 10 else phases.frames
            drawn = [world.draw_clip(world.draw_moving_scene(rng), size, rng, frames) for _ in range(count)]
        else:
            drawn = [self._clip_crop(rng) for _ in range(phases.batch)]
        return to_tensor(np.stack(drawn)).permute(0, 4, 1, 2, 3).contiguous()

    def _image_crops(self, rng: np.random.Generator, count: int) -> list[np.ndarray]:
        scene = world.draw_scene(rng)
        size = 256 if rng.random() < 0.6 else 128
        drawn = world.place(scene, rng)
        picture = world.paint(scene, drawn, size, rng)[0]
        crops = []
        for _ in range(count):
            top, left = _edge(drawn[int(rng.integers(len(drawn)))], 0, size, self.phases.crop, rng)
            crops.append(picture[top : top + self.phases.crop, left : left + self.phases.crop])
        return crops

    def _clip_crop(self, rng: np.random.Generator) -> np.ndarray:
        scene = world.draw_moving_scene(rng)
        drawn = world.place(scene, rng, world.FRAMES)
        size, crop, frames = world.VIDEO_SIZE, self.phases.crop, self.phases.frames
        clip = world.paint(scene, drawn, size, rng)
        start = int(rng.integers(world.FRAMES - frames + 1))
        top, left = _edge(drawn[0], start + int(rng.integers(frames)), size, crop, rng)
        return clip[start : start + frames, top : top + crop, left : left + crop]

    def finish(self, folder: Path) -> dict[str, Any]:
        """Scales latents to unit variance, measures whole pictures of a seed of its own, saves."""
        rng = np.random.default_rng([self.seed, 2**31])
        errors, latents = [], []
        small = self.steps < 10
        for _ in range(1 if small else 24):
            if self.kind == "image":
                pixels = to_tensor(world.draw_image(world.draw_scene(rng), world.IMAGE_SIZE, rng)).permute(2, 0, 1)
            else:
                drawn = world.draw_clip(world.draw_moving_scene(rng), world.VIDEO_SIZE, rng)
                pixels = to_tensor(drawn).permute(3, 0, 1, 2)
            latents.append(self.vae.encode(pixels[None]).latent_dist.mode())
            back = self.vae.decode(latents[-1]).sample.clamp(-1, 1)
            errors.append(float((back - pixels[None]).square().mean()))
        every = torch.cat(latents)
        axes = [0, *range(2, every.ndim)]
        mean, std = every.mean(axes), every.std(axes)
        if self.kind == "image":
            self.vae.register_to_config(scaling_factor=float(1 / every.std()))
        else:
            self.vae.register_to_config(latents_mean=mean.tolist(), latents_std=[float(std.mean())] * len(std))
        self.vae.save_pretrained(folder)
        psnr = 10 * np.log10(4 / np.array(errors))
        return {"psnr_mean": float(psnr.mean()), "psnr_worst": float(psnr.min()), "latent_std": std.tolist()}


def _edge(thing: world.Drawn, frame: int, size: int, crop: int, rng: np.random.Generator) -> tuple[int, int]:
    """Top and left of a crop around a point of the object's outline."""
    angle = rng.uniform(0, 2 * np.pi)
    point = [thing.y[frame] + thing.radius[frame] * np.sin(angle), thing.x[frame] + thing.radius[frame] * np.cos(angle)]
    middle = (np.array(point) + 1) / 2 * size + rng.uniform(-crop / 5, crop / 5, 2)
    top, left = np.clip(middle - crop / 2, 0, size - crop).astype(int)
    return int(top), int(left)

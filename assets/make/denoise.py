"""Training of the three denoisers, each with its text encoder, on precomputed latents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from diffaccel.assets.make import models, text, world
from diffaccel.assets.make.latents import Latents
from diffaccel.assets.make.loop import Metrics, Rates, Training
from diffaccel.assets.make.recipes import Phase
from diffaccel.eval.scenes import Scene

UNTOLD = 0.1  # share of empty captions, for classifier-free guidance
DROP = 0.06  # chance of each attribute to go unsaid
SPREAD = 1.1  # of the normal distribution whose sigmoid is the noise level
# WanPipeline pads embeddings with zeros that are attended to, so the number of pads changes the picture: both the
# default length and a short one are trained.
PADDED = (512, 32)


class DenoiserTraining(Training):
    """What the three have in common: phases, captions, the text encoder trained along at a lower rate.

    Args:
        kind: image, video or unet.
        phases: one after the other, from small to full size.
        text_folder: result of the text encoder's pre-training.
        latents: one set per phase.
    """

    rates = Rates(muon=4e-3, adam=1.5e-3)
    slow = ("encoder",)

    def __init__(
        self, kind: str, phases: Sequence[Phase], text_folder: Path, latents: Sequence[Latents], seed: int = 0
    ) -> None:
        self.name, self.kind, self.seed = f"denoiser-{kind}", kind, seed
        self.phases, self.latents = tuple(phases), tuple(latents)
        self.steps = sum(phase.steps for phase in phases)
        torch.manual_seed(seed)
        self.denoiser: Any = models.denoiser(kind)
        encoder = type(models.text_encoder(kind)).from_pretrained(text_folder / "encoder", dtype=torch.float32)
        self.tokenizer = models.tokenizer(models.CLIP_LENGTH if kind == "unet" else 512)
        self.modules = {"denoiser": self.denoiser, "encoder": encoder}

    def go_on(self, asset: Path, step: int) -> None:
        """Begin at ``step``, where a phase begins, with the weights of an assembled pipeline."""
        part = asset / ("unet" if self.kind == "unet" else "transformer")
        trained = type(self.denoiser).from_pretrained(part, torch_dtype=torch.float32)
        self.denoiser.load_state_dict(trained.state_dict())
        encoder = self.modules["encoder"]
        words = type(encoder).from_pretrained(asset / "text_encoder", dtype=torch.float32)  # type: ignore[attr-defined]
        encoder.load_state_dict(words.state_dict())
        self.begin = step

    def phase(self, step: int) -> tuple[int, int]:
        """Number of the phase that ``step`` belongs to, and the step within it."""
        for number, phase in enumerate(self.phases):
            if step < phase.steps:
                return number, step
            step -= phase.steps
        raise ValueError(f"step {step} is after the last phase")

    def height(self, step: int) -> float:
        number, at = self.phase(step)
        phase = self.phases[number]
        warm = min(1.0, (at + 1) / (60 if number == 0 else 30))
        return phase.height * warm * (0.5 + 0.5 * float(np.cos(np.pi * at / phase.steps)) if phase.falls else 1.0)

    def is_matrix(self, name: str, parameter: nn.Parameter) -> bool:
        """All matrices of the repeated blocks."""
        return name.startswith("denoiser.") and "blocks." in name and parameter.ndim == 2 and "scale_shift" not in name

    def loss(self, step: int, rng: np.random.Generator) -> tuple[Tensor, Metrics]:
        number, _ = self.phase(step)
        phase = self.phases[number]
        clean, scenes = self.latents[number].pick(rng, phase.batch)
        captions = ["" if rng.random() < UNTOLD else self.describe(scene, rng) for scene in scenes]
        words, mask = text.encode(self.kind, self.modules["encoder"], self.tokenizer, captions)
        noise = torch.randn_like(clean)
        return self.error(phase, clean, noise, words, mask, rng), {}

    def describe(self, scene: Scene, rng: np.random.Generator) -> str:
        return world.describe(scene, rng, drop=DROP)

    def error(
        self, phase: Phase, clean: Tensor, noise: Tensor, words: Tensor, mask: Tensor, rng: np.random.Generator
    ) -> Tensor:
        """Flow matching (arXiv:2210.02747; levels as arXiv:2403.03206, sec. 3.1): the model sees
        (1 - t) clean + t noise and predicts noise - clean."""
        level = torch.sigmoid(torch.randn(len(clean)) * SPREAD)
        level = (phase.shift * level / (1 + (phase.shift - 1) * level)).clamp(1e-3, 0.999)
        t = level.view(-1, *[1] * (clean.ndim - 1))
        flow = self.predict((1 - t) * clean + t * noise, level * 1000, words, mask, rng)
        return (flow.float() - (noise - clean)).square().mean()

    def predict(self, noisy: Tensor, time: Tensor, words: Tensor, mask: Tensor, rng: np.random.Generator) -> Tensor:
        """The denoiser's output as its pipeline calls it."""
        raise NotImplementedError

    def finish(self, folder: Path) -> dict[str, Any]:
        self.denoiser.save_pretrained(folder / "denoiser")
        self.modules["encoder"].save_pretrained(folder / "encoder")  # type: ignore[operator]
        return {"phases": [repr(phase) for phase in self.phases]}


class PixArtTraining(DenoiserTraining):
    """The image transformer; small pictures get positions on the grid of the full ones by the class itself."""

    def predict(self, noisy: Tensor, time: Tensor, words: Tensor, mask: Tensor, rng: np.random.Generator) -> Tensor:
        return self.denoiser(
            noisy,
            encoder_hidden_states=words,
            encoder_attention_mask=mask,
            timestep=time,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]


class UNetTraining(DenoiserTraining):
    """The UNet: v-prediction (arXiv:2202.00512) on a schedule that ends in pure noise (arXiv:2305.08891)."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.signal = models.scheduler("unet").alphas_cumprod

    def is_matrix(self, name: str, parameter: nn.Parameter) -> bool:
        """Linears and convolutions inside the blocks."""
        inside = any(part in name for part in ("down_blocks.", "mid_block.", "up_blocks."))
        return name.startswith("denoiser.") and inside and parameter.ndim in (2, 4)

    def error(
        self, phase: Phase, clean: Tensor, noise: Tensor, words: Tensor, mask: Tensor, rng: np.random.Generator
    ) -> Tensor:
        time = torch.from_numpy(rng.integers(len(self.signal), size=len(clean)))
        signal = self.signal[time].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        wanted = signal.sqrt() * noise - (1 - signal).sqrt() * clean
        return (self.predict(noisy, time, words, mask, rng).float() - wanted).square().mean()

    def predict(self, noisy: Tensor, time: Tensor, words: Tensor, mask: Tensor, rng: np.random.Generator) -> Tensor:
        return self.denoiser(noisy, time, encoder_hidden_states=words, return_dict=False)[0]


class _PaddedAttention(WanAttnProcessor):
    """Cross attention to as many zero pads as the pipeline would add, by one pad that weighs as much as all of them."""

    bias: Tensor

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        words = encoder_hidden_states
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(words))
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (query, key, attn.to_v(words)))
        out = scaled_dot_product_attention(q, k, v, attn_mask=self.bias.to(q.dtype))
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def _rotary(rope: Any, scale: Sequence[float]) -> Any:
    """The forward of a rope whose token grid stands for one ``scale`` times finer in height and width."""

    def forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        frames, height, width = (n // p for n, p in zip(hidden_states.shape[2:], self.patch_size, strict=True))
        axes = [torch.arange(frames).double()]
        axes += [(torch.arange(n).double() + 0.5) * s - 0.5 for n, s in zip((height, width), scale, strict=True)]
        tables = [
            get_1d_rotary_pos_embed(
                dim, axis, 10000.0, use_real=True, repeat_interleave_real=True, freqs_dtype=torch.float64
            )
            for dim, axis in zip((self.t_dim, self.h_dim, self.w_dim), axes, strict=True)
        ]
        grid = (frames, height, width)
        out = []
        for part in (0, 1):  # cosines, sines
            spread = [
                table[part].view(*[-1 if i == axis else 1 for i in range(3)], table[part].shape[-1]).expand(*grid, -1)
                for axis, table in enumerate(tables)
            ]
            out.append(torch.cat(spread, -1).reshape(1, frames * height * width, 1, -1).float())
        return out[0], out[1]

    return MethodType(forward, rope)


class WanTraining(DenoiserTraining):
    """The video transformer. Rotary positions tell distances only, so the world puts every path at a random place."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.padding = _PaddedAttention()
        for block in models.blocks(self.denoiser):
            block.attn2.set_processor(self.padding)

    def loss(self, step: int, rng: np.random.Generator) -> tuple[Tensor, Metrics]:
        size = self.phases[self.phase(step)[0]].size
        rope = self.denoiser.rope
        rope.__dict__.pop("forward", None)
        if size != world.VIDEO_SIZE:
            rope.forward = _rotary(rope, [world.VIDEO_SIZE / size] * 2)
        return super().loss(step, rng)

    def predict(self, noisy: Tensor, time: Tensor, words: Tensor, mask: Tensor, rng: np.random.Generator) -> Tensor:
        length = mask.sum(1)
        total = int(rng.choice(PADDED))
        bias = torch.zeros(mask.shape).masked_fill(mask == 0, -1e4)
        # captions are shorter than the mask, so there is always a pad to carry the weight
        bias[torch.arange(len(mask)), length.clamp(max=mask.shape[1] - 1)] = torch.log((total - length).float())
        self.padding.bias = bias[:, None, None, :]
        words = words * mask[..., None]
        return self.denoiser(noisy, timestep=time, encoder_hidden_states=words, return_dict=False)[0]

    def finish(self, folder: Path) -> dict[str, Any]:
        self.denoiser.rope.__dict__.pop("forward", None)
        return super().finish(folder)


TRAININGS = {"image": PixArtTraining, "video": WanTraining, "unet": UNetTraining}

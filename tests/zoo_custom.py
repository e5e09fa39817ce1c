"""A denoiser and a pipeline that no library knows: unusual names, fused projections, attention called directly."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

WIDTH, HEADS, CHANNELS, WORDS = 64, 4, 4, 8


class Mixer(nn.Module):
    """Joint attention over conditions and patches; query, key and value come from one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Linear(WIDTH, 3 * WIDTH)
        self.merge = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.fused(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.merge(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Stage(nn.Module):
    """Attention and a gated feed-forward, both scaled by the noise level."""

    def __init__(self) -> None:
        super().__init__()
        self.pre = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.mixer = Mixer()
        self.widen = nn.Linear(WIDTH, 4 * WIDTH)
        self.narrow = nn.Linear(2 * WIDTH, WIDTH)
        self.levels = nn.Linear(WIDTH, 4 * WIDTH)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        a, b, c, d = self.levels(level)[:, None].chunk(4, -1)
        x = x + b * self.mixer(self.pre(x) * (1 + a))
        value, gate = self.widen(self.pre(x) * (1 + c)).chunk(2, -1)
        return x + d * self.narrow(value * F.silu(gate))


class Curio(nn.Module):
    """A small diffusion transformer. Neither its base class nor its names are those of diffusers."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(CHANNELS, WIDTH, 2, stride=2)
        self.place = nn.Linear(2, WIDTH)
        self.words = nn.Embedding(WORDS, WIDTH)
        self.clock = nn.Sequential(nn.Linear(16, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.stages = nn.ModuleList(Stage() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 4 * CHANNELS)

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    def forward(self, canvas: Tensor, sigma: Tensor, hints: Tensor) -> Tensor:
        """``canvas`` [B, C, H, W], ``sigma`` [B] in [0, 1], ``hints`` [B, L] word ids -> the shape of ``canvas``."""
        x = self.stem(canvas)
        height, width = x.shape[-2:]
        axes = [torch.linspace(-1, 1, n, dtype=x.dtype, device=x.device) for n in (height, width)]
        x = x.flatten(2).transpose(1, 2) + self.place(torch.cartesian_prod(*axes))
        angles = sigma[:, None] * 2.0 ** torch.arange(8, device=sigma.device)
        level = self.clock(torch.cat([angles.sin(), angles.cos()], -1).to(x.dtype))
        x = torch.cat([self.words(hints), x], 1)
        for stage in self.stages:
            x = stage(x, level)
        x = self.head(x[:, hints.shape[1] :])
        return F.pixel_shuffle(x.transpose(1, 2).unflatten(-1, (height, width)), 2)


class CurioPipeline(DiffusionPipeline):
    """Word ids in, latents out; guidance by two calls a step."""

    def __init__(self, painter: Curio, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__()
        self.register_modules(painter=painter, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        hints: list[list[int]],
        size: int = 16,
        num_inference_steps: int = 6,
        guidance_scale: float = 2.0,
        generator: torch.Generator | None = None,
        output_type: str = "latent",
    ) -> SimpleNamespace:
        device = next(self.painter.parameters()).device
        words = torch.tensor(hints, device=device)
        shape = (len(hints), CHANNELS, size, size)
        latents = randn_tensor(shape, generator=generator, device=device, dtype=self.painter.dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for t in self.scheduler.timesteps:
            sigma = (t / 1000).expand(len(hints))
            velocity = self.painter(latents, sigma, words)
            if guidance_scale > 1:
                blank = self.painter(latents, sigma, torch.zeros_like(words))
                velocity = blank + guidance_scale * (velocity - blank)
            latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
        return SimpleNamespace(images=latents)

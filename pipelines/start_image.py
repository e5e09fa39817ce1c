"""Image-to-image for pipelines that have no class of their own for it: start the schedule at a noised image.

SDEdit (arXiv:2108.01073, algorithm 1): encode the image, add the noise of an intermediate step, denoise from there.
Needs nothing from the pipeline but a ``latents`` argument, its VAE and its scheduler. The schedule keeps its full
length, so steps of a plan count as without an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffaccel.errors import InputError
from diffaccel.pipelines.tasks import call_parameters, describe, makes_video


def can_start_from_image(pipe: Any) -> bool:
    """Whether the pipeline takes latents that are plainly those of its image VAE."""
    vae: Any = getattr(pipe, "vae", None)
    scheduler: Any = getattr(pipe, "scheduler", None)
    denoiser = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    if vae is None or denoiser is None or not hasattr(scheduler, "add_noise") or "latents" not in call_parameters(pipe):
        return False
    if getattr(scheduler.config, "use_dynamic_shifting", False):  # by a shift that only the pipeline knows
        return False
    if getattr(vae.config, "latents_mean", None) is not None:  # the pipeline normalises latents in a way of its own
        return False
    channels = getattr(vae.config, "latent_channels", None)
    same = channels is not None and channels == getattr(denoiser.config, "in_channels", None)
    return same and not makes_video(pipe)


@contextmanager
def start_image(
    pipe: Any, images: Tensor, steps: int, strength: float, generators: Sequence[torch.Generator]
) -> Iterator[Tensor]:
    """Within this block the pipeline's schedule begins later; yields the latents to call it with.

    Args:
        pipe: a pipeline that `can_start_from_image`.
        images: ``[B, 3, H, W]`` in [-1, 1].
        steps: length of the full schedule.
        strength: share of the schedule that runs, in (0, 1]; higher = further from the image.
        generators: one per image, for the noise.

    Raises:
        InputError: the pipeline cannot do this.
    """
    if not can_start_from_image(pipe):
        raise InputError(f"{describe(pipe)}; it cannot start from an image")
    scheduler, vae = pipe.scheduler, pipe.vae
    begin = steps - max(1, min(steps, round(steps * strength)))
    plain = type(scheduler).from_config(scheduler.config)  # the pipeline sets the schedule of its own one in the call
    plain.set_timesteps(steps)
    with torch.no_grad():
        clean = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode()
    clean = (clean - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor
    noise = torch.cat([torch.randn(clean[:1].shape, generator=g, dtype=torch.float32) for g in generators])
    at = plain.timesteps[begin : begin + 1].expand(len(clean))
    latents = (
        plain.add_noise(clean.float().cpu(), noise, at) / plain.init_noise_sigma
    )  # the call multiplies by it again
    own = {name: scheduler.__dict__.get(name) for name in ("set_timesteps", "step")}
    set_timesteps, step = scheduler.set_timesteps, scheduler.step

    def set_and_cut(*args: Any, **kwargs: Any) -> Any:
        result = set_timesteps(*args, **kwargs)
        full = scheduler.timesteps
        if hasattr(scheduler, "set_begin_index"):  # the others find their place by the timestep
            scheduler.set_begin_index(begin)
        scheduler.timesteps = full[begin:]  # what the pipeline loops over

        def first_step(*args: Any, **kwargs: Any) -> Any:
            scheduler.timesteps = full  # what the solver counts in
            scheduler.step = step
            return step(*args, **kwargs)

        scheduler.step = first_step
        return result

    scheduler.set_timesteps = set_and_cut
    try:
        yield latents.to(clean.dtype)
    finally:
        for name, before in own.items():
            if before is None:
                scheduler.__dict__.pop(name, None)
            else:
                setattr(scheduler, name, before)

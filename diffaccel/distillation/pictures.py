"""Calls made of pictures with captions: noisy latents of real data, the teacher's answer, and the data's own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffaccel.denoiser import Denoiser, timestep_parameter
from diffaccel.distillation.recording import Steps, second_half
from diffaccel.distillation.states import State, save_run
from diffaccel.errors import InputError
from diffaccel.key import plan_key
from diffaccel.latents import latent_tensors, output_tensors
from diffaccel.recording import run_pipeline

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
_LEVELS = 4  # noise levels of each picture


def captioned(folder: Path) -> list[tuple[Path, str]]:
    """Pictures with their captions: ``name.txt`` beside ``name.png``, or ``metadata.jsonl`` with file_name and text.

    Raises:
        InputError: there are none, or the table cannot be read.
    """
    table = folder / "metadata.jsonl"
    pairs = []
    if table.exists():
        for number, line in enumerate(table.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
                pairs.append((folder / row["file_name"], str(row["text"])))
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{table}, line {number}: needs file_name and text ({error})") from None
    elif folder.is_dir():
        files = sorted(f for f in folder.iterdir() if f.suffix.lower() in _ENDINGS)
        pairs = [(f, f.with_suffix(".txt").read_text().strip()) for f in files if f.with_suffix(".txt").exists()]
    if not pairs:
        raise InputError(
            f"{str(folder)!r} holds no pictures with captions: name.txt beside name.png, or a metadata.jsonl"
        )
    return pairs


def record_pictures(
    pipe: Any,
    denoiser: Denoiser,
    data: Path,
    call: Mapping[str, Any],
    folder: Path,
    *,
    seed: int,
    notify: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[list[Path], str]:
    """A file for each picture of ``data``, with `_LEVELS` noise levels of the pipeline's own schedule.

    The arguments of a call come from the pipeline itself, which is run on the caption for its first step; latents and
    time are put in their place. So it works where latents go to the denoiser as the VAE gives them.

    Raises:
        InputError: no pictures, or a pipeline that does something else to its latents.
    """
    pairs = captioned(data)
    teacher = plan_key([denoiser])["denoisers"]
    told = [teacher, [[f.name, text] for f, text in pairs], seed, sorted(map(str, call.items()))]
    identity = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
    files = [folder / f"picture-{i:05d}.safetensors" for i in range(len(pairs))]
    for i, (file, (picture, text)) in enumerate(zip(files, pairs, strict=True)):
        notify(i, len(files))
        if not file.exists():
            generator = torch.Generator().manual_seed(seed + i)
            with torch.no_grad():
                save_run(file, _states(pipe, denoiser, picture, text, call, generator), identity)
    notify(len(files), len(files))
    return files, identity


def _states(
    pipe: Any, denoiser: Denoiser, picture: Path, text: str, call: Mapping[str, Any], generator: torch.Generator
) -> list[State]:
    steps = Steps(denoiser)
    steps.follow(pipe, lambda: run_pipeline(pipe, {**call, "prompt": text}, seed=0), calls=1)
    arguments = steps.first_arguments
    time = timestep_parameter(denoiser.module)
    (latents,) = latent_tensors(arguments)[:1]
    name = next(n for n, v in arguments.items() if v is latents)
    clean = _encoded(pipe, picture, call)
    if latents.shape[0] == 2 * clean.shape[0]:
        arguments, latents = second_half(arguments, latents.shape[0]), latents.chunk(2)[1]
    if latents.shape != clean.shape or time is None:
        raise InputError(
            f"{type(pipe).__name__} gives its denoiser latents of {tuple(latents.shape)}, the VAE makes "
            f"{tuple(clean.shape)} of {picture.name}; learn from the teacher's own runs instead"
        )
    scheduler = pipe.scheduler
    levels = torch.randperm(len(scheduler.timesteps), generator=generator)[:_LEVELS]
    device = next(denoiser.module.parameters()).device
    states = []
    for level in levels.tolist():
        t = scheduler.timesteps[level].reshape(1)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        noisy, answer = _noised(scheduler, clean, noise, t)
        asked = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in arguments.items()}
        given = asked[time]
        asked |= {name: noisy.to(device, latents.dtype), time: t.to(given).expand_as(given).clone()}
        targets = [o.cpu() for o in output_tensors(denoiser.module(**asked))]
        answers = [torch.cat([answer, targets[0][:, answer.shape[1] :].to(answer)], 1)]  # learned variances: as taught
        states.append(State(asked, targets, time, answers))
    return states


def _encoded(pipe: Any, picture: Path, call: Mapping[str, Any]) -> Tensor:
    """The latents of a picture in the size of the call, as the pipeline scales them."""
    try:
        image = Image.open(picture).convert("RGB")
    except OSError as error:
        raise InputError(f"{picture} cannot be read as a picture ({error})") from None
    size = (call.get("width") or image.width, call.get("height") or image.height)
    pixels = torch.frombuffer(bytearray(image.resize(size).tobytes()), dtype=torch.uint8).view(size[1], size[0], 3)
    vae = pipe.vae
    weight = next(vae.parameters())
    x = (pixels.permute(2, 0, 1)[None].float() / 127.5 - 1).to(weight.device, weight.dtype)
    latents = vae.encode(x).latent_dist.mode()
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return ((latents - shift) * vae.config.scaling_factor).float().cpu()


def _noised(scheduler: Any, clean: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Latents with the noise of time ``t``, and what a perfect network would answer.

    Raises:
        InputError: a scheduler whose prediction is none of the known kinds.
    """
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(clean, t, noise), noise - clean
    if hasattr(scheduler, "_step_index"):
        scheduler._step_index = None  # it is to look for ``t``, not to go on from where the run stopped
    noisy = scheduler.scale_model_input(scheduler.add_noise(clean, noise, t), t[0])
    if kind == "flow_prediction":
        return noisy, noise - clean
    if kind == "epsilon":
        return noisy, noise
    if kind == "v_prediction":
        both = torch.stack([clean.flatten(), noise.flatten()], 1)
        alpha, sigma = torch.linalg.lstsq(both, noisy.flatten()[:, None]).solution.flatten()
        return noisy, alpha * noise - sigma * clean
    raise InputError(f"{type(scheduler).__name__} predicts {kind!r}, which cannot be made from pictures here")

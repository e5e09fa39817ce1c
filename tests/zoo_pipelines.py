"""Tiny complete pipelines around the denoisers of the zoo: ``PIPELINES["flux"].build()``, then ``.call(pipe)``."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
import zoo_parts as parts
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from zoo import ZOO
from zoo_base import initialise, noise
from zoo_custom import Curio, CurioPipeline

PROMPTS = ["a red circle moving right", "a small blue square", "a large green triangle", "yellow on the left"]


@dataclass(frozen=True)
class PipelineSpecimen:
    """A pipeline in miniature.

    request: arguments of every call, other than the number of steps and the generator.
    conditions: arguments for ``batch`` samples, at most four: prompts where there are text encoders, else embeddings.
    """

    name: str
    build: Callable[[], diffusers.DiffusionPipeline]
    request: dict[str, Any] = field(default_factory=dict)
    conditions: Callable[[int], dict[str, Any]] = lambda batch: {"prompt": PROMPTS[:batch]}

    def arguments(self, seed: int = 0, steps: int = 6, batch: int = 1, **overrides: Any) -> dict[str, Any]:
        """The arguments of one call. A generator is among them, so take new arguments for each call."""
        generator = torch.Generator().manual_seed(seed)
        common = {"num_inference_steps": steps, "generator": generator}
        return common | self.conditions(batch) | self.request | overrides

    def call(self, pipe: Any, seed: int = 0, steps: int = 6, batch: int = 1, **overrides: Any) -> Tensor:
        """Run the pipeline and return its images, frames or latents as one float tensor."""
        output = pipe(**self.arguments(seed, steps, batch, **overrides))
        result = output.images if hasattr(output, "images") else output.frames
        return result.float() if isinstance(result, Tensor) else torch.from_numpy(np.stack(result)).float()


def _quiet(pipe: diffusers.DiffusionPipeline) -> diffusers.DiffusionPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _flow(**config: Any) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


# Random weights read as noise predictions would be divided by a tiny number at the first step and blow the latents up;
# read as velocities they stay of order one. Nothing in a denoiser depends on it.
_BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction")


def _ddim() -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(**_BETAS, clip_sample=False)


def _dpm() -> diffusers.DPMSolverMultistepScheduler:
    return diffusers.DPMSolverMultistepScheduler(**_BETAS)


def _cogvideox_ddim() -> diffusers.CogVideoXDDIMScheduler:
    return diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)


def _t5(pipeline: str, denoiser: str, vae: Any, scheduler: Any, **more: Any) -> diffusers.DiffusionPipeline:
    """The common case: one T5 encoder, one transformer."""
    text = dict(tokenizer=parts.tokenizer(), text_encoder=parts.t5())
    cls = getattr(diffusers, pipeline)
    return _quiet(cls(transformer=ZOO[denoiser].build(), vae=vae, scheduler=scheduler, **text, **more))


def _textless(pipeline: str, denoiser: str, vae: Any, scheduler: Any, **more: Any) -> diffusers.DiffusionPipeline:
    """Pipelines whose language model is too special to build here: they are called with embeddings."""
    text = dict(tokenizer=None, text_encoder=None)
    cls = getattr(diffusers, pipeline)
    return _quiet(cls(transformer=ZOO[denoiser].build(), vae=vae, scheduler=scheduler, **text, **more))


def _sd3(scheduler: Any = None) -> diffusers.DiffusionPipeline:
    return _quiet(
        diffusers.StableDiffusion3Pipeline(
            transformer=ZOO["sd3"].build(),
            scheduler=scheduler or _flow(shift=3.0),
            vae=parts.vae(),
            text_encoder=parts.clip(16, 12),
            tokenizer=parts.tokenizer(),
            text_encoder_2=parts.clip(16, 12),
            tokenizer_2=parts.tokenizer(),
            text_encoder_3=parts.t5(),
            tokenizer_3=parts.tokenizer(),
        )
    )


def _flux(pipeline: str = "FluxPipeline") -> diffusers.DiffusionPipeline:
    return _quiet(
        getattr(diffusers, pipeline)(
            transformer=ZOO["flux"].build(),
            scheduler=_flow(use_dynamic_shifting=True, shift=3.0),
            vae=parts.vae(),
            text_encoder=parts.clip(24),
            tokenizer=parts.tokenizer(),
            text_encoder_2=parts.t5(),
            tokenizer_2=parts.tokenizer(),
        )
    )


def _sd15(pipeline: str = "StableDiffusionPipeline", scheduler: Any = None) -> diffusers.DiffusionPipeline:
    return _quiet(
        getattr(diffusers, pipeline)(
            unet=ZOO["unet_sd15"].build(),
            scheduler=scheduler or _ddim(),
            vae=parts.vae(),
            text_encoder=parts.clip(),
            tokenizer=parts.tokenizer(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def _sdxl() -> diffusers.DiffusionPipeline:
    return _quiet(
        diffusers.StableDiffusionXLPipeline(
            unet=ZOO["unet_sdxl"].build(),
            scheduler=diffusers.EulerDiscreteScheduler(**_BETAS, timestep_spacing="leading", steps_offset=1),
            vae=parts.vae(),
            text_encoder=parts.clip(16),
            tokenizer=parts.tokenizer(),
            text_encoder_2=parts.clip(16, 24),
            tokenizer_2=parts.tokenizer(),
            add_watermarker=False,
        )
    )


def _animatediff() -> diffusers.DiffusionPipeline:
    return _quiet(
        diffusers.AnimateDiffPipeline(
            unet=ZOO["animatediff"].build(),
            motion_adapter=None,
            scheduler=_ddim(),
            vae=parts.vae(),
            text_encoder=parts.clip(),
            tokenizer=parts.tokenizer(),
        )
    )


def _svd() -> diffusers.DiffusionPipeline:
    encoder, processor = parts.clip_vision()
    karras = dict(timestep_type="continuous", use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0)
    scheduler = diffusers.EulerDiscreteScheduler(**_BETAS, **karras)
    return _quiet(
        diffusers.StableVideoDiffusionPipeline(
            unet=ZOO["svd"].build(),
            scheduler=scheduler,
            vae=parts.vae_svd(),
            image_encoder=encoder,
            feature_extractor=processor,
        )
    )


def _wan22() -> diffusers.DiffusionPipeline:
    """Two transformers: the first for the noisy part of the schedule, the second, with other weights, for the rest."""
    second = ZOO["wan"].build()
    initialise(second, seed=2)
    flow = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler = diffusers.UniPCMultistepScheduler(**flow)
    return _t5("WanPipeline", "wan", parts.vae_wan(), scheduler, transformer_2=second, boundary_ratio=0.7)


def _dit() -> diffusers.DiffusionPipeline:
    return _quiet(diffusers.DiTPipeline(transformer=ZOO["dit"].build(), vae=parts.vae(), scheduler=_ddim()))


def _curio() -> diffusers.DiffusionPipeline:
    painter = Curio().eval().requires_grad_(False)
    initialise(painter, seed=1)
    return _quiet(CurioPipeline(painter, _flow(shift=2.0)))


def _picture(batch: int) -> Tensor:
    """A smooth image in [0, 1] to start from, [B, 3, 32, 32]."""
    ramp = torch.linspace(0, 1, 32)
    return torch.stack([ramp.expand(32, 32), ramp[:, None].expand(32, 32), ramp.outer(ramp)]).repeat(batch, 1, 1, 1)


def _embeds(batch: int, **named: Tensor) -> dict[str, Any]:
    return {"prompt_embeds": noise(4, 12, 32, seed=1)[:batch]} | {key: value[:batch] for key, value in named.items()}


_LATENT = dict(output_type="latent")
_IMAGE = dict(height=32, width=32)
_VIDEO = dict(height=64, width=96, num_frames=13, **_LATENT)
_MASK = torch.ones(4, 12, dtype=torch.bool)
_NEGATIVE = noise(4, 12, 32, seed=5)

_ENTRIES = [
    PipelineSpecimen("sd3", _sd3, dict(**_IMAGE, **_LATENT, max_sequence_length=16)),
    PipelineSpecimen(
        "sd3_heun",
        lambda: _sd3(diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)),
        dict(**_IMAGE, **_LATENT, max_sequence_length=16),
    ),
    PipelineSpecimen("flux", _flux, dict(**_IMAGE, **_LATENT, max_sequence_length=16)),
    PipelineSpecimen(
        "flux_img2img",
        lambda: _flux("FluxImg2ImgPipeline"),
        dict(**_IMAGE, **_LATENT, strength=0.7, max_sequence_length=16),
        lambda batch: {"prompt": PROMPTS[:batch], "image": _picture(batch)},
    ),
    PipelineSpecimen("sd15", _sd15, dict(**_IMAGE, output_type="np")),
    PipelineSpecimen(
        "sd15_img2img",
        lambda: _sd15("StableDiffusionImg2ImgPipeline"),
        dict(strength=0.6, output_type="np"),
        lambda batch: {"prompt": PROMPTS[:batch], "image": _picture(batch)},
    ),
    PipelineSpecimen(
        "sd15_heun", lambda: _sd15(scheduler=diffusers.HeunDiscreteScheduler(**_BETAS)), dict(**_IMAGE, **_LATENT)
    ),
    PipelineSpecimen("sdxl", _sdxl, dict(**_IMAGE, **_LATENT)),
    PipelineSpecimen(
        "pixart_sigma",
        lambda: _t5("PixArtSigmaPipeline", "pixart_sigma", parts.vae(), _dpm()),
        dict(**_IMAGE, **_LATENT, use_resolution_binning=False, clean_caption=False, max_sequence_length=16),
    ),
    PipelineSpecimen(
        "auraflow",
        lambda: _t5("AuraFlowPipeline", "auraflow", parts.vae(), _flow(shift=1.73)),
        dict(**_IMAGE, **_LATENT, max_sequence_length=16),
    ),
    PipelineSpecimen(
        "chroma",
        lambda: _t5("ChromaPipeline", "chroma", parts.vae(), _flow(use_beta_sigmas=False)),
        dict(**_IMAGE, **_LATENT, max_sequence_length=16),
    ),
    PipelineSpecimen("dit", _dit, dict(output_type="np"), lambda batch: {"class_labels": list(range(3, 3 + batch))}),
    PipelineSpecimen(
        "qwen_image",
        lambda: _textless(
            "QwenImagePipeline",
            "qwen_image",
            parts.vae_wan(diffusers.AutoencoderKLQwenImage),
            _flow(use_dynamic_shifting=True),
        ),
        dict(height=128, width=128, true_cfg_scale=3.0, **_LATENT),
        lambda batch: _embeds(
            batch,
            prompt_embeds_mask=_MASK,
            negative_prompt_embeds=_NEGATIVE,
            negative_prompt_embeds_mask=_MASK,
        ),
    ),
    PipelineSpecimen(
        "sana",
        lambda: _textless("SanaPipeline", "sana", parts.vae_sana(), _flow(shift=3.0)),
        dict(**_IMAGE, **_LATENT, use_resolution_binning=False, negative_prompt=None),
        lambda batch: _embeds(
            batch,
            prompt_attention_mask=_MASK,
            negative_prompt_embeds=_NEGATIVE,
            negative_prompt_attention_mask=_MASK,
        ),
    ),
    # Latents and embeddings travel as lists, one tensor a sample.
    PipelineSpecimen(
        "z_image",
        lambda: _textless("ZImagePipeline", "z_image", parts.vae(), _flow(shift=3.0)),
        dict(**_IMAGE, **_LATENT),
        lambda batch: {
            "prompt_embeds": list(noise(4, 12, 32, seed=1)[:batch]),
            "negative_prompt_embeds": list(_NEGATIVE[:batch]),
        },
    ),
    PipelineSpecimen("curio", _curio, {}, lambda batch: {"hints": [[1, 2, n] for n in range(batch)]}),
    PipelineSpecimen("animatediff", _animatediff, dict(**_IMAGE, **_LATENT, num_frames=4)),
    PipelineSpecimen(
        "svd",
        _svd,
        dict(**_IMAGE, **_LATENT, num_frames=4, min_guidance_scale=1.0, max_guidance_scale=3.0),
        lambda batch: {"image": [to_pil_image(picture) for picture in _picture(batch)]},
    ),
    PipelineSpecimen(
        "wan",
        lambda: _t5("WanPipeline", "wan", parts.vae_wan(), _flow(shift=3.0)),
        dict(**_VIDEO, max_sequence_length=16),
    ),
    PipelineSpecimen("wan22", _wan22, dict(**_VIDEO, max_sequence_length=16, guidance_scale_2=3.0)),
    PipelineSpecimen(
        "cogvideox",
        lambda: _t5("CogVideoXPipeline", "cogvideox", parts.vae_cogvideox(), _cogvideox_ddim()),
        dict(**_VIDEO, max_sequence_length=12),
    ),
    PipelineSpecimen(
        "ltx",
        lambda: _t5("LTXPipeline", "ltx", parts.vae_ltx(), _flow(use_dynamic_shifting=True)),
        dict(height=128, width=192, num_frames=25, **_LATENT, max_sequence_length=16),
    ),
    PipelineSpecimen(
        "mochi",
        lambda: _t5("MochiPipeline", "mochi", parts.vae_mochi(), _flow(invert_sigmas=True)),
        dict(height=64, width=96, num_frames=19, **_LATENT, max_sequence_length=12),
    ),
    PipelineSpecimen(
        "hunyuan_video",
        lambda: _textless(
            "HunyuanVideoPipeline",
            "hunyuan_video",
            parts.vae_hunyuan(),
            _flow(shift=7.0),
            text_encoder_2=None,
            tokenizer_2=None,
        ),
        _VIDEO,
        lambda batch: _embeds(batch, pooled_prompt_embeds=noise(4, 24, seed=2), prompt_attention_mask=_MASK),
    ),
]

PIPELINES: dict[str, PipelineSpecimen] = {entry.name: entry for entry in _ENTRIES}

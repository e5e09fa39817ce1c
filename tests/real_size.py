"""Denoisers at their published size, on fake tensors: ``build_fake("flux_dev")`` takes neither memory nor a GPU.

Configurations are those of the released checkpoints, written out here so that nothing is downloaded. Text lengths are
the pipelines' defaults. A forward must run under ``fake_mode``; ``fake_forward`` does it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffaccel.denoiser import find_denoisers

# One mode for models and inputs, as tensors of two modes cannot meet. It refuses real tensors, which all seven bear.
fake_mode = FakeTensorMode()

DEVICE, DTYPE = "cuda", torch.bfloat16


def _random(*shape: int) -> Tensor:
    return torch.empty(shape, device=DEVICE, dtype=DTYPE)


def _full(value: float, *shape: int) -> Tensor:
    return torch.full(shape or (1,), value, device=DEVICE, dtype=DTYPE)


def _flux() -> dict[str, Any]:
    """1024 x 1024: 64 x 64 tokens after packing, 512 of T5."""
    return {
        "hidden_states": _random(1, 4096, 64),
        "encoder_hidden_states": _random(1, 512, 4096),
        "pooled_projections": _random(1, 768),
        "timestep": _full(0.7),
        "guidance": torch.full((1,), 3.5, device=DEVICE),
        "img_ids": _random(4096, 3),
        "txt_ids": _random(512, 3),
    }


def _sd35() -> dict[str, Any]:
    """1024 x 1024: 64 x 64 tokens, 77 of CLIP and 256 of T5."""
    return {
        "hidden_states": _random(1, 16, 128, 128),
        "encoder_hidden_states": _random(1, 333, 4096),
        "pooled_projections": _random(1, 2048),
        "timestep": _full(700.0),
    }


def _sdxl() -> dict[str, Any]:
    """1024 x 1024."""
    return {
        "sample": _random(1, 4, 128, 128),
        "encoder_hidden_states": _random(1, 77, 2048),
        "added_cond_kwargs": {"text_embeds": _random(1, 1280), "time_ids": _random(1, 6)},
        "timestep": _full(700.0),
    }


def _qwen() -> dict[str, Any]:
    """1328 x 1328, the resolution of the model card: 83 x 83 tokens."""
    return {
        "hidden_states": _random(1, 83 * 83, 64),
        "encoder_hidden_states": _random(1, 256, 3584),
        "timestep": _full(0.7),
        "img_shapes": [[(1, 83, 83)]],
    }


def _wan() -> dict[str, Any]:
    """1280 x 720, 81 frames: 21 x 45 x 80 = 75600 tokens."""
    return {
        "hidden_states": _random(1, 16, 21, 90, 160),
        "encoder_hidden_states": _random(1, 512, 4096),
        "timestep": _full(700.0),
    }


def _hunyuan() -> dict[str, Any]:
    """1280 x 720, 129 frames: 33 x 45 x 80 = 118800 tokens, 256 of Llama."""
    return {
        "hidden_states": _random(1, 16, 33, 90, 160),
        "encoder_hidden_states": _random(1, 256, 4096),
        "encoder_attention_mask": _full(1.0, 1, 256),
        "pooled_projections": _random(1, 768),
        "guidance": _full(6000.0),
        "timestep": _full(700.0),
    }


def _cogvideox() -> dict[str, Any]:
    """720 x 480, 49 frames: 13 x 30 x 45 = 17550 tokens, 226 of T5."""
    table = torch.empty(17550, 64, device=DEVICE)
    return {
        "hidden_states": _random(1, 13, 16, 60, 90),
        "encoder_hidden_states": _random(1, 226, 4096),
        "image_rotary_emb": (table, table),
        "timestep": _full(700.0),
    }


@dataclass(frozen=True)
class RealSize:
    """A released denoiser: its class, the arguments of the class, and those of one forward (batch 1).

    tokens: the grid that self-attention works on, (frames, height, width); for a UNet that of its finest attention.
    """

    model: str
    config: Mapping[str, Any]
    feed: Callable[[], dict[str, Any]]
    tokens: tuple[int, int, int]


REAL_SIZE = {
    # Arguments that are left out are the defaults of the class, which are those of the checkpoint.
    "flux_dev": RealSize("FluxTransformer2DModel", dict(guidance_embeds=True), _flux, (1, 64, 64)),
    "sd35_large": RealSize(
        "SD3Transformer2DModel",
        dict(
            num_layers=38,
            num_attention_heads=38,
            attention_head_dim=64,
            caption_projection_dim=2432,
            pos_embed_max_size=192,
            qk_norm="rms_norm",
        ),
        _sd35,
        (1, 64, 64),
    ),
    "sdxl": RealSize(
        "UNet2DConditionModel",
        dict(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(5, 10, 20),
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        _sdxl,
        (1, 64, 64),
    ),
    "qwen_image": RealSize("QwenImageTransformer2DModel", {}, _qwen, (1, 83, 83)),
    "wan21_14b": RealSize("WanTransformer3DModel", {}, _wan, (21, 45, 80)),
    "hunyuan_video": RealSize("HunyuanVideoTransformer3DModel", {}, _hunyuan, (33, 45, 80)),
    "cogvideox_5b": RealSize(
        "CogVideoXTransformer3DModel",
        dict(num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True),
        _cogvideox,
        (13, 30, 45),
    ),
}


def build_fake(name: str) -> nn.Module:
    """The model as fake tensors on a fake GPU, in eval mode: bfloat16 but for what diffusers keeps in float32."""
    entry = REAL_SIZE[name]
    cls = getattr(diffusers, entry.model)
    kept = set(cls._keep_in_fp32_modules or ())
    with fake_mode, torch.device(DEVICE):
        model = cls(**entry.config).eval()
        # Module.to cannot swap fake parameters for another dtype (torch 2.14), so they are replaced one by one.
        for path, module in model.named_modules():
            for key, old in module.named_parameters(recurse=False):
                dtype = torch.float32 if kept & {*path.split("."), key} else DTYPE
                setattr(module, key, nn.Parameter(torch.empty(old.shape, dtype=dtype), requires_grad=False))
    return model


def shallow(model: nn.Module) -> nn.Module:
    """One block of each list of repeated blocks, two where they differ: a plan does to each block alike."""
    parents = dict.fromkeys(name.rpartition(".")[0] for name, _ in find_denoisers(model)[0].blocks)
    for parent in parents:
        blocks = model.get_submodule(parent)
        shapes = [[p.shape for p in block.parameters()] for block in blocks]
        kept = [blocks[0]] if shapes[0] == shapes[-1] else [blocks[0], blocks[-1]]
        above, _, name = parent.rpartition(".")
        setattr(model.get_submodule(above), name, nn.ModuleList(kept))
    return model


def fake_inputs(name: str) -> dict[str, Any]:
    """The arguments of one forward at full resolution, batch 1, on the fake GPU."""
    with fake_mode:
        return REAL_SIZE[name].feed()


def fake_forward(name: str, model: nn.Module | None = None) -> Any:
    """Run one forward and return its (fake) result."""
    with fake_mode, torch.no_grad():
        return (model or build_fake(name))(**fake_inputs(name), return_dict=False)[0]

"""Image transformers in miniature: width 64, four heads of 16, at least two blocks of each kind."""

from typing import Any

import torch
from torch import Tensor
from zoo_base import Grid, Specimen, noise

TEXT = 12
WIDTH = 64


def _ids(*lengths: int) -> Tensor:
    """Positions of a grid of tokens, one row of coordinates per token, the last axis fastest."""
    return torch.cartesian_prod(*(torch.arange(n) for n in lengths)).float()


def _planes(grid: Grid, channels: int = 4, patch: int = 2) -> Tensor:
    return noise(grid.batch, channels, grid.height * patch, grid.width * patch)


def _packed(grid: Grid, channels: int = 16) -> Tensor:
    return noise(grid.batch, grid.height * grid.width, channels)


def _text(grid: Grid, width: int = 32, length: int = TEXT, seed: int = 1) -> Tensor:
    return noise(grid.batch, length, width, seed=seed)


def _mask(grid: Grid, length: int = TEXT, kept: int = TEXT - 3, dtype: torch.dtype = torch.bool) -> Tensor:
    """Text mask: all tokens of the first sample, the first ``kept`` of the others."""
    rows = torch.arange(length).expand(grid.batch, length)
    return ((rows < kept) | (torch.arange(grid.batch)[:, None] == 0)).to(dtype)


def _flux_ids(grid: Grid, axes: int = 3, text_axes: tuple[int, ...] = (0,)) -> dict[str, Tensor]:
    image = _ids(*([1] * (axes - 2 - (axes == 4))), grid.height, grid.width, *([1] * (axes == 4)))
    return {"img_ids": image, "txt_ids": torch.zeros(TEXT, axes)}


def _dit(grid: Grid) -> dict[str, Any]:
    return {"hidden_states": _planes(grid), "class_labels": torch.arange(grid.batch) + 3}


def _pixart(grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": _planes(grid),
        "encoder_hidden_states": _text(grid),
        "encoder_attention_mask": _mask(grid, dtype=torch.float32),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _pixart_alpha(grid: Grid) -> dict[str, Any]:
    sizes = {"resolution": torch.full((grid.batch, 2), 512.0), "aspect_ratio": torch.full((grid.batch, 1), 1.0)}
    return _pixart(grid) | {"added_cond_kwargs": sizes}


def _sd3(grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": _planes(grid),
        "encoder_hidden_states": _text(grid),
        "pooled_projections": noise(grid.batch, 24, seed=2),
    }


def _flux(grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": _packed(grid),
        "encoder_hidden_states": _text(grid),
        "pooled_projections": noise(grid.batch, 24, seed=2),
        "guidance": torch.full((grid.batch,), 3.5),
        **_flux_ids(grid),
    }


def _flux2(grid: Grid) -> dict[str, Any]:
    image = _ids(1, grid.height, grid.width, 1)
    return {
        "hidden_states": _packed(grid),
        "encoder_hidden_states": _text(grid),
        "guidance": torch.full((grid.batch,), 4.0),
        "img_ids": image.expand(grid.batch, -1, -1),
        "txt_ids": _ids(1, 1, 1, TEXT).expand(grid.batch, -1, -1),
    }


def _auraflow(grid: Grid) -> dict[str, Any]:
    return {"hidden_states": _planes(grid), "encoder_hidden_states": _text(grid)}


def _hunyuan_dit(grid: Grid) -> dict[str, Any]:
    angles = noise(grid.height * grid.width, 8, seed=5)
    return {
        "hidden_states": _planes(grid),
        "encoder_hidden_states": _text(grid),
        "text_embedding_mask": _mask(grid),
        "encoder_hidden_states_t5": _text(grid, 24, 8, seed=2),
        "text_embedding_mask_t5": _mask(grid, 8, 6),
        "image_meta_size": torch.tensor([[64.0, 64, 64, 64, 0, 0]]).repeat(grid.batch, 1),
        "style": torch.zeros(grid.batch, dtype=torch.long),
        "image_rotary_emb": tuple(part.repeat_interleave(2, -1) for part in (angles.cos(), angles.sin())),
    }


def _sana(grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": _planes(grid, 4, 1),
        "encoder_hidden_states": _text(grid),
        "encoder_attention_mask": _mask(grid, dtype=torch.float32),
    }


def _sized(grid: Grid) -> dict[str, Tensor]:
    size = torch.tensor([[64.0, 64.0]]).repeat(grid.batch, 1)
    return {"original_size": size, "target_size": size, "crop_coords": torch.zeros(grid.batch, 2)}


def _cogview(grid: Grid) -> dict[str, Any]:
    return {"hidden_states": _planes(grid), "encoder_hidden_states": _text(grid), **_sized(grid)}


def _chroma(grid: Grid) -> dict[str, Any]:
    mask = torch.cat([_mask(grid), torch.ones(grid.batch, grid.height * grid.width, dtype=torch.bool)], 1)
    return {
        "hidden_states": _packed(grid),
        "encoder_hidden_states": _text(grid),
        "attention_mask": mask,
        **_flux_ids(grid),
    }


def _qwen(grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": _packed(grid),
        "encoder_hidden_states": _text(grid),
        "encoder_hidden_states_mask": _mask(grid),
        "img_shapes": [[(1, grid.height, grid.width)]] * grid.batch,
    }


def _lumina2(grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": _planes(grid),
        "encoder_hidden_states": _text(grid),
        "encoder_attention_mask": _mask(grid),
    }


def _z_image(grid: Grid) -> dict[str, Any]:
    latents = noise(grid.batch, 4, 1, 2 * grid.height, 2 * grid.width)
    return {"x": list(latents), "cap_feats": [_text(grid, length=TEXT - i)[i] for i in range(grid.batch)]}


_HEADS = {"num_attention_heads": 4, "attention_head_dim": 16}
_FLUX = {**_HEADS, "num_layers": 2, "num_single_layers": 2, "in_channels": 16, "joint_attention_dim": 32}
_ROPE = {"axes_dims_rope": (4, 6, 6)}
_PIXART = {
    **_HEADS,
    "num_layers": 2,
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 8,
    "cross_attention_dim": WIDTH,
    "caption_channels": 32,
    "norm_num_groups": 4,
}

IMAGE = [
    Specimen("dit", "DiTTransformer2DModel", {**_HEADS, "num_layers": 3, "sample_size": 16, "norm_num_groups": 4}, _dit, "none", square=True),
    Specimen("pixart_alpha", "PixArtTransformer2DModel", {**_PIXART, "num_attention_heads": 6, "cross_attention_dim": 96, "use_additional_conditions": True}, _pixart_alpha, "cross"),
    Specimen("pixart_sigma", "PixArtTransformer2DModel", {**_PIXART, "use_additional_conditions": False}, _pixart, "cross"),
    Specimen(
        "sd3",
        "SD3Transformer2DModel",
        {
            **_HEADS,
            "num_layers": 3,
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "joint_attention_dim": 32,
            "caption_projection_dim": WIDTH,
            "pooled_projection_dim": 24,
            "pos_embed_max_size": 16,
            "qk_norm": "rms_norm",
        },
        _sd3,
        "after",
    ),
    Specimen(
        "sd35_dual",
        "SD3Transformer2DModel",
        {
            **_HEADS,
            "num_layers": 3,
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "joint_attention_dim": 32,
            "caption_projection_dim": WIDTH,
            "pooled_projection_dim": 24,
            "pos_embed_max_size": 16,
            "qk_norm": "rms_norm",
            "dual_attention_layers": (0, 1),
        },
        _sd3,
        "after",
    ),
    Specimen(
        "flux",
        "FluxTransformer2DModel",
        {**_FLUX, **_ROPE, "pooled_projection_dim": 24, "guidance_embeds": True},
        _flux,
        "before",
        time_max=1.0,
    ),
    Specimen(
        "flux2",
        "Flux2Transformer2DModel",
        {**_FLUX, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 32},
        _flux2,
        "before",
        time_max=1.0,
    ),
    Specimen(
        "auraflow",
        "AuraFlowTransformer2DModel",
        {
            **_HEADS,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "sample_size": 16,
            "in_channels": 4,
            "joint_attention_dim": 32,
            "caption_projection_dim": WIDTH,
            "pos_embed_max_size": 256,
        },
        _auraflow,
        "before",
        time_max=1.0,
    ),
    Specimen(
        "hunyuan_dit",
        "HunyuanDiT2DModel",
        {
            **_HEADS,
            "num_layers": 4,
            "hidden_size": WIDTH,
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "cross_attention_dim": 32,
            "cross_attention_dim_t5": 24,
            "pooled_projection_dim": 16,
            "text_len": TEXT,
            "text_len_t5": 8,
        },
        _hunyuan_dit,
        "cross",
    ),
    Specimen(
        "sana",
        "SanaTransformer2DModel",
        {
            **_HEADS,
            "num_layers": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": WIDTH,
            "caption_channels": 32,
            "sample_size": 8,
        },
        _sana,
        "cross",
    ),
    Specimen(
        "cogview3",
        "CogView3PlusTransformer2DModel",
        {
            **_HEADS,
            "num_layers": 2,
            "in_channels": 4,
            "out_channels": 4,
            "text_embed_dim": 32,
            "time_embed_dim": 32,
            "condition_dim": 8,
            "pos_embed_max_size": 16,
            "sample_size": 16,
        },
        _cogview,
        "before",
    ),
    Specimen(
        "cogview4",
        "CogView4Transformer2DModel",
        {
            **_HEADS,
            "num_layers": 2,
            "in_channels": 4,
            "out_channels": 4,
            "text_embed_dim": 32,
            "time_embed_dim": 32,
            "condition_dim": 8,
            "pos_embed_max_size": 16,
            "sample_size": 16,
            "rope_axes_dim": (16, 16),
        },
        _cogview,
        "before",
    ),
    Specimen(
        "chroma",
        "ChromaTransformer2DModel",
        {
            **_FLUX,
            **_ROPE,
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 32,
            "approximator_layers": 2,
        },
        _chroma,
        "before",
        time_max=1.0,
    ),
    Specimen(
        "qwen_image",
        "QwenImageTransformer2DModel",
        {**_HEADS, **_ROPE, "num_layers": 2, "in_channels": 16, "out_channels": 4, "joint_attention_dim": 32},
        _qwen,
        "before",
        time_max=1.0,
    ),
    Specimen(
        "lumina2",
        "Lumina2Transformer2DModel",
        {
            "sample_size": 16,
            "in_channels": 4,
            "hidden_size": WIDTH,
            "num_layers": 2,
            "num_refiner_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "multiple_of": 16,
            "axes_dim_rope": (4, 6, 6),
            "axes_lens": (64, 32, 32),
            "cap_feat_dim": 32,
        },
        _lumina2,
        "before",
        time_max=1.0,
        time_rises=True,
    ),
    Specimen(
        "z_image",
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": WIDTH,
            "n_layers": 2,
            "n_refiner_layers": 2,
            "n_heads": 4,
            "n_kv_heads": 4,
            "cap_feat_dim": 32,
            "axes_dims": [4, 6, 6],
            "axes_lens": [128, 32, 32],
        },
        _z_image,
        "after",
        latents=("x",),
        time="t",
        time_max=1.0,
        time_rises=True,
    ),
]

"""Image transformers in miniature that take latents as packed tokens: four heads of 16, two blocks of each kind."""

from typing import Any

import torch
from zoo_base import TEXT, Grid, Specimen, noise, pooled, positions, text, text_mask, tokens


def _joint(grid: Grid) -> dict[str, Any]:
    return {"hidden_states": tokens(grid), "encoder_hidden_states": text(grid)}


def _ids(grid: Grid) -> dict[str, Any]:
    return _joint(grid) | {"img_ids": positions(1, grid.height, grid.width), "txt_ids": torch.zeros(TEXT, 3)}


def _flux(grid: Grid) -> dict[str, Any]:
    return _ids(grid) | {"pooled_projections": pooled(grid), "guidance": torch.full((grid.batch,), 3.5)}


def _flux2(grid: Grid) -> dict[str, Any]:
    ids = {"img_ids": positions(1, grid.height, grid.width, 1), "txt_ids": positions(1, 1, 1, TEXT)}
    return _joint(grid) | ids


def _joint_mask(grid: Grid) -> torch.Tensor:
    image = torch.ones(grid.batch, grid.height * grid.width, dtype=torch.bool)
    return torch.cat([text_mask(grid), image], 1)


def _bria_fibo(grid: Grid) -> dict[str, Any]:
    return _ids(grid) | {"text_encoder_layers": [text(grid, 24, seed=layer) for layer in range(4)]}


def _qwen(grid: Grid) -> dict[str, Any]:
    return _joint(grid) | {
        "encoder_hidden_states_mask": text_mask(grid),
        "img_shapes": [[(1, grid.height, grid.width)]] * grid.batch,
    }


def _krea(grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": tokens(grid),
        "encoder_hidden_states": noise(grid.batch, TEXT, 3, 32, seed=1),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), positions(1, grid.height, grid.width)]),
        "encoder_attention_mask": text_mask(grid),
    }


def _ideogram(grid: Grid) -> dict[str, Any]:
    # One sequence holds both modalities: text features are zero where image tokens stand, and the other way round.
    image = grid.height * grid.width
    indicator = torch.tensor([3] * TEXT + [2] * image).repeat(grid.batch, 1)
    ids = torch.cat([torch.arange(TEXT)[:, None].expand(-1, 3), positions(1, grid.height, grid.width).long() + TEXT])
    return {
        "hidden_states": noise(grid.batch, TEXT + image, 16),
        "encoder_hidden_states": noise(grid.batch, TEXT + image, 32, seed=1),
        "position_ids": ids.repeat(grid.batch, 1, 1),
        "segment_ids": torch.ones(grid.batch, TEXT + image, dtype=torch.long),
        "indicator": indicator,
    }


def _hunyuan_image(grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": noise(grid.batch, 16, grid.height, grid.width),
        "encoder_hidden_states": text(grid),
        "encoder_attention_mask": text_mask(grid),
        "encoder_hidden_states_2": text(grid, 24, 8, seed=3),
        "encoder_attention_mask_2": text_mask(grid, 8),
    }


_HEADS = dict(num_attention_heads=4, attention_head_dim=16)
_ROPE = dict(axes_dims_rope=(4, 6, 6))
_DOUBLE = dict(**_HEADS, num_layers=2, num_single_layers=2, in_channels=16, joint_attention_dim=32)

PACKED = [
    Specimen(
        "flux",
        "FluxTransformer2DModel",
        dict(**_DOUBLE, **_ROPE, pooled_projection_dim=24, guidance_embeds=True),
        _flux,
        "before",
        time_max=1.0,
    ),
    Specimen(
        "flux2",
        "Flux2Transformer2DModel",
        dict(**_DOUBLE, axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=32),
        lambda grid: _flux2(grid) | {"guidance": torch.full((grid.batch,), 4.0)},
        "before",
        time_max=1.0,
    ),
    Specimen(
        "flux3",
        "Flux3Transformer2DModel",
        dict(**_DOUBLE, cond_in_channels=16, axes_dims_rope=(4, 4, 4, 4), timestep_channels=32),
        _flux2,
        "before",
        time_max=1.0,
    ),
    Specimen(
        "chroma",
        "ChromaTransformer2DModel",
        dict(**_DOUBLE, **_ROPE, approximator_num_channels=8, approximator_hidden_dim=32, approximator_layers=2),
        lambda grid: _ids(grid) | {"attention_mask": _joint_mask(grid)},
        "before",
        time_max=1.0,
    ),
    Specimen("bria", "BriaTransformer2DModel", dict(**_DOUBLE, **_ROPE), _ids, "before"),
    Specimen(
        "bria_fibo",
        "BriaFiboTransformer2DModel",
        dict(**_DOUBLE, **_ROPE, text_encoder_dim=24),
        _bria_fibo,
        "before",
    ),
    Specimen(
        "ovis_image",
        "OvisImageTransformer2DModel",
        dict(**_DOUBLE, **_ROPE, out_channels=16),
        _ids,
        "before",
        time_max=1.0,
    ),
    Specimen(
        "longcat_image",
        "LongCatImageTransformer2DModel",
        dict(**_DOUBLE, **_ROPE, pooled_projection_dim=24),
        _ids,
        "before",
        time_max=1.0,
    ),
    Specimen(
        "qwen_image",
        "QwenImageTransformer2DModel",
        dict(**_HEADS, **_ROPE, num_layers=3, in_channels=16, out_channels=4, joint_attention_dim=32),
        _qwen,
        "before",
        time_max=1.0,
    ),
    Specimen(
        "nucleus_moe",
        "NucleusMoEImageTransformer2DModel",
        dict(
            **_HEADS,
            **_ROPE,
            num_layers=5,
            in_channels=16,
            out_channels=4,
            joint_attention_dim=32,
            num_experts=4,
            moe_intermediate_dim=32,
            capacity_factors=[2.0] * 5,
        ),
        _qwen,
        "keys-after",
        time_max=1.0,
    ),
    Specimen(
        "krea2",
        "Krea2Transformer2DModel",
        dict(
            **_HEADS,
            **_ROPE,
            in_channels=16,
            num_layers=3,
            num_key_value_heads=2,
            intermediate_size=96,
            timestep_embed_dim=32,
            text_hidden_dim=32,
            num_text_layers=3,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=48,
        ),
        _krea,
        "before",
        time_max=1.0,
    ),
    Specimen(
        "ideogram4",
        "Ideogram4Transformer2DModel",
        dict(
            **_HEADS,
            in_channels=16,
            num_layers=3,
            intermediate_size=96,
            adaln_dim=32,
            llm_features_dim=32,
            mrope_section=(4, 2, 2),
        ),
        _ideogram,
        "before",
        time_max=1.0,
        time_rises=True,
    ),
    # Latents are planes here, with one token per pixel, but the width of a token is that of the packed models.
    Specimen(
        "hunyuan_image",
        "HunyuanImageTransformer2DModel",
        dict(
            **_HEADS,
            num_layers=2,
            num_single_layers=2,
            in_channels=16,
            out_channels=16,
            text_embed_dim=32,
            text_embed_2_dim=24,
            rope_axes_dim=(8, 8),
        ),
        _hunyuan_image,
        "after",
    ),
]

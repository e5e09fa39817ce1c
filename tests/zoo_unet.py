"""UNets in miniature, and the denoisers that are neither UNet nor image or video transformer."""

from typing import Any

import torch
from torch import Tensor
from zoo_base import Grid, Specimen, noise

TEXT = 12


def _planes(grid: Grid, channels: int = 4) -> Tensor:
    """Latents with one 2 x 2 patch per token of the grid, so that the first level has four times as many pixels."""
    return noise(grid.batch, channels, 2 * grid.height, 2 * grid.width)


def _text(grid: Grid, width: int = 32, length: int = TEXT, seed: int = 1) -> Tensor:
    return noise(grid.batch, length, width, seed=seed)


def _unet(grid: Grid) -> dict[str, Any]:
    return {"sample": _planes(grid), "encoder_hidden_states": _text(grid)}


def _sdxl(grid: Grid) -> dict[str, Any]:
    added = {"text_embeds": noise(grid.batch, 24, seed=2), "time_ids": torch.full((grid.batch, 6), 64.0)}
    return _unet(grid) | {"added_cond_kwargs": added}


def _clip(grid: Grid) -> dict[str, Any]:
    """Video latents [B, C, F, H, W] with the caption of a sample repeated for each frame."""
    sample = noise(grid.batch, 4, grid.frames, 2 * grid.height, 2 * grid.width)
    return {"sample": sample, "encoder_hidden_states": _text(grid).repeat_interleave(grid.frames, 0)}


def _svd(grid: Grid) -> dict[str, Any]:
    return {
        "sample": noise(grid.batch, grid.frames, 8, 2 * grid.height, 2 * grid.width),
        "encoder_hidden_states": _text(grid, length=1),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]).repeat(grid.batch, 1),
    }


_SD = dict(
    sample_size=16,
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=32,
    norm_num_groups=8,
)

UNET = [
    Specimen(
        "unet_2d",
        "UNet2DModel",
        dict(
            sample_size=16,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=16,
            norm_num_groups=8,
        ),
        lambda grid: {"sample": _planes(grid, 3)},
        "none",
        latents=("sample",),
    ),
    # attention_head_dim is the number of heads in SD 1.5, for compatibility with its first release.
    Specimen("unet_sd15", "UNet2DConditionModel", dict(**_SD, attention_head_dim=4), _unet, "cross", latents=("sample",)),
    Specimen(
        "unet_sdxl",
        "UNet2DConditionModel",
        _SD
        | dict(
            block_out_channels=(32, 32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 2, 4),
            transformer_layers_per_block=(1, 1, 3),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
        ),
        _sdxl,
        "cross",
        latents=("sample",),
    ),
    Specimen(
        "svd",
        "UNetSpatioTemporalConditionModel",
        dict(
            sample_size=16,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24,
            cross_attention_dim=32,
            num_attention_heads=(2, 4),
        ),
        _svd,
        "cross",
        latents=("sample",),
        video=True,
    ),
    Specimen(
        "animatediff",
        "UNetMotionModel",
        dict(
            sample_size=16,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
            cross_attention_dim=32,
            norm_num_groups=8,
            num_attention_heads=4,
            motion_num_attention_heads=4,
            motion_max_seq_length=8,
        ),
        _clip,
        "cross",
        latents=("sample",),
        video=True,
    ),
]

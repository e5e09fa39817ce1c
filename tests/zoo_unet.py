"""UNets in miniature, and the denoisers of sound and of embeddings. A grid token is 2 x 2 pixels of the first level."""

from typing import Any

import torch
from zoo_base import TEXT, Grid, Specimen, noise, planes, pooled, positions, text, text_mask, volume


def _caption(grid: Grid) -> dict[str, Any]:
    return {"sample": planes(grid), "encoder_hidden_states": text(grid)}


def _sdxl(grid: Grid) -> dict[str, Any]:
    added = {"text_embeds": pooled(grid), "time_ids": torch.full((grid.batch, 6), 64.0)}
    return _caption(grid) | {"added_cond_kwargs": added}


def _clip(grid: Grid) -> dict[str, Any]:
    return {"sample": volume(grid), "encoder_hidden_states": text(grid)}


def _animatediff(grid: Grid) -> dict[str, Any]:
    """The caption of a sample is repeated for each of its frames, as the pipeline does."""
    return {"sample": volume(grid), "encoder_hidden_states": text(grid).repeat_interleave(grid.frames, 0)}


def _svd(grid: Grid) -> dict[str, Any]:
    """Latents are [B, F, C, H, W] in this family; the only condition is one image embedding."""
    return {
        "sample": volume(grid, 8).transpose(1, 2),
        "encoder_hidden_states": text(grid, length=1),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]).repeat(grid.batch, 1),
    }


def _i2vgen(grid: Grid) -> dict[str, Any]:
    return _clip(grid) | {
        "fps": torch.full((grid.batch,), 16),
        "image_latents": volume(grid) * 0.5,
        "image_embeddings": pooled(grid, 32),
    }


def _cascade(grid: Grid) -> dict[str, Any]:
    return {"sample": planes(grid), "clip_text_pooled": text(grid, 24, 1)}


def _uvit(grid: Grid) -> dict[str, Any]:
    ids = torch.arange(4 * grid.height * grid.width).view(1, 2 * grid.height, 2 * grid.width) % 20
    sizes = torch.tensor([[64.0, 64, 0, 0]]).repeat(grid.batch, 1)
    return {
        "input_ids": ids.repeat(grid.batch, 1, 1),
        "encoder_hidden_states": text(grid),
        "pooled_text_emb": pooled(grid),
        "micro_conds": torch.cat([sizes, sizes[:, :1]], 1),
    }


def _audio(grid: Grid) -> dict[str, Any]:
    length = grid.height * grid.width
    angles = positions(length + 1)[:, None] * noise(1, 4, seed=5)
    return {
        "hidden_states": noise(grid.batch, 8, length),
        "encoder_hidden_states": text(grid),
        "global_hidden_states": text(grid, 24, 1, seed=2),
        "rotary_embedding": tuple(torch.cat([part, part], -1) for part in (angles.cos(), angles.sin())),
    }


def _prior(grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": pooled(grid, 32),
        "proj_embedding": noise(grid.batch, 32, seed=3),
        "encoder_hidden_states": text(grid),
        "attention_mask": text_mask(grid),
    }


_LATENT = dict(latents=("sample",))
_CLIP = dict(latents=("sample",), video=True)
_SD = dict(
    sample_size=16,
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=32,
    norm_num_groups=8,
)
_SDXL = _SD | dict(
    block_out_channels=(32, 32, 64),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(2, 2, 4),
    transformer_layers_per_block=(1, 1, 3),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=24 + 6 * 8,
)
_3D = dict(
    sample_size=16,
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
    up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    cross_attention_dim=32,
    norm_num_groups=8,
    attention_head_dim=8,
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
        lambda grid: {"sample": planes(grid, 3)},
        "none",
        **_LATENT,
    ),
    # attention_head_dim is the number of heads in SD 1.5 and SDXL, for compatibility with the first release.
    Specimen("unet_sd15", "UNet2DConditionModel", dict(**_SD, attention_head_dim=4), _caption, "cross", **_LATENT),
    Specimen("unet_sdxl", "UNet2DConditionModel", _SDXL, _sdxl, "cross", **_LATENT),
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
        **_CLIP,
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
        _animatediff,
        "cross",
        **_CLIP,
    ),
    Specimen("unet_3d", "UNet3DConditionModel", _3D, _clip, "cross", **_CLIP),
    Specimen("i2vgen_xl", "I2VGenXLUNet", _3D, _i2vgen, "cross", **_CLIP),
    Specimen(
        "kandinsky3",
        "Kandinsky3UNet",
        dict(
            time_embedding_dim=32,
            groups=4,
            attention_head_dim=16,
            layers_per_block=2,
            block_out_channels=(16, 32, 32, 64),
            cross_attention_dim=32,
            encoder_hid_dim=32,
        ),
        lambda grid: _caption(grid) | {"encoder_attention_mask": text_mask(grid)},
        "cross",
        odd=(1, 12, 4),
        **_LATENT,
    ),
    # The text is mapped to four tokens, which self-attention appends to its keys.
    Specimen(
        "stable_cascade",
        "StableCascadeUNet",
        dict(
            in_channels=4,
            out_channels=4,
            timestep_ratio_embedding_dim=16,
            conditioning_dim=32,
            block_out_channels=(32, 32),
            num_attention_heads=(2, 2),
            down_num_layers_per_block=(1, 2),
            up_num_layers_per_block=(2, 1),
            clip_text_pooled_in_channels=24,
        ),
        _cascade,
        "keys-after",
        latents=("sample",),
        time="timestep_ratio",
        time_max=1.0,
    ),
    # aMUSEd has no timestep: the share of masked tokens tells the model where it is. The latents are token ids.
    Specimen(
        "uvit",
        "UVit2DModel",
        dict(
            hidden_size=64,
            cond_embed_dim=24,
            micro_cond_encode_dim=8,
            micro_cond_embed_dim=40,
            encoder_hidden_size=32,
            vocab_size=24,
            codebook_size=20,
            in_channels=32,
            block_out_channels=32,
            num_res_blocks=1,
            downsample=True,
            upsample=True,
            block_num_heads=2,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            sample_size=16,
        ),
        _uvit,
        "cross",
        latents=("input_ids",),
        time="",
    ),
    Specimen(
        "stable_audio",
        "StableAudioDiTModel",
        dict(
            sample_size=64,
            in_channels=8,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=4,
            num_key_value_attention_heads=2,
            out_channels=8,
            cross_attention_dim=32,
            time_proj_dim=32,
            global_states_input_dim=24,
            cross_attention_input_dim=32,
        ),
        _audio,
        "cross",
        time_max=1.0,
    ),
    # Denoises one CLIP embedding; text, time and embedding are all tokens of one causal sequence.
    Specimen(
        "prior",
        "PriorTransformer",
        dict(
            num_attention_heads=4,
            attention_head_dim=16,
            num_layers=3,
            embedding_dim=32,
            num_embeddings=TEXT,
            additional_embeddings=4,
        ),
        _prior,
        "before",
    ),
]

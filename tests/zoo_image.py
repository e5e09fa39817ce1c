"""Image transformers in miniature that take latents as planes: width 64, four heads of 16, two blocks of each kind."""

from typing import Any

import torch
from zoo_base import TEXT, Grid, Specimen, noise, planes, pooled, positions, text, text_mask

WIDTH = 64


def _caption(grid: Grid) -> dict[str, Any]:
    return {"hidden_states": planes(grid), "encoder_hidden_states": text(grid)}


def _masked(grid: Grid) -> dict[str, Any]:
    return _caption(grid) | {"encoder_attention_mask": text_mask(grid)}


def _pixart(grid: Grid) -> dict[str, Any]:
    mask = text_mask(grid, dtype=torch.float32)
    sizes = {"resolution": torch.full((grid.batch, 2), 512.0), "aspect_ratio": torch.ones(grid.batch, 1)}
    return _caption(grid) | {"encoder_attention_mask": mask, "added_cond_kwargs": sizes}


def _hunyuan_dit(grid: Grid) -> dict[str, Any]:
    angles = noise(grid.height * grid.width, 8, seed=5)
    return _caption(grid) | {
        "text_embedding_mask": text_mask(grid),
        "encoder_hidden_states_t5": text(grid, 24, 8, seed=2),
        "text_embedding_mask_t5": text_mask(grid, 8),
        "image_meta_size": torch.tensor([[64.0, 64, 64, 64, 0, 0]]).repeat(grid.batch, 1),
        "style": torch.zeros(grid.batch, dtype=torch.long),
        "image_rotary_emb": tuple(part.repeat_interleave(2, -1) for part in (angles.cos(), angles.sin())),
    }


def _lumina(grid: Grid) -> dict[str, Any]:
    # Complex rotations over the largest grid; the model cuts out the rows and columns it needs.
    angles = positions(16, 16) @ noise(2, 8, seed=5)
    table = torch.polar(torch.ones_like(angles), angles).view(16, 16, 8)
    return _caption(grid) | {
        "encoder_mask": text_mask(grid),
        "image_rotary_emb": table,
        "cross_attention_kwargs": {},
    }


def _sana(grid: Grid) -> dict[str, Any]:
    mask = text_mask(grid, dtype=torch.float32)
    return {"hidden_states": planes(grid, 4, 1), "encoder_hidden_states": text(grid), "encoder_attention_mask": mask}


def _cogview(grid: Grid) -> dict[str, Any]:
    size = torch.full((grid.batch, 2), 64.0)
    crop = torch.zeros(grid.batch, 2)
    return _caption(grid) | {"original_size": size, "target_size": size, "crop_coords": crop}


def _glm(grid: Grid) -> dict[str, Any]:
    prior = torch.arange(grid.height * grid.width).repeat(grid.batch, 1) % 16
    size = torch.full((grid.batch, 2), 64.0)
    return _caption(grid) | {
        "prior_token_id": prior,
        "prior_token_drop": torch.zeros_like(prior, dtype=torch.bool),
        "target_size": size,
        "crop_coords": torch.zeros(grid.batch, 2),
    }


def _z_image(grid: Grid) -> dict[str, Any]:
    latents = noise(grid.batch, 4, 1, 2 * grid.height, 2 * grid.width)
    return {"x": list(latents), "cap_feats": [text(grid)[i, : TEXT - i] for i in range(grid.batch)]}


def _omnigen(grid: Grid) -> dict[str, Any]:
    length = TEXT + 1 + grid.height * grid.width
    # Text and the time token see what precedes them; image tokens, which follow, see everything.
    mask = torch.ones(length, length).tril()
    mask[TEXT + 1 :] = 1
    return {
        "hidden_states": planes(grid),
        "input_ids": torch.arange(TEXT).repeat(grid.batch, 1) + 3,
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask.repeat(grid.batch, 1, 1),
        "position_ids": torch.arange(length).repeat(grid.batch, 1),
    }


def _hidream(grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": planes(grid),
        "encoder_hidden_states_t5": text(grid, 24, 8, seed=3),
        "encoder_hidden_states_llama3": noise(4, grid.batch, TEXT, 32, seed=4),
        "pooled_embeds": pooled(grid),
    }


def _ernie(grid: Grid) -> dict[str, Any]:
    return {"hidden_states": planes(grid), "text_bth": text(grid), "text_lens": text_mask(grid).sum(1)}


def _joy(grid: Grid) -> dict[str, Any]:
    return {"hidden_states": planes(grid)[:, :, None], "encoder_hidden_states": text(grid)}


_HEADS = dict(num_attention_heads=4, attention_head_dim=16)
_PIXART = dict(
    num_layers=3,
    sample_size=16,
    in_channels=4,
    out_channels=8,
    caption_channels=32,
    norm_num_groups=4,
    attention_head_dim=16,
)
_SD3 = dict(
    **_HEADS,
    num_layers=3,
    sample_size=16,
    in_channels=4,
    out_channels=4,
    joint_attention_dim=32,
    caption_projection_dim=WIDTH,
    pooled_projection_dim=24,
    pos_embed_max_size=16,
)
_COGVIEW = dict(
    **_HEADS,
    num_layers=2,
    in_channels=4,
    out_channels=4,
    text_embed_dim=32,
    time_embed_dim=32,
    condition_dim=8,
)

IMAGE = [
    Specimen(
        "dit",
        "DiTTransformer2DModel",
        dict(**_HEADS, num_layers=3, sample_size=16, norm_num_groups=4, out_channels=8),
        lambda grid: {"hidden_states": planes(grid), "class_labels": torch.arange(grid.batch) + 3},
        "none",
        odd=(1, 9, 9),
    ),
    # The size conditions are embedded in thirds of the width, hence 96.
    Specimen(
        "pixart_alpha",
        "PixArtTransformer2DModel",
        dict(**_PIXART, num_attention_heads=6, cross_attention_dim=96, use_additional_conditions=True),
        _pixart,
        "cross",
    ),
    Specimen(
        "pixart_sigma",
        "PixArtTransformer2DModel",
        dict(**_PIXART, num_attention_heads=4, cross_attention_dim=WIDTH, use_additional_conditions=False),
        _pixart,
        "cross",
    ),
    Specimen(
        "sd3",
        "SD3Transformer2DModel",
        _SD3,
        lambda grid: _caption(grid) | {"pooled_projections": pooled(grid)},
        "after",
    ),
    Specimen(
        "sd35_medium",
        "SD3Transformer2DModel",
        dict(**_SD3, qk_norm="rms_norm", dual_attention_layers=(0, 1)),
        lambda grid: _caption(grid) | {"pooled_projections": pooled(grid)},
        "after",
    ),
    # Eight learned register tokens stand before the text.
    Specimen(
        "auraflow",
        "AuraFlowTransformer2DModel",
        dict(
            **_HEADS,
            num_mmdit_layers=2,
            num_single_dit_layers=2,
            sample_size=16,
            in_channels=4,
            joint_attention_dim=32,
            caption_projection_dim=WIDTH,
            pos_embed_max_size=256,
        ),
        _caption,
        "before",
        time_max=1.0,
    ),
    Specimen(
        "hunyuan_dit",
        "HunyuanDiT2DModel",
        dict(
            **_HEADS,
            num_layers=4,
            hidden_size=WIDTH,
            sample_size=16,
            patch_size=2,
            in_channels=4,
            cross_attention_dim=32,
            cross_attention_dim_t5=24,
            pooled_projection_dim=16,
            text_len=TEXT,
            text_len_t5=8,
        ),
        _hunyuan_dit,
        "cross",
    ),
    Specimen(
        "lumina",
        "LuminaNextDiT2DModel",
        dict(
            sample_size=16,
            hidden_size=WIDTH,
            num_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=16,
            cross_attention_dim=32,
        ),
        _lumina,
        "cross",
        time_max=1.0,
        time_rises=True,
    ),
    Specimen(
        "lumina2",
        "Lumina2Transformer2DModel",
        dict(
            sample_size=16,
            in_channels=4,
            hidden_size=WIDTH,
            num_layers=2,
            num_refiner_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=16,
            axes_dim_rope=(4, 6, 6),
            axes_lens=(64, 32, 32),
            cap_feat_dim=32,
        ),
        _masked,
        "before",
        time_max=1.0,
        time_rises=True,
    ),
    Specimen(
        "sana",
        "SanaTransformer2DModel",
        dict(
            **_HEADS,
            num_layers=2,
            in_channels=4,
            out_channels=4,
            num_cross_attention_heads=4,
            cross_attention_head_dim=16,
            cross_attention_dim=WIDTH,
            caption_channels=32,
            sample_size=8,
        ),
        _sana,
        "cross",
    ),
    Specimen(
        "cogview3",
        "CogView3PlusTransformer2DModel",
        dict(**_COGVIEW, pos_embed_max_size=16, sample_size=16),
        _cogview,
        "before",
    ),
    Specimen(
        "cogview4",
        "CogView4Transformer2DModel",
        dict(**_COGVIEW, pos_embed_max_size=16, sample_size=16, rope_axes_dim=(16, 16)),
        _cogview,
        "before",
    ),
    Specimen(
        "glm_image",
        "GlmImageTransformer2DModel",
        dict(**_COGVIEW, prior_vq_quantizer_codebook_size=16),
        _glm,
        "before",
    ),
    Specimen(
        "z_image",
        "ZImageTransformer2DModel",
        dict(
            in_channels=4,
            dim=WIDTH,
            n_layers=2,
            n_refiner_layers=2,
            n_heads=4,
            n_kv_heads=4,
            cap_feat_dim=32,
            axes_dims=[4, 6, 6],
            axes_lens=[128, 32, 32],
        ),
        _z_image,
        "after",
        latents=("x",),
        time="t",
        time_max=1.0,
        time_rises=True,
    ),
    Specimen(
        "omnigen",
        "OmniGenTransformer2DModel",
        dict(
            hidden_size=WIDTH,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=96,
            num_layers=3,
            pad_token_id=0,
            vocab_size=32,
            rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
            pos_embed_max_size=16,
            time_step_dim=32,
        ),
        _omnigen,
        "before",
        time_max=1.0,
        time_rises=True,
    ),
    Specimen(
        "hidream",
        "HiDreamImageTransformer2DModel",
        dict(
            **_HEADS,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_single_layers=2,
            caption_channels=[24, 32],
            text_emb_dim=24,
            axes_dims_rope=(8, 4, 4),
            max_resolution=(16, 16),
            llama_layers=(0, 1, 2, 3),
            force_inference_output=True,
        ),
        _hidream,
        "after",
        time="timesteps",
    ),
    Specimen(
        "prx",
        "PRXTransformer2DModel",
        dict(in_channels=4, context_in_dim=32, hidden_size=WIDTH, mlp_ratio=2, num_heads=4, depth=3, axes_dim=[8, 8]),
        lambda grid: _caption(grid) | {"attention_mask": text_mask(grid)},
        "keys-before",
        time_max=1.0,
    ),
    Specimen(
        "ernie_image",
        "ErnieImageTransformer2DModel",
        dict(
            hidden_size=WIDTH,
            num_attention_heads=4,
            num_layers=3,
            ffn_hidden_size=96,
            in_channels=4,
            out_channels=4,
            patch_size=2,
            text_in_dim=32,
            rope_axes_dim=(4, 6, 6),
        ),
        _ernie,
        "after",
    ),
    Specimen(
        "joy_image",
        "JoyImageEditTransformer3DModel",
        dict(
            in_channels=4, hidden_size=WIDTH, num_attention_heads=4, text_dim=32, num_layers=2, rope_dim_list=[4, 6, 6]
        ),
        _joy,
        "after",
    ),
]

"""Video transformers in miniature: width 64, four heads of 16, at least two blocks of each kind."""

from typing import Any

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_rotary_pos_embed_allegro
from torch import Tensor
from zoo_base import TEXT, Grid, Specimen, noise, pooled, positions, text, text_mask, tokens, volume

WIDTH = 64


def _caption(grid: Grid) -> dict[str, Any]:
    return {"hidden_states": volume(grid), "encoder_hidden_states": text(grid)}


def _masked(grid: Grid) -> dict[str, Any]:
    return _caption(grid) | {"encoder_attention_mask": text_mask(grid)}


def _wan_i2v(grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": volume(grid, 12),
        "encoder_hidden_states": text(grid, length=512),
        "encoder_hidden_states_image": text(grid, 24, 9, seed=3),
    }


def _wan_vace(grid: Grid) -> dict[str, Any]:
    # All samples share the scales, one for each control block.
    return _caption(grid) | {"control_hidden_states": volume(grid, 8), "control_hidden_states_scale": torch.ones(2)}


def _per_token(timestep: Tensor, grid: Grid) -> Tensor:
    """Wan 2.2 TI2V: one timestep per token, zero on the first frame, which is given."""
    rows = timestep[:, None].repeat(1, grid.frames * grid.height * grid.width)
    rows[:, : grid.height * grid.width] = 0
    return rows


def _cogvideox(grid: Grid) -> dict[str, Any]:
    """Latents are [B, F, C, H, W] in this family."""
    spans = ((0, 0), (grid.height, grid.width))
    rotary = get_3d_rotary_pos_embed(16, spans, (grid.height, grid.width), grid.frames)
    return {
        "hidden_states": noise(grid.batch, grid.frames, 4, 2 * grid.height, 2 * grid.width),
        "encoder_hidden_states": text(grid),
        "image_rotary_emb": rotary,
    }


def _consisid(grid: Grid) -> dict[str, Any]:
    return _cogvideox(grid) | {
        "id_cond": pooled(grid, 32),
        "id_vit_hidden": [text(grid, 16, 9, seed=layer) for layer in range(2)],
    }


def _hunyuan(grid: Grid) -> dict[str, Any]:
    return _masked(grid) | {"pooled_projections": pooled(grid), "guidance": torch.full((grid.batch,), 6000.0)}


def _hunyuan15(grid: Grid) -> dict[str, Any]:
    return _masked(grid) | {
        "encoder_hidden_states_2": text(grid, 24, 8, seed=3),
        "encoder_attention_mask_2": text_mask(grid, 8),
        "image_embeds": torch.zeros(grid.batch, 6, 16),
    }


def _framepack(grid: Grid) -> dict[str, Any]:
    return _hunyuan(grid) | {
        "image_embeds": text(grid, 16, 6, seed=3),
        "indices_latents": torch.arange(grid.frames) + 7,
        "latents_clean": volume(grid._replace(frames=1)),
        "indices_latents_clean": torch.tensor([6]),
        "latents_history_2x": volume(grid._replace(frames=2)),
        "indices_latents_history_2x": torch.tensor([4, 5]),
        "latents_history_4x": volume(grid._replace(frames=4)),
        "indices_latents_history_4x": torch.arange(4),
    }


def _ltx(grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": tokens(grid),
        "encoder_hidden_states": text(grid),
        "encoder_attention_mask": text_mask(grid),
        "num_frames": grid.frames,
        "height": grid.height,
        "width": grid.width,
    }


def _ltx2(grid: Grid) -> dict[str, Any]:
    return _ltx(grid) | {
        "audio_hidden_states": noise(grid.batch, 10, 16, seed=3),
        "audio_encoder_hidden_states": text(grid, seed=4),
        "audio_encoder_attention_mask": text_mask(grid),
        "audio_num_frames": 10,
    }


def _allegro(grid: Grid) -> dict[str, Any]:
    spans = ((0, 0), (grid.height, grid.width))
    sizes = (grid.frames, grid.height, grid.width)
    *tables, _, _, _ = get_3d_rotary_pos_embed_allegro(24, spans, sizes[1:], sizes[0])
    return _caption(grid) | {
        "attention_mask": torch.ones(grid.batch, grid.frames, 2 * grid.height, 2 * grid.width),
        "encoder_attention_mask": text_mask(grid),
        "image_rotary_emb": (tuple(tables), tuple(positions(*sizes).long().T[:, None])),
    }


def _cosmos(grid: Grid) -> dict[str, Any]:
    return _caption(grid) | {"fps": 24, "padding_mask": torch.zeros(1, 1, 2 * grid.height, 2 * grid.width)}


def _kandinsky(grid: Grid) -> dict[str, Any]:
    """Latents are [B, F, H, W, C] in this family."""
    return {
        "hidden_states": volume(grid).movedim(1, -1),
        "encoder_hidden_states": text(grid),
        "pooled_projections": pooled(grid),
        "visual_rope_pos": [torch.arange(n) for n in (grid.frames, grid.height, grid.width)],
        "text_rope_pos": torch.arange(TEXT),
    }


_HEADS = dict(num_attention_heads=4, attention_head_dim=16)
_WAN = dict(**_HEADS, in_channels=4, out_channels=4, text_dim=32, freq_dim=32, ffn_dim=128, num_layers=3)
_COGVIDEOX = dict(
    **_HEADS,
    num_layers=3,
    in_channels=4,
    out_channels=4,
    time_embed_dim=32,
    text_embed_dim=32,
    max_text_seq_length=TEXT,
    sample_width=12,
    sample_height=8,
    sample_frames=13,
    use_rotary_positional_embeddings=True,
)
_HUNYUAN = dict(
    **_HEADS,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    num_single_layers=2,
    num_refiner_layers=1,
    text_embed_dim=32,
    pooled_projection_dim=24,
    rope_axes_dim=(4, 6, 6),
)
_SANA = dict(num_cross_attention_heads=4, cross_attention_head_dim=16, cross_attention_dim=WIDTH, caption_channels=32)
_COSMOS = dict(
    **_HEADS, in_channels=4, out_channels=4, num_layers=3, text_embed_dim=32, adaln_lora_dim=16, max_size=(8, 16, 16)
)

VIDEO = [
    Specimen("wan", "WanTransformer3DModel", _WAN, _caption, "cross", video=True),
    Specimen("wan_ti2v", "WanTransformer3DModel", _WAN, _caption, "cross", time_shape=_per_token, video=True),
    # Image tokens have keys and values of their own (add_k_proj), attended to by a second call. The attention processor
    # finds them by counting 512 text tokens from the end, so no other text length works.
    Specimen(
        "wan_i2v",
        "WanTransformer3DModel",
        _WAN | dict(in_channels=12, image_dim=24, added_kv_proj_dim=WIDTH),
        _wan_i2v,
        "cross",
        video=True,
    ),
    Specimen(
        "wan_vace",
        "WanVACETransformer3DModel",
        _WAN | dict(num_layers=4, vace_layers=[0, 2], vace_in_channels=8),
        _wan_vace,
        "cross",
        video=True,
    ),
    Specimen("skyreels_v2", "SkyReelsV2Transformer3DModel", _WAN, _caption, "cross", video=True),
    Specimen("chronoedit", "ChronoEditTransformer3DModel", _WAN, _caption, "cross", video=True),
    Specimen("cogvideox", "CogVideoXTransformer3DModel", _COGVIDEOX, _cogvideox, "before", video=True),
    Specimen(
        "consisid",
        "ConsisIDTransformer3DModel",
        # The face extractor's output is two thirds of the width, hence 96 and 64.
        _COGVIDEOX
        | dict(
            num_attention_heads=6,
            num_layers=4,
            is_train_face=True,
            cross_attn_interval=2,
            cross_attn_dim_head=16,
            cross_attn_num_heads=2,
            LFE_id_dim=32,
            LFE_vit_dim=16,
            LFE_depth=4,
            LFE_dim_head=16,
            LFE_num_heads=2,
            LFE_num_id_token=2,
            LFE_num_querie=4,
            LFE_output_dim=64,
            LFE_num_scale=2,
        ),
        _consisid,
        "before",
        video=True,
    ),
    Specimen("hunyuan_video", "HunyuanVideoTransformer3DModel", _HUNYUAN, _hunyuan, "after", video=True),
    Specimen(
        "hunyuan_framepack",
        "HunyuanVideoFramepackTransformer3DModel",
        _HUNYUAN | dict(has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True),
        _framepack,
        "after",
        video=True,
    ),
    Specimen(
        "hunyuan_video15",
        "HunyuanVideo15Transformer3DModel",
        dict(
            **_HEADS,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            num_refiner_layers=1,
            patch_size=2,
            text_embed_dim=32,
            text_embed_2_dim=24,
            image_embed_dim=16,
            rope_axes_dim=(4, 6, 6),
        ),
        _hunyuan15,
        "after",
        video=True,
    ),
    Specimen(
        "motif_video",
        "MotifVideoTransformer3DModel",
        dict(
            **_HEADS,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_single_layers=2,
            text_embed_dim=32,
            rope_axes_dim=(4, 6, 6),
        ),
        _masked,
        "after",
        video=True,
    ),
    Specimen(
        "ltx",
        "LTXVideoTransformer3DModel",
        dict(**_HEADS, in_channels=16, out_channels=16, cross_attention_dim=WIDTH, caption_channels=32, num_layers=3),
        _ltx,
        "cross",
        video=True,
    ),
    Specimen(
        "ltx2",
        "LTX2VideoTransformer3DModel",
        dict(
            **_HEADS,
            in_channels=16,
            out_channels=16,
            cross_attention_dim=WIDTH,
            audio_in_channels=16,
            audio_out_channels=16,
            audio_num_attention_heads=4,
            audio_attention_head_dim=8,
            audio_cross_attention_dim=32,
            caption_channels=32,
            num_layers=2,
        ),
        _ltx2,
        "cross",
        latents=("hidden_states", "audio_hidden_states"),
        video=True,
    ),
    Specimen(
        "mochi",
        "MochiTransformer3DModel",
        dict(
            **_HEADS,
            num_layers=3,
            pooled_projection_dim=32,
            in_channels=4,
            text_embed_dim=32,
            time_embed_dim=32,
            max_sequence_length=TEXT,
        ),
        _masked,
        "after",
        time_rises=True,
        video=True,
    ),
    # Rotary axes take a third of the head each, in pairs, hence 24.
    Specimen(
        "allegro",
        "AllegroTransformer3DModel",
        dict(
            num_attention_heads=4,
            attention_head_dim=24,
            num_layers=3,
            cross_attention_dim=96,
            sample_height=8,
            sample_width=12,
            sample_frames=4,
            caption_channels=32,
        ),
        _allegro,
        "cross",
        video=True,
    ),
    Specimen(
        "latte",
        "LatteTransformer3DModel",
        dict(
            **_HEADS,
            num_layers=2,
            in_channels=4,
            out_channels=8,
            patch_size=2,
            sample_size=16,
            cross_attention_dim=WIDTH,
            attention_bias=True,
            activation_fn="gelu-approximate",
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            caption_channels=32,
            video_length=4,
        ),
        _caption,
        "cross",
        video=True,
        odd=(4, 5, 7),
    ),
    Specimen("cosmos", "CosmosTransformer3DModel", _COSMOS, _cosmos, "cross", time_max=1.0, video=True),
    Specimen(
        "easyanimate",
        "EasyAnimateTransformer3DModel",
        dict(
            **_HEADS,
            in_channels=4,
            out_channels=4,
            patch_size=2,
            sample_width=12,
            sample_height=8,
            num_layers=3,
            mmdit_layers=2,
            time_embed_dim=32,
            text_embed_dim=32,
        ),
        _caption,
        "before",
        video=True,
    ),
    Specimen(
        "sana_video",
        "SanaVideoTransformer3DModel",
        dict(**_HEADS, **_SANA, in_channels=4, out_channels=4, num_layers=2),
        lambda grid: _caption(grid) | {"encoder_attention_mask": text_mask(grid, dtype=torch.float32)},
        "cross",
        video=True,
    ),
    Specimen(
        "kandinsky5",
        "Kandinsky5Transformer3DModel",
        dict(
            in_text_dim=32,
            in_text_dim2=24,
            time_dim=32,
            model_dim=WIDTH,
            ff_dim=96,
            num_text_blocks=2,
            num_visual_blocks=2,
            axes_dims=(4, 6, 6),
        ),
        _kandinsky,
        "cross",
        video=True,
    ),
]

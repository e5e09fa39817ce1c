"""Video transformers in miniature: width 64, four heads of 16, at least two blocks of each kind."""

from typing import Any

import torch
from torch import Tensor
from zoo_base import Grid, Specimen, noise

TEXT = 12
WIDTH = 64


def _latents(grid: Grid, channels: int = 4, patch: int = 2) -> Tensor:
    return noise(grid.batch, channels, grid.frames, grid.height * patch, grid.width * patch)


def _text(grid: Grid, width: int = 32, length: int = TEXT, seed: int = 1) -> Tensor:
    return noise(grid.batch, length, width, seed=seed)


def _mask(grid: Grid, length: int = TEXT, kept: int = TEXT - 3, dtype: torch.dtype = torch.bool) -> Tensor:
    """Text mask: all tokens of the first sample, the first ``kept`` of the others."""
    rows = torch.arange(length).expand(grid.batch, length)
    return ((rows < kept) | (torch.arange(grid.batch)[:, None] == 0)).to(dtype)


def _wan(grid: Grid) -> dict[str, Any]:
    return {"hidden_states": _latents(grid), "encoder_hidden_states": _text(grid)}


def _ltx(grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": noise(grid.batch, grid.frames * grid.height * grid.width, 16),
        "encoder_hidden_states": _text(grid),
        "encoder_attention_mask": _mask(grid),
        "num_frames": grid.frames,
        "height": grid.height,
        "width": grid.width,
    }


_HEADS = dict(num_attention_heads=4, attention_head_dim=16)
_WAN = dict(**_HEADS, in_channels=4, out_channels=4, text_dim=32, freq_dim=32, ffn_dim=128, num_layers=3)

VIDEO = [
    Specimen("wan", "WanTransformer3DModel", _WAN, _wan, "cross", video=True),
    Specimen(
        "ltx",
        "LTXVideoTransformer3DModel",
        dict(**_HEADS, in_channels=16, out_channels=16, cross_attention_dim=WIDTH, caption_channels=32, num_layers=3),
        _ltx,
        "cross",
        video=True,
    ),
]

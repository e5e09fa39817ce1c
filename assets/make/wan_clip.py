"""Wan's video VAE over a whole clip at once: equal to its frame-by-frame forward, several times faster to train.

The library's class walks through a clip in chunks with caches of earlier frames. Its causal convolutions give the same
over the whole clip; only the layers that change the frame rate treat the first frame apart and must be told so.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify, unpatchify
from torch import Tensor
from torch.nn.functional import conv3d


def _resample(self: Any, x: Tensor, feat_cache: Any = None, feat_idx: Any = None) -> Tensor:
    if feat_cache is not None:
        return type(self).forward(self, x, feat_cache, feat_idx)
    batch, channels, frames, height, width = x.shape
    if self.mode == "upsample3d" and frames > 1:
        later = self.time_conv(x[:, :, 1:]).reshape(batch, 2, channels, frames - 1, height, width)
        later = torch.stack((later[:, 0], later[:, 1]), 3).reshape(batch, channels, 2 * (frames - 1), height, width)
        x = torch.cat([x[:, :, :1], later], 2)
    frames = x.shape[2]
    y = self.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, frames)).transpose(1, 2)
    if self.mode == "downsample3d" and frames > 1:
        later = conv3d(y, self.time_conv.weight, self.time_conv.bias, stride=(2, 1, 1))
        y = torch.cat([y[:, :, :1], later], 2)
    return y


def whole_clip(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Lets this instance's resampling layers take whole clips; its chunked ``encode`` and ``decode`` work as before."""
    for module in vae.modules():
        if isinstance(module, WanResample):
            module.forward = MethodType(_resample, module)
    return vae


def encode_clip(vae: AutoencoderKLWan, clip: Tensor) -> Tensor:
    """Mean and log variance, [B, 2 z, f, h, w], of ``clip`` [B, 3, F, H, W] in [-1, 1]."""
    return vae.quant_conv(vae.encoder(patchify(clip, vae.config.patch_size)))


def decode_clip(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """The clip [B, 3, F, H, W] of ``latents`` [B, z, f, h, w], not clamped."""
    return unpatchify(vae.decoder(vae.post_quant_conv(latents)), vae.config.patch_size)

"""`shapes_perceptual`: distance in the intermediate features of a CLIP image tower; lower is closer, 0 is identical.

Made like LPIPS (arXiv:1801.03924, eq. 1) without its learned weights, on the bundled evaluator, which knows the drawn
world of the bundled pipelines. It is no LPIPS, was fitted to nobody's judgement, and compares only with itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffaccel.eval.metrics.clip import OpenClip
from diffaccel.eval.metrics.features import inference
from diffaccel.eval.metrics.samples import as_pairs


def shapes_perceptual(clip: OpenClip, samples: Any, reference: Any, batch: int = 16) -> Tensor:
    """The mean over layers l and places p of |f_l(sample, p) - f_l(reference, p)|^2, with f_l(., p) the vector of all
    channels at p scaled to length 1; of a video, the mean over its frames.

    Args:
        clip: the bundled evaluator, or any other model of open_clip; its stem and stages (or blocks) are the layers.
        samples, reference: of the same shape, see `as_samples`; resized as the model wants it.
        batch: pairs of frames at once; higher = faster, more memory.

    Returns:
        float64 ``[N]`` in [0, 4].

    Raises:
        ValueError: not samples, or of different shapes.
    """
    a, b = as_pairs(samples, reference)
    pairs = zip(a.flatten(0, 1).split(batch), b.flatten(0, 1).split(batch), strict=True)
    with inference(clip.network) as device:
        distances = [_distance(_layers(clip, x.to(device)), _layers(clip, y.to(device))) for x, y in pairs]
    return torch.cat(distances).unflatten(0, a.shape[:2]).mean(1)


def _layers(clip: OpenClip, pictures: Tensor) -> list[Tensor]:
    """Unit features of each layer, ``[B, C, H, W]``."""
    tower: Any = clip.network.visual
    found = tower.forward_intermediates(clip.prepare(pictures), intermediates_only=True, output_fmt="NCHW")
    return [normalize(layer.float(), dim=1) for layer in found["image_intermediates"]]


def _distance(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """``[B]``"""
    layers = [(x - y).square().sum(1).mean((1, 2)) for x, y in zip(a, b, strict=True)]
    return torch.stack(layers).mean(0).double().cpu()

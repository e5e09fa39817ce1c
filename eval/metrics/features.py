"""Features of samples through any network: what Frechet distance and CMMD compare.

An extractor is an ``nn.Module`` or a function that maps a batch of pictures ``[B, C, H, W]`` in [0, 1] to features
``[B, D]``; it resizes and normalises by itself. For FVD (arXiv:1812.01717) it maps clips ``[B, F, C, H, W]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffaccel.eval.metrics.samples import as_samples

Extractor = Callable[[Tensor], Tensor]


def image_features(extractor: Extractor, samples: Any, batch: int = 32) -> np.ndarray:
    """Features of each sample; of a video, the mean over its frames.

    Args:
        extractor: pictures ``[B, C, H, W]`` in [0, 1] -> ``[B, D]``. A module is run in eval mode, on its device.
        samples: see `as_samples`.
        batch: pictures at once; higher = faster, more memory.

    Returns:
        float64 ``[N, D]``.

    Raises:
        ValueError: not samples, or the extractor gives anything but finite ``[B, D]``.
    """
    videos = as_samples(samples)
    count, frames = videos.shape[:2]
    return _extract(extractor, videos.flatten(0, 1), batch).reshape(count, frames, -1).mean(1)


def video_features(extractor: Extractor, videos: Any, batch: int = 4) -> np.ndarray:
    """Features of each whole video, for a Frechet video distance; as `image_features`, but the extractor maps
    ``[B, F, C, H, W]`` -> ``[B, D]``.

    Raises:
        ValueError: not videos, or the extractor gives anything but finite ``[B, D]``.
    """
    return _extract(extractor, as_videos(videos), batch)


def as_videos(videos: Any) -> Tensor:
    """As `as_samples`, ``[N, F, C, H, W]`` with at least two frames.

    Raises:
        ValueError: not samples, or images.
    """
    tensor = as_samples(videos)
    if tensor.shape[1] < 2:
        raise ValueError("expected videos of at least 2 frames, got images; pass a single video as [video]")
    return tensor


def as_rgb(pictures: Tensor) -> Tensor:
    """Pictures ``[..., C, H, W]`` with three channels; grey is repeated.

    Raises:
        ValueError: an alpha channel, whose background only the caller knows.
    """
    channels = pictures.shape[-3]
    if channels == 4:
        raise ValueError("this metric needs RGB: paste pictures with an alpha channel on a background before")
    return pictures.expand(*pictures.shape[:-3], 3, *pictures.shape[-2:]) if channels == 1 else pictures


def as_features(features: Any, name: str = "features") -> np.ndarray:
    """``features`` as finite float64 ``[N, D]``.

    Raises:
        ValueError: another shape, empty, NaN or infinity.
    """
    array = np.asarray(features.detach().cpu().double() if isinstance(features, Tensor) else features, np.float64)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"expected {name} as features [N, D], got shape {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: features hold NaN or infinity")
    return array


def _extract(extractor: Extractor, samples: Tensor, batch: int) -> np.ndarray:
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    with inference(extractor) as device:
        parts = [extractor(part.to(device)) for part in samples.split(batch)]
    for part, given in zip(parts, samples.split(batch), strict=True):
        if not isinstance(part, Tensor) or part.ndim != 2 or len(part) != len(given):
            got = list(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise ValueError(f"the extractor must give one row of features for each of {len(given)} samples, got {got}")
    return as_features(torch.cat(parts), "the extractor's output")


@contextmanager
def inference(network: Any) -> Iterator[torch.device]:
    """Runs ``network`` without gradients and, if it is a module, in eval mode; gives the device that it is on."""
    if not isinstance(network, nn.Module):
        with torch.no_grad():
            yield torch.device("cpu")
        return
    training = [module for module in network.modules() if module.training]
    parameter = next(network.parameters(), None)
    network.eval()
    try:
        with torch.no_grad():
            yield torch.device("cpu") if parameter is None else parameter.device
    finally:
        for module in training:
            module.training = True

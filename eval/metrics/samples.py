"""The one convention for images and videos that every metric accepts.

The first dimension, or a list, counts the *samples*; a video is one sample. Arrays have channels last, as diffusers'
``output_type="np"``; tensors have channels first, as ``output_type="pt"``. A single video ``[F, H, W, C]`` is therefore
passed as ``[video]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SLACK = 1e-3
"""How far a float sample may leave [0, 1]; more means another range, such as [-1, 1]."""


def as_samples(samples: Any) -> Tensor:
    """Bring ``samples`` into the form that metrics compute on.

    Args:
        samples: array ``[N, H, W, C]`` or ``[N, F, H, W, C]``, tensor ``[N, C, H, W]`` or ``[N, F, C, H, W]``, or a
            list of the same without N, of PIL images, or of lists of PIL images (videos). Floats in [0, 1] or uint8.

    Returns:
        float32 ``[N, F, C, H, W]`` in [0, 1] on the CPU; F is 1 for images. Integers are divided by 255.

    Raises:
        ValueError: no samples, another number of dimensions or channels, another range, or not finite.
    """
    if isinstance(samples, Sequence) and not isinstance(samples, str):
        if not samples:
            raise ValueError("no samples: expected at least one image or video")
        return torch.cat([_batched(sample) for sample in samples])
    return _checked(samples)


def _batched(sample: Any) -> Tensor:
    """One sample -> ``[1, F, C, H, W]``."""
    if isinstance(sample, Sequence):  # the frames of a video
        return torch.cat([_batched(frame) for frame in sample], dim=1)
    if not isinstance(sample, Tensor):
        sample = np.asarray(sample)  # PIL images become arrays
    return _checked(sample[None])


def _checked(samples: Any) -> Tensor:
    channels_last = not isinstance(samples, Tensor)
    tensor = torch.from_numpy(np.array(samples)) if channels_last else samples.detach().cpu()
    if tensor.ndim not in (4, 5):
        layout = "[N, H, W, C] or [N, F, H, W, C]" if channels_last else "[N, C, H, W] or [N, F, C, H, W]"
        raise ValueError(f"expected images or videos {layout}, got shape {list(tensor.shape)}")
    if tensor.ndim == 4:
        tensor = tensor[:, None]
    if channels_last:
        tensor = tensor.movedim(-1, -3)
    if tensor.shape[-3] not in (1, 3, 4) or 0 in tensor.shape:
        raise ValueError(f"expected 1, 3 or 4 channels and nothing empty, got {list(tensor.shape)} as [N, F, C, H, W]")
    if tensor.dtype == torch.uint8:
        return tensor.float() / 255
    if not tensor.is_floating_point():
        raise ValueError(f"expected floats in [0, 1] or uint8, got {tensor.dtype}")
    tensor = tensor.float()
    low, high = (float(v) for v in tensor.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("a sample holds NaN or infinity")
    if low < -_SLACK or high > 1 + _SLACK:
        raise ValueError(f"expected values in [0, 1], got [{low:.3g}, {high:.3g}]; map [-1, 1] by (x + 1) / 2")
    return tensor


def as_pairs(samples: Any, reference: Any) -> tuple[Tensor, Tensor]:
    """Both in the form of `as_samples`.

    Raises:
        ValueError: the two differ in shape.
    """
    a, b = as_samples(samples), as_samples(reference)
    if a.shape != b.shape:
        raise ValueError(f"samples {list(a.shape)} and reference {list(b.shape)} differ in shape [N, F, C, H, W]")
    return a, b

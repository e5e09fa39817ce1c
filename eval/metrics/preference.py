"""Scores by networks trained on people's choices; higher is better. The networks are other packages'.

Any function ``(picture, prompt) -> number`` is a scorer. `image_reward` (arXiv:2304.05977) and `hpsv2`
(arXiv:2306.09341) make scorers of those packages where they are installed; their weights come from the network once.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffaccel.eval.metrics.features import as_rgb
from diffaccel.eval.metrics.samples import as_samples

Scorer = Callable[[Image.Image, str], float]


def preference(scorer: Scorer, samples: Any, prompts: Sequence[str]) -> Tensor:
    """The score of each sample for its prompt; of a video, the mean over its frames.

    Args:
        scorer: (picture, prompt) -> number; pictures have 8 bit, as these networks were trained on files.
        samples: see `as_samples`.
        prompts: one for each sample.

    Returns:
        float64 ``[N]`` in the scorer's own unit.

    Raises:
        ValueError: not samples, another number of prompts, or a score that is not finite.
    """
    videos = as_rgb(as_samples(samples)).clamp(0, 1)
    if isinstance(prompts, str) or len(prompts) != len(videos):
        raise ValueError(f"need a list of one prompt for each of {len(videos)} samples, got {prompts!r}")
    arrays = (255 * videos).round().byte().movedim(-3, -1).numpy()  # [N, F, H, W, 3]
    scores = [
        [float(scorer(Image.fromarray(frame), prompt)) for frame in video]
        for video, prompt in zip(arrays, prompts, strict=True)
    ]
    for prompt, row in zip(prompts, scores, strict=True):
        if not all(map(math.isfinite, row)):
            raise ValueError(f"the scorer gave {row} for {prompt!r}")
    return torch.tensor(scores, dtype=torch.float64).mean(1)


def image_reward(name: str = "ImageReward-v1.0") -> Scorer:
    """The scorer of the package image-reward, about a normal distribution over its training prompts.

    Raises:
        ImportError: it is not installed, or does not run with what is.
    """
    model = _package("ImageReward", "image-reward").load(name)
    return lambda picture, prompt: model.score(prompt, picture)


def hpsv2(version: str = "v2.1") -> Scorer:
    """The scorer of the package hpsv2, about 0.2 to 0.4.

    Raises:
        ImportError: it is not installed, or does not run with what is.
    """
    package = _package("hpsv2", "hpsv2")
    return lambda picture, prompt: package.score(picture, prompt, hps_version=version)[0]


def _package(module: str, pip_name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this score needs the package {pip_name}: pip install {pip_name} ({error})") from error

"""CLIP scores in percent: 100 times the cosine of two CLIP embeddings, from -100 to 100.

Scores of different CLIP models do not compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from diffaccel.eval.metrics.clip import Clip
from diffaccel.eval.metrics.features import as_videos


def clip_score(clip: Clip, samples: Any, prompts: Sequence[str]) -> Tensor:
    """How well each sample fits its prompt (arXiv:2104.08718, with weight 100 and not cut at 0, so that means stay
    unbiased); higher is better. Of a video it is CLIPSIM (arXiv:2104.14806): the mean over its frames.

    Args:
        clip: see `load_clip`.
        samples: see `as_samples`.
        prompts: one for each sample.

    Returns:
        float64 ``[N]``.

    Raises:
        ValueError: not samples, or another number of prompts.
    """
    frames = clip.frames(samples)
    if isinstance(prompts, str) or len(prompts) != len(frames):
        got = "one string" if isinstance(prompts, str) else str(len(prompts))
        raise ValueError(f"need a list of one prompt for each of {len(frames)} samples, got {got}")
    words = clip.texts(prompts)
    return 100 * (frames.double() * words[:, None].double()).sum(-1).mean(1)


def clip_temporal_consistency(clip: Clip, videos: Any) -> Tensor:
    """How alike neighbouring frames of each video are: the mean cosine of their image embeddings (as in
    arXiv:2302.03011); higher is steadier, and a still picture is 100.

    Args:
        clip: see `load_clip`.
        videos: of at least 2 frames, see `as_samples`.

    Returns:
        float64 ``[N]``.

    Raises:
        ValueError: not videos.
    """
    frames = clip.frames(as_videos(videos)).double()
    return 100 * (frames[:, 1:] * frames[:, :-1]).sum(-1).mean(1)

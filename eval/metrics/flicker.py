"""Temporal difference error: how a video changes from frame to frame, against its reference; lower is closer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffaccel.eval.metrics.features import as_videos
from diffaccel.eval.metrics.samples import as_pairs


def temporal_difference_error(videos: Any, reference: Any) -> Tensor:
    """For frames s_1 .. s_F of a video and r_1 .. r_F of its reference,

        1 / (F - 1)  sum_t  mean | (s_{t+1} - s_t) - (r_{t+1} - r_t) |

    with the inner mean over pixels and channels. An error that stays the same over time, such as another brightness,
    counts nothing; flicker, popping and other motion do. PSNR sees the first and hardly tells the others apart.

    Args:
        videos, reference: of the same shape and at least 2 frames, see `as_samples`.

    Returns:
        float64 ``[N]`` in [0, 2], in units of the full range of a channel.

    Raises:
        ValueError: not videos, or of different shapes.
    """
    a, b = as_pairs(as_videos(videos), as_videos(reference))
    return (a.double().diff(dim=1) - b.double().diff(dim=1)).abs().flatten(1).mean(1)

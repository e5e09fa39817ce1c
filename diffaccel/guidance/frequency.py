"""FasterCache's mix: low and high frequencies of the branches' difference matter at different times.

The difference that is used again is split at a circle around frequency zero with a fifth of the smaller side as radius
(arXiv:2410.19355, sec. 3.3, and diffusers); its low frequencies are raised by a tenth in the middle of the schedule,
its high ones at the end. diffusers raises them anew at each step that leaves the branch out, here they are once.
"""

from __future__ import annotations

import torch
from torch import Tensor

RAISED = 1.1
LOW_RANGE = (0.1, 0.9)
HIGH_RANGE = (0.7, 1.0)
"""Of progress: timesteps 99 to 901 and below 301 of 1000, as diffusers has them."""


def mixed(difference: Tensor, progress: float) -> Tensor:
    """``difference`` [..., H, W] with its frequencies weighted for a step; tokens, of unknown grid, as they are."""
    low = RAISED if LOW_RANGE[0] <= progress <= LOW_RANGE[1] else 1.0
    high = RAISED if HIGH_RANGE[0] <= progress <= HIGH_RANGE[1] else 1.0
    if difference.ndim < 4 or low == high:
        return difference if difference.ndim < 4 else low * difference
    height, width = difference.shape[-2:]
    radius = min(height, width) // 5
    rows = torch.fft.fftfreq(height, 1 / height, device=difference.device)
    columns = torch.fft.fftfreq(width, 1 / width, device=difference.device)
    inner = rows[:, None].square() + columns.square() <= radius**2
    return torch.fft.ifft2(torch.fft.fft2(difference.float()) * torch.where(inner, low, high)).real

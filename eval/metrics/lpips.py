"""LPIPS (arXiv:1801.03924), computed by torchmetrics; lower is closer, 0 is identical.

Its learned weights ship with torchmetrics, the backbone's are torchvision's and come from the network once.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from diffaccel.eval.metrics.features import as_rgb
from diffaccel.eval.metrics.samples import as_pairs

_SMALLEST = 64  # below, the deepest layers see next to nothing


class Lpips:
    """LPIPS of samples against a reference; holds the network.

    Args:
        backbone: ``"alex"`` (the paper's choice for comparing pictures), ``"vgg"`` or ``"squeeze"``.
        device: where it runs.

    Raises:
        ImportError: torchvision is not installed.
        ValueError: no such backbone, or its weights cannot be had; the message says where to put them.
    """

    higher_is_better = False

    def __init__(
        self, backbone: Literal["alex", "vgg", "squeeze"] = "alex", device: str | torch.device = "cpu"
    ) -> None:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        try:
            with torch.random.fork_rng(devices=[]):  # layers draw weights before they load them
                metric = LearnedPerceptualImagePatchSimilarity(backbone, reduction="none", normalize=True)
        except ModuleNotFoundError as error:
            raise ImportError("LPIPS needs torchvision: pip install torchvision") from error
        except OSError as error:  # what a download without network raises
            raise ValueError(
                f"weights of LPIPS's backbone {backbone!r} cannot be had: {error}. With network they are loaded once; "
                f"without, put torchvision's file into {torch.hub.get_dir()}/checkpoints"
            ) from error
        self.metric, self.device = metric.to(device), torch.device(device)

    def __call__(self, samples: Any, reference: Any) -> Tensor:
        """LPIPS of each sample; of a video, the mean over its frames.

        Args:
            samples, reference: of the same shape, at least 64 x 64 pixels, see `as_samples`.

        Returns:
            float64 ``[N]``.

        Raises:
            ValueError: not samples, of different shapes, or too small.
        """
        a, b = as_pairs(samples, reference)
        if min(a.shape[-2:]) < _SMALLEST:
            raise ValueError(
                f"LPIPS needs at least {_SMALLEST} x {_SMALLEST} pixels, got {a.shape[-2]} x {a.shape[-1]}"
            )
        values = [self._video(x, y) for x, y in zip(as_rgb(a), as_rgb(b), strict=True)]
        return torch.stack(values).double().cpu()

    @torch.no_grad()
    def _video(self, frames: Tensor, reference: Tensor) -> Tensor:
        """One frame at a time, so that long videos fit."""
        pairs = zip(frames.clamp(0, 1).split(1), reference.clamp(0, 1).split(1), strict=True)
        distances = [self.metric(x.to(self.device), y.to(self.device)) for x, y in pairs]
        self.metric.reset()
        return torch.stack(distances).mean()

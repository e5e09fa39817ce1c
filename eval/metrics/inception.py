"""The Inception network of FID and Inception score as its authors ported it from TensorFlow, by torch-fidelity."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from diffaccel.eval.metrics.features import as_rgb


class Inception(nn.Module):
    """An extractor for `image_features`: pictures ``[B, C, H, W]`` in [0, 1] -> ``[B, 2048]``.

    Pictures are rounded to 8 bit and resized as TensorFlow did it, so that numbers compare with published ones.

    Args:
        weights: file of the weights; None loads them from the network once.

    Raises:
        ImportError: torch-fidelity is not installed.
        ValueError: the weights cannot be had; the message says which file to fetch.
    """

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError("Inception features need torch-fidelity: pip install torch-fidelity") from error
        path = None if weights is None else str(weights)
        try:
            with torch.random.fork_rng(devices=[]):  # layers draw weights before they load them
                self.network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], path)
        except OSError as error:  # no such file, or what a download without network raises
            raise ValueError(
                f"the Inception weights cannot be had: {error}. Fetch {URL_INCEPTION_V3} and give the file as weights, "
                f"or take a CLIP tower as extractor"
            ) from error

    def forward(self, pictures: Tensor) -> Tensor:
        return self._run(pictures)[0]

    @torch.no_grad()
    def probabilities(self, pictures: Tensor) -> Tensor:
        """Class probabilities ``[B, 1008]`` for `inception_score`."""
        return self._run(pictures)[1].softmax(-1)

    def _run(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        return self.network((as_rgb(pictures).clamp(0, 1) * 255).round().byte())

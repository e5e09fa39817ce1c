"""The pipelines that ship with diffaccel: tiny, trained on a drawn world of coloured shapes. No torch.

Real diffusers pipelines with every part trained (text encoder, denoiser, VAE), good for trying things out and for
measuring speed against quality without a download, not for pictures of anything else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffaccel.assets import path
from diffaccel.errors import ModelError, did_you_mean


@dataclass(frozen=True)
class Bundled:
    """One bundled pipeline.

    Args:
        kind: ``image`` or ``video``.
        folder: its folder among the assets.
        evaluation: name of the prompt set to report on.
        tuning: name of another one to choose settings on, so that what is reported was not chosen for it.
        example: a prompt it understands.
        call: the arguments its call needs; the user's own go first.
    """

    kind: str
    folder: str
    evaluation: str
    tuning: str
    example: str
    call: Mapping[str, Any] = field(repr=False)

    @property
    def path(self) -> Path:
        return path(self.folder)

    def prompts(self) -> list[str]:
        """The prompts to report on."""
        return _lines(self.evaluation)

    def tuning_prompts(self) -> list[str]:
        """The prompts to choose settings on: none of ``prompts``."""
        return _lines(self.tuning)

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of ``prompt`` that the tokenizer has never seen; they change nothing but noise."""
        known = _vocabulary(self.path / "tokenizer" / "tokenizer.json")
        return [w for w in dict.fromkeys(re.findall(r"\w+|[^\w\s]+", prompt.lower())) if w not in known]


BUNDLED: Mapping[str, Bundled] = MappingProxyType(
    {
        "bundled:image": Bundled(
            "image",
            "shapes-image",
            "heldout_image",
            "tuning_image",
            "a large red circle on the left on a gray background",
            MappingProxyType(
                {
                    "num_inference_steps": 20,
                    "guidance_scale": 4.0,
                    "height": 256,
                    "width": 256,
                    "max_sequence_length": 32,
                    "use_resolution_binning": False,
                    "clean_caption": False,
                }
            ),
        ),
        "bundled:video": Bundled(
            "video",
            "shapes-video",
            "heldout_video",
            "tuning_video",
            "a small yellow square moving left on a black background",
            MappingProxyType(
                {
                    "num_inference_steps": 20,
                    "guidance_scale": 4.0,
                    "height": 96,
                    "width": 96,
                    "num_frames": 13,
                    "max_sequence_length": 32,
                }
            ),
        ),
    }
)


def bundled(name: str) -> Bundled:
    """The bundled pipeline of this name.

    Raises:
        ModelError: there is none; the message names those that exist.
    """
    if name not in BUNDLED:
        raise ModelError(f"no bundled pipeline {name!r}{did_you_mean(name, BUNDLED)}")
    return BUNDLED[name]


def _lines(name: str) -> list[str]:
    return path(f"prompts/{name}.txt").read_text().splitlines()


@cache
def _vocabulary(file: Path) -> frozenset[str]:
    import json

    return frozenset(json.loads(file.read_text())["model"]["vocab"])

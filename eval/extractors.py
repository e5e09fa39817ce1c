"""Networks that give features of samples, by what users write after ``fid=``, ``cmmd=`` or ``fvd=``.

==========================  =======================================================================================
``inception``               the Inception network of published FIDs; fetches its weights once
``inception:FILE``          likewise, from this file
``local-dir:FOLDER``        the image tower of an open_clip model in a folder
``hf-hub:NAME``             likewise, from the hub
``ViT-B-32:openai``         likewise, an architecture and a tag of its weights
``torchscript:FILE``        a scripted network: pictures ``[B, C, H, W]`` or clips ``[B, F, C, H, W]`` in [0, 1] -> D
``python:package:NAME``     what the function NAME of an importable module returns, called without arguments
==========================  =======================================================================================
"""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import Any

import torch

from diffaccel.eval.metrics.features import Extractor, image_features, video_features

_EVALUATOR = "shapes-clip"
_PROBE_FRAMES = 16


def bundled_tower() -> str:
    """The setting that names the evaluator that ships with diffaccel.

    Raises:
        FileNotFoundError: it does not ship.
    """
    from diffaccel.assets import path

    return f"local-dir:{path(_EVALUATOR)}"


@cache
def extractor_of(setting: str) -> Extractor:
    """The network that ``setting`` names, loaded once.

    Raises:
        ImportError: its package is not installed.
        ValueError: no such network, or it cannot be had.
    """
    kind, _, rest = setting.partition(":")
    if kind == "inception":
        from diffaccel.eval.metrics.inception import Inception

        return Inception(rest or None)
    if kind == "torchscript":
        return _scripted(rest)
    if kind == "python":
        return imported(rest)
    from diffaccel.eval.metrics.clip import load_clip

    if kind in ("local-dir", "hf-hub"):
        return load_clip(setting)
    return load_clip(*setting.split(":", 1))


def _scripted(file: str) -> Extractor:
    if not Path(file).expanduser().is_file():
        raise ValueError(f"no file {file!r}; give a network that torch.jit.save wrote")
    try:
        return torch.jit.load(str(Path(file).expanduser()), map_location="cpu").eval()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{file!r} is no network that torch.jit.save wrote: {reason:.200}") from None


def imported(name: str) -> Any:
    """What the function ``package.module:function`` returns, called without arguments.

    Raises:
        ValueError: there is no such function, or what it returns cannot be called.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"write python:package.module:function, got python:{name}")
    try:
        extractor = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"python:{name}: {error}") from None
    if not callable(extractor):
        raise ValueError(f"python:{name} returned {type(extractor).__name__}, which cannot be called")
    return extractor


def features_of(extractor: Extractor, sample: Any, *, video: bool) -> Any:
    """Features of one sample ``[F, H, W, C]``, float64 ``[D]``: of each frame in the mean, or of the clip as a whole.

    Raises:
        ValueError: the extractor gives anything but finite features.
    """
    return (video_features if video else image_features)(extractor, [sample])[0]


def dimensions(extractor: Extractor, *, video: bool, size: tuple[int, int] = (64, 64)) -> int:
    """How many features it gives, found on a black picture or clip.

    Raises:
        ValueError: it cannot take one.
    """
    import numpy as np

    black = np.zeros((_PROBE_FRAMES if video else 1, *size, 3), np.uint8)
    try:
        return int(features_of(extractor, black, video=video).size)
    except Exception as error:  # any network of the user's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"the extractor cannot take a black {'clip' if video else 'picture'}: {reason:.300}") from None

"""Samples as files: pictures as PNG, clips as mp4 to watch or as frames without losses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SUFFIXES = (".npy", ".png", ".mp4")
"""From exact to lossy: the order in which a sample is looked for."""


SMALL = 2**20
"""Clips of up to so many values keep their frames in any case: they lose most in an mp4, and take little room."""


def to_bytes(sample: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] -> uint8, rounded."""
    return (sample.clip(0, 1) * 255).round().astype(np.uint8)


def suffixes_of(sample: np.ndarray, *, exact: bool, lossless: bool) -> tuple[str, ...]:
    """What a sample ``[F, H, W, C]`` is written as.

    Args:
        exact: also as it is, in float32, to be compared with to the bit.
        lossless: also as 8-bit frames, where a clip of more than `SMALL` values would only become an mp4.
    """
    frames, height, width, channels = sample.shape
    if frames == 1 and channels != 4:
        shown: tuple[str, ...] = (".png",)
    elif channels == 3 and frames > 1 and not (height % 2 or width % 2):
        shown = (".mp4",)
    else:  # mp4 holds no alpha and no odd sides
        shown = ()
    frames_too = shown == (".mp4",) and (lossless or sample.size <= SMALL)
    return (".npy", *shown) if exact or frames_too or not shown else shown


def write_sample(file: Path, sample: np.ndarray, *, exact: bool = False) -> None:
    """Write a sample in the form of the file's suffix; ``exact`` keeps floats in .npy."""
    if file.suffix == ".npy":
        np.save(file, sample if exact else to_bytes(sample))
        return
    images = [Image.fromarray(f.squeeze(-1) if f.shape[-1] == 1 else f) for f in to_bytes(sample)]
    if file.suffix == ".png":
        images[0].save(file)
    else:
        from diffaccel.pipelines.media import save_video

        save_video(images, file)


def read_sample(file: Path) -> np.ndarray:
    """A sample as float32 ``[F, H, W, C]`` in [0, 1]."""
    if file.suffix == ".npy":
        sample = np.load(file)
        return sample if sample.dtype == np.float32 else sample.astype(np.float32) / 255
    if file.suffix == ".mp4":
        import imageio

        with imageio.get_reader(file) as reader:
            return np.stack([np.asarray(frame) for frame in reader]).astype(np.float32) / 255
    pixels = np.asarray(Image.open(file), np.float32) / 255
    return pixels[None, ..., None] if pixels.ndim == 2 else pixels[None]

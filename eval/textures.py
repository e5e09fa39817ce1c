"""Reads the pattern of a background, one of ``scenes.TEXTURES``, from five numbers.

On drawn backgrounds each number leaves a wide gap between the patterns that it separates (400 backgrounds at 96 to 256
pixels): contrast is 0 for plain and above 14 elsewhere; the part of the contrast that no slope explains is below 0.03
for shaded and above 0.2 elsewhere; coherence of the gradients is above 0.99 for striped and below 0.38 for the rest;
half tones cover above 0.38 of cloudy and below 0.1 of the rest; light tones cover 0.48 to 0.53 of checked and below
0.18 or above 0.82 of dotted ones. The thresholds stand in the middle of the gaps.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

LEAST_GROUND = 200  # pixels; below, the picture is all object


def read_texture(pixels: np.ndarray, ground: np.ndarray) -> str:
    """The pattern of the pixels in ``ground``.

    Args:
        pixels: [size, size, 3], values 0 to 255.
        ground: [size, size], True where the background is, away from the edges of objects.
    """
    if ground.sum() < LEAST_GROUND:
        return "plain"
    gray = pixels.mean(-1)
    values = gray[ground]
    dark, light = np.percentile(values, (4, 96))
    contrast = float(light - dark)
    if contrast < 8:
        return "plain"
    rows, columns = np.nonzero(ground)
    plane = np.stack([columns, rows, np.ones_like(rows)], 1) / len(gray)
    slope, *_ = np.linalg.lstsq(plane, values, rcond=None)
    if (values - plane @ slope).std() < 0.11 * contrast:
        return "shaded"
    if _coherence(gray, ndimage.binary_erosion(ground, iterations=2)) > 0.7:
        return "striped"
    tone = (values - dark) / contrast
    if ((tone > 0.25) & (tone < 0.75)).mean() > 0.24:
        return "cloudy"
    return "checked" if 0.32 < (tone > 0.5).mean() < 0.68 else "dotted"


def _coherence(gray: np.ndarray, inside: np.ndarray) -> float:
    """How much the gradients agree in direction: 1 = all on one line, 0 = on none."""
    dx, dy = ndimage.sobel(gray, 1), ndimage.sobel(gray, 0)
    xx, yy, xy = ((product)[inside].mean() if inside.any() else 0.0 for product in (dx * dx, dy * dy, dx * dy))
    return float(np.hypot(xx - yy, 2 * xy) / (xx + yy + 1e-6))

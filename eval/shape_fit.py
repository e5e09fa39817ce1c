"""Fits the ideal shapes of the drawn world to a mask, free or partly hidden."""

from __future__ import annotations

from functools import cache

import numpy as np

from diffaccel.eval.scenes import SHAPES, SYMMETRY, signed_distance

Fit = tuple[str, float, float, float, float, float]  # shape, x, y, radius, angle, overlap
# A hidden part may be anything, which makes every shape fit better: a free fit this close to a hidden one is preferred.
MARGIN = 0.02
_NEIGHBOURS = np.stack(np.meshgrid(*[(-1, 0, 1)] * 3, indexing="ij"), -1).reshape(-1, 3)


def fit_shape(mask: np.ndarray, others: np.ndarray, touching: bool) -> Fit:
    """The ideal shape that overlaps most with ``mask``.

    Args:
        mask: [size, size] bool, what can be seen of one object.
        others: [size, size] bool, all other objects.
        touching: whether the object and another one touch, so that a part may be hidden.
    """
    free = fit_free(mask)
    if not touching:
        return free
    hidden = fit_hidden(mask, others)
    return free if free[-1] > hidden[-1] - MARGIN else hidden


@cache
def _ideal(shape: str) -> tuple[float, float, complex]:
    """Of the upright shape of radius 1: area, height of the centre of mass, moment that tells its orientation."""
    axis = np.linspace(-1.1, 1.1, 441)
    x, y = np.meshgrid(axis, axis)
    inside = signed_distance(shape, x, y, 1.0) < 0
    middle = float(y[inside].mean())
    moment = complex((((x + 1j * (y - middle))[inside]) ** (SYMMETRY[shape] or 1)).mean())
    return float(inside.mean() * 2.2**2), middle, moment


def _axes(size: int) -> tuple[np.ndarray, np.ndarray]:
    axis = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)  # half the time of float64
    return axis[None, :], axis[:, None]


def ideal_mask(shape: str, x: float, y: float, radius: float, angle: float, size: int) -> np.ndarray:
    ax, ay = _axes(size)
    dx, dy = ax - x, ay - y
    cos, sin = np.cos(angle), np.sin(angle)
    return signed_distance(shape, dx * cos + dy * sin, dy * cos - dx * sin, radius) < 0


def fit_free(mask: np.ndarray) -> Fit:
    """The ideal shape that overlaps most with a free object, by moments."""
    size = len(mask)
    rows, columns = np.nonzero(mask)
    x, y = (columns + 0.5) / size * 2 - 1, (rows + 0.5) / size * 2 - 1
    z = (x - x.mean()) + 1j * (y - y.mean())
    area = 4 * mask.mean()
    fits: list[Fit] = []
    for shape in SHAPES:
        unit_area, middle, moment = _ideal(shape)
        radius = float(np.sqrt(area / unit_area))
        order = SYMMETRY[shape]
        turned = float(np.angle((z**order).mean() / moment) / order) if order else 0.0
        for angle in {0.0, turned}:
            cx = float(x.mean() + middle * radius * np.sin(angle))
            cy = float(y.mean() - middle * radius * np.cos(angle))
            ideal = ideal_mask(shape, cx, cy, radius, angle, size)
            fits.append((shape, cx, cy, radius, angle, float((ideal & mask).sum() / (ideal | mask).sum())))
    return max(fits, key=lambda fit: fit[-1])


def fit_hidden(mask: np.ndarray, others: np.ndarray) -> Fit:
    """The upright shape that overlaps most with what can be seen of an object that touches ``others``.

    What lies under the others counts neither way. Centre and radius are searched from coarse to fine.
    """
    size = len(mask)
    rows, columns = np.nonzero(mask)
    middle = (np.array([columns.min() + columns.max(), rows.min() + rows.max()]) + 1) / size - 1
    extent = max(np.ptp(columns), np.ptp(rows)) / size
    top, bottom = max(0, rows.min() - size // 4), rows.max() + size // 4
    left, right = max(0, columns.min() - size // 4), columns.max() + size // 4
    ax, ay = _axes(size)
    stride = 2 if size > 64 else 1
    window = (slice(top, bottom, stride), slice(left, right, stride))
    ax, ay = ax[:, window[1]], ay[window[0]]
    wanted, counted = mask[window], ~others[window]

    def improved(fit: Fit, step: float) -> Fit:
        trials = np.array([*fit[1:3], fit[3]]) + step * _NEIGHBOURS
        trials = trials[trials[:, 2] > 0.1]
        x, y, radius = (trials[:, i, None, None].astype(np.float32) for i in range(3))
        ideal = (signed_distance(fit[0], ax - x, ay - y, radius) < 0) & counted
        overlap = (ideal & wanted).sum((1, 2)) / np.maximum(1, (ideal | (wanted & counted)).sum((1, 2)))
        best = int(overlap.argmax())
        cx, cy, r = map(float, trials[best])
        return fit[0], cx, cy, r, 0.0, float(overlap[best])

    fits: list[Fit] = [(shape, float(middle[0]), float(middle[1]), float(extent), 0.0, 0.0) for shape in SHAPES]
    for step, kept in ((0.14, 6), (0.07, 3), (0.035, 3), (0.0175, 3)):
        fits = sorted((improved(fit, step) for fit in fits), key=lambda fit: -fit[-1])[:kept]
    return fits[0]

"""What a picture or clip of the drawn world shows, read by image analysis: no network, numpy and scipy only.

    seen = see(image)                          # background, texture, objects with shape, colour, place, size
    check_image(image, "a large red circle on the left")     # {"count": True, "color": True, ..., "all": True}

Pixels are sorted by colour, their connected parts are objects. A free object is compared with each ideal shape of the
same centre of mass, area and orientation; one that another hides is fitted on what is left of it. The shape with the
highest overlap (intersection over union) is what is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from scipy import ndimage

from diffaccel.errors import InputError
from diffaccel.eval.scenes import (
    BACKGROUNDS,
    COLORS,
    PLACES,
    SHAPES,
    SIZES,
    SYMMETRY,
    Scene,
    parse,
)
from diffaccel.eval.shape_fit import fit_shape, ideal_mask
from diffaccel.eval.textures import read_texture

WORK_SIZE = 128  # larger pictures are averaged down to this before they are read
MIN_AREA = 0.006  # of the picture: smaller parts are specks
SHAPE_OVERLAP = 0.75  # below this overlap with the best ideal shape it is no clean shape
COLOR_DISTANCE = 60.0  # in RGB steps of 255; the nearest two colours of the world are 57 apart per side
PLACE_DISTANCE = 0.2
LARGE = float(np.sqrt(SIZES["small"] * SIZES["large"]))  # radius between small and large
TRAVEL = 0.3  # least way of a moving object over the clip
GROWTH = 0.35  # least change of log radius of a growing one
ROTATION = np.deg2rad(40)  # least angle of a rotating one


@dataclass(frozen=True)
class Seen:
    """One object as seen: centre, radius and angle (radians, clockwise, within its symmetry) of the ideal shape that
    fits best; ``overlap`` with it in [0, 1]; ``error`` = distance of its colour from the nearest known one;
    ``area`` = share of the picture."""

    shape: str
    color: str
    x: float
    y: float
    radius: float
    angle: float
    overlap: float
    error: float
    area: float

    @property
    def size(self) -> str:
        return "large" if self.radius > LARGE else "small"

    @property
    def place(self) -> str | None:
        """The nearest place, None if it is at none."""
        name = min(PLACES, key=lambda p: np.hypot(*np.subtract(PLACES[p], (self.x, self.y))))
        near = np.abs(np.subtract(PLACES[name], (self.x, self.y))).max() < PLACE_DISTANCE
        return name if near else None


@dataclass(frozen=True)
class View:
    """A whole picture as seen. ``front``: indices of two objects, the first of which hides a part of the second."""

    objects: tuple[Seen, ...]
    background: str
    texture: str
    front: tuple[int, int] | None

    def relation(self, first: int, second: int) -> str | None:
        """Of object ``first`` to object ``second``: a key of ``RELATIONS``, or None."""
        if self.front == (first, second):
            return "in front of"
        a, b = self.objects[first], self.objects[second]
        dx, dy = a.x - b.x, a.y - b.y
        if self.front or max(abs(dx), abs(dy)) < 0.3:
            return None
        if abs(dx) > abs(dy):
            return "left of" if dx < 0 else "right of"
        return "above" if dy < 0 else "below"


def see(image: Any) -> View:
    """Reads one picture.

    Args:
        image: [H, W, 3], square; uint8, or floats in [0, 1]; or a PIL image.

    Raises:
        InputError: not such a picture.
    """
    pixels = _pixels(image)
    size = pixels.shape[0]
    labels, background = _sort_pixels(pixels)
    found: list[tuple[np.ndarray, str, float]] = []
    for index in np.unique(labels[labels >= 0]):
        for mask in _parts(labels == index, (labels >= 0) & (labels != index)):
            inner = ndimage.binary_erosion(mask, iterations=max(1, size // 100))
            color = np.median(pixels[inner if inner.sum() > 10 else mask], axis=0)
            distances = [np.sqrt(((color - tone) ** 2).sum()) for tone in COLORS.values()]
            found.append((mask, list(COLORS)[int(np.argmin(distances))], float(min(distances))))
    everything = np.any([mask for mask, *_ in found], axis=0) if found else np.zeros((size, size), bool)
    objects = []
    for mask, color, error in found:
        others = everything & ~mask
        touching = bool((ndimage.binary_dilation(mask, iterations=2) & others).any())
        fit = fit_shape(mask, others, touching)
        objects.append(Seen(fit[0], color, *fit[1:], error, float(mask.mean())))
    texture = read_texture(pixels, ~ndimage.binary_dilation(everything, iterations=max(2, size // 40)))
    return View(tuple(objects), background, texture, _front(objects, [mask for mask, *_ in found]))


def _pixels(image: Any) -> np.ndarray:
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[0] != pixels.shape[1] or pixels.shape[2] != 3 or pixels.shape[0] < 32:
        raise InputError(f"the checker reads square RGB pictures [size, size, 3] from 32 pixels on, got {pixels.shape}")
    scale = 1.0 if pixels.dtype == np.uint8 else 255.0
    pixels = np.clip(pixels.astype(np.float32) * scale, 0, 255)
    factor = pixels.shape[0] // WORK_SIZE
    if factor > 1:
        size = pixels.shape[0] // factor
        pixels = pixels[: size * factor, : size * factor].reshape(size, factor, size, factor, 3).mean((1, 3))
    return pixels


@cache
def _palette() -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Tones of every colour and background, the index of the name each belongs to, and the names."""
    tones, owner = [], []
    for i, color in enumerate(COLORS.values()):
        tones += [np.array(color, np.float32) * light for light in (0.92, 1.0, 1.08)]
        owner += [i] * 3
    for i, (first, second) in enumerate(BACKGROUNDS.values()):
        tones += [np.array(first) + (np.array(second, np.float32) - first) * part for part in (0, 0.5, 1)]
        owner += [len(COLORS) + i] * 3
    return np.array(tones, np.float32), np.array(owner), (*COLORS, *BACKGROUNDS)


def _nearest(pixels: np.ndarray, tones: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """For each pixel the owner of the nearest tone: |p - t|^2 without the part that all tones share."""
    return owner[(pixels @ (-2 * tones.T) + (tones**2).sum(1)).argmin(-1)]


def _sort_pixels(pixels: np.ndarray) -> tuple[np.ndarray, str]:
    """Index of the colour of each pixel, -1 for background; and the background's name.

    Twice: pixels on edges are mixtures that look like a third colour, so the second pass knows only the colours that
    the first one found in solid areas.
    """
    tones, owner, names = _palette()
    first = _nearest(pixels, tones, owner)
    grounds = np.bincount(first[first >= len(COLORS)] - len(COLORS), minlength=len(BACKGROUNDS))
    ground = len(COLORS) + int(grounds.argmax())
    solid = [
        i
        for i in np.unique(first[first < len(COLORS)])
        if ndimage.binary_opening(first == i, iterations=max(1, len(first) // 64)).mean() > MIN_AREA / 4
    ]
    known = np.isin(owner, [*solid, ground])
    second = _nearest(pixels, tones[known], owner[known])
    return np.where(second == ground, -1, second), names[ground]


def _parts(mask: np.ndarray, others: np.ndarray) -> list[np.ndarray]:
    """The connected parts of ``mask`` that are no specks. Parts that only another object separates are one."""
    mask = ndimage.binary_opening(mask, iterations=max(1, len(mask) // 128))
    parts, count = ndimage.label(mask)
    masks = [parts == i for i in range(1, count + 1)]
    if count > 1:
        bridges, _ = ndimage.label(ndimage.binary_closing(mask | others, iterations=2))
        groups: dict[int, np.ndarray] = {}
        for part in masks:
            bridge = int(np.bincount(bridges[part]).argmax())
            groups[bridge] = groups.get(bridge, np.zeros_like(part)) | part
        masks = list(groups.values())
    return [part for part in masks if part.mean() >= MIN_AREA]


def _front(objects: Sequence[Seen], masks: Sequence[np.ndarray]) -> tuple[int, int] | None:
    """Of two objects whose ideal shapes overlap, the one that shows in the overlap, then the other."""
    if len(objects) != 2:
        return None
    size = len(masks[0])
    both = np.all([ideal_mask(o.shape, o.x, o.y, o.radius, o.angle, size) for o in objects], axis=0)
    shown = [int((both & mask).sum()) for mask in masks]
    if both.mean() < 0.002 or sum(shown) == 0:
        return None
    return (0, 1) if shown[0] > shown[1] else (1, 0)


def check_image(image: Any, wanted: str | Scene) -> dict[str, bool]:
    """Whether ``image`` shows what the caption says.

    Args:
        image: as for ``see``.
        wanted: a caption of the drawn world, or its scene.

    Returns:
        ``count`` (as many objects as asked for), ``color``, ``shape``, then ``size``, ``place``, ``relation``,
        ``texture`` and ``background`` as far as the caption mentions them; each is true if it holds for all objects.
        ``all``: every one of them.
    """
    scene = parse(wanted) if isinstance(wanted, str) else wanted
    view = see(image)
    verdict = {"count": len(view.objects) == len(scene.things)}
    chosen = _match(scene, view)
    pairs = [(thing, None if i is None else view.objects[i]) for thing, i in zip(scene.things, chosen, strict=True)]
    verdict["color"] = all(seen and seen.color == t.color and seen.error < COLOR_DISTANCE for t, seen in pairs)
    verdict["shape"] = all(seen and seen.shape == t.shape and seen.overlap > SHAPE_OVERLAP for t, seen in pairs)
    for name in ("size", "place"):
        asked = [(getattr(t, name), seen) for t, seen in pairs if getattr(t, name)]
        if asked:
            verdict[name] = all(bool(seen) and getattr(seen, name) == value for value, seen in asked)
    if scene.relation:
        both = None not in chosen
        verdict["relation"] = both and view.relation(*chosen) == scene.relation  # type: ignore[arg-type]
    if scene.texture:
        verdict["texture"] = view.texture == scene.texture
    if scene.background:
        verdict["background"] = view.background == scene.background
    return _judged(verdict)


def _match(scene: Scene, view: View) -> list[int | None]:
    """For each thing asked for the seen object it is compared with: by colour, then shape, then place."""
    free = list(range(len(view.objects)))
    chosen: list[int | None] = []
    for thing in scene.things:
        x, y = PLACES[thing.place or "center"]

        def unlike(i: int, thing: Any = thing, x: float = x, y: float = y) -> tuple[bool, bool, float]:
            seen = view.objects[i]
            return seen.color != thing.color, seen.shape != thing.shape, float(np.hypot(seen.x - x, seen.y - y))

        chosen.append(min(free, key=unlike) if free else None)
        free = [i for i in free if i != chosen[-1]]
    return chosen


@dataclass(frozen=True)
class Course:
    """What a clip shows over its frames. ``shape``: the one of highest summed overlap. ``motion``: one of ``MOTIONS``,
    or None if nothing moves. ``visible``: share of frames with an object."""

    shape: str
    color: str
    size: str
    background: str
    texture: str
    motion: str | None
    visible: float
    overlap: float
    error: float


def follow(frames: Any) -> Course:
    """Reads one clip, [F, size, size, 3] as for ``see``: the course of the largest object.

    Raises:
        InputError: fewer than 5 frames.
    """
    if len(frames) < 5:
        raise InputError(f"a motion needs 5 frames or more, got {len(frames)}")
    views = [see(frame) for frame in frames]
    track = [(i, max(v.objects, key=lambda o: o.area)) for i, v in enumerate(views) if v.objects]
    background, texture = (_most([getattr(v, name) for v in views]) for name in ("background", "texture"))
    if not track:
        return Course("", "", "", background, texture, None, 0.0, 0.0, 255.0)
    objects = [seen for _, seen in track]
    scores = {name: sum(seen.overlap for seen in objects if seen.shape == name) for name in SHAPES}
    shape = max(scores, key=lambda name: scores[name])
    return Course(
        shape,
        _most([seen.color for seen in objects]),
        "large" if np.median([seen.radius for seen in objects]) > LARGE else "small",
        background,
        texture,
        _motion(track, shape, len(frames)),
        len(track) / len(frames),
        float(np.median([seen.overlap for seen in objects])),
        float(np.median([seen.error for seen in objects])),
    )


def _most(values: Sequence[str]) -> str:
    return max(set(values), key=values.count)


def _motion(track: Sequence[tuple[int, Seen]], shape: str, frames: int) -> str | None:
    """The strongest change over the clip, by straight lines through position, log radius and angle."""
    if len(track) < 5:
        return None
    time = np.array([i for i, _ in track]) / (frames - 1)

    def change(values: Sequence[float]) -> float:
        return float(np.polyfit(time, values, 1)[0])

    dx, dy = change([seen.x for _, seen in track]), change([seen.y for _, seen in track])
    growth = change([float(np.log(seen.radius)) for _, seen in track])
    turn = 0.0
    upright = [(t, seen.angle) for t, (_, seen) in zip(time, track, strict=True) if seen.shape == shape]
    if SYMMETRY[shape] and len(upright) >= 5:
        when, angles = zip(*upright, strict=True)
        turn = float(np.polyfit(when, np.unwrap(angles, period=2 * np.pi / SYMMETRY[shape]), 1)[0])
    strength = {
        ("moving right" if dx > 0 else "moving left"): abs(dx) / TRAVEL,
        ("moving down" if dy > 0 else "moving up"): abs(dy) / TRAVEL,
        ("growing" if growth > 0 else "shrinking"): abs(growth) / GROWTH,
        "rotating": turn / ROTATION,
    }
    best = max(strength, key=lambda name: strength[name])
    return best if strength[best] > 1 else None


def check_video(frames: Any, wanted: str | Scene) -> dict[str, bool]:
    """Whether a clip shows what the caption says: ``visible`` (an object in four of five frames), ``color``, ``shape``,
    ``motion``, and ``size``, ``texture``, ``background`` as far as mentioned; ``all``: every one of them."""
    scene = parse(wanted) if isinstance(wanted, str) else wanted
    if len(scene.things) != 1 or not scene.motion:
        raise InputError(f"a clip shows one moving object, got {wanted!r}")
    (thing,) = scene.things
    seen = follow(frames)
    verdict = {
        "visible": seen.visible >= 0.8,
        "color": seen.color == thing.color and seen.error < COLOR_DISTANCE,
        "shape": seen.shape == thing.shape and seen.overlap > SHAPE_OVERLAP,
        "motion": seen.motion == scene.motion,
    }
    for name, value in (("size", thing.size), ("texture", scene.texture), ("background", scene.background)):
        if value:
            verdict[name] = getattr(seen, name) == value
    return _judged(verdict)


def _judged(verdict: dict[str, bool]) -> dict[str, bool]:
    return {**verdict, "all": all(verdict.values())}

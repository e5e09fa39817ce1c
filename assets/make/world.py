"""The drawn world that the bundled pipelines learn: scenes at random, pictures, clips, captions.

Everything random comes from the ``numpy.random.Generator`` that is passed in, so a seed fixes every pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count

import numpy as np

from diffaccel.assets.make.heldout import is_held_out
from diffaccel.eval.scenes import (
    BACKGROUNDS,
    COLORS,
    MOTIONS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    SYMMETRY,
    TEXTURES,
    Scene,
    Thing,
    caption,
    signed_distance,
)

FRAMES = 13
IMAGE_SIZE = 256
VIDEO_SIZE = 96
PAIRS = 0.5  # share of images with two objects
OVERLAPS = 0.3  # share of pairs where one stands in front of the other
# degrees a frame: below half of the star's 72, so that the direction can be seen
TURN = 9.0
CLIP_GRAIN = 1.6  # clips have fewer pixels, so their patterns are coarser


@dataclass(frozen=True)
class Drawn:
    """One object as drawn: ``x``, ``y``, ``radius`` and ``angle`` (radians, clockwise) have one value per frame."""

    shape: str
    color: str
    x: np.ndarray  # [F]
    y: np.ndarray  # [F]
    radius: np.ndarray  # [F]
    angle: np.ndarray  # [F]


def draw_scene(rng: np.random.Generator, *, pairs: float = PAIRS, held_out: bool = False) -> Scene:
    """A still scene. ``held_out``: False = never a combination kept for evaluation, True = always one."""
    while True:
        number = 2 if rng.random() < pairs else 1
        colors = rng.choice(list(COLORS), size=number, replace=False)
        relation = None
        if number == 2:
            side_by_side = [name for name, sides in RELATIONS.items() if sides]
            relation = "in front of" if rng.random() < OVERLAPS else str(rng.choice(side_by_side))
        sides = (RELATIONS[relation] if relation else (str(rng.choice(list(PLACES))),)) or (None, None)
        sizes = [str(rng.choice(list(SIZES))) for _ in colors]
        if relation == "in front of":
            sizes[1] = "large"  # a small one would vanish behind the other
        shapes = [str(rng.choice(SHAPES)) for _ in colors]
        things = tuple(Thing(*part) for part in zip(shapes, map(str, colors), sizes, sides, strict=True))
        scene = Scene(things, relation, str(rng.choice(TEXTURES)), str(rng.choice(list(BACKGROUNDS))))
        if is_held_out(scene) == held_out:
            return scene


def draw_moving_scene(rng: np.random.Generator, *, held_out: bool = False) -> Scene:
    """One moving object; what grows or shrinks has no size, what looks the same at every angle does not rotate."""
    while True:
        motion, shape = str(rng.choice(MOTIONS)), str(rng.choice(SHAPES))
        size = None if motion in ("growing", "shrinking") else str(rng.choice(list(SIZES)))
        thing = Thing(shape, str(rng.choice(list(COLORS))), size)
        scene = Scene((thing,), None, str(rng.choice(TEXTURES)), str(rng.choice(list(BACKGROUNDS))), motion)
        if (motion != "rotating" or SYMMETRY[shape]) and is_held_out(scene) == held_out:
            return scene


def describe(scene: Scene, rng: np.random.Generator, *, drop: float = 0.0) -> str:
    """A caption of ``scene``; size, place or relation, texture and background each go unsaid with chance ``drop``.

    Pairs side by side are told by two places or by a relation, half of the time each.
    """

    def unsaid() -> bool:
        return bool(rng.random() < drop)

    things = [replace(t, size=None if unsaid() else t.size, place=None if unsaid() else t.place) for t in scene.things]
    bare = unsaid()
    heard = Scene(
        tuple(things),
        None if unsaid() else scene.relation,
        None if bare or unsaid() else scene.texture,
        None if bare else scene.background,
        scene.motion,
    )
    by_places = scene.relation is not None and RELATIONS[scene.relation] is not None and rng.random() < 0.5
    return caption(heard, places=by_places)


def place(scene: Scene, rng: np.random.Generator, frames: int = FRAMES) -> list[Drawn]:
    """Where everything is, back to front. Still scenes get one frame, moving ones ``frames``."""
    if scene.motion:
        return [_trajectory(scene, rng, frames)]
    radii = [SIZES[thing.size or "large"] * rng.uniform(0.92, 1.08) for thing in scene.things]
    if scene.relation == "in front of":
        centres = _overlapping(scene, radii, rng)
    else:
        centres = [np.add(PLACES[t.place or "center"], rng.uniform(-0.06, 0.06, 2)) for t in scene.things]
    still = [
        Drawn(t.shape, t.color, np.array([c[0]]), np.array([c[1]]), np.array([r]), np.zeros(1))
        for t, c, r in zip(scene.things, centres, radii, strict=True)
    ]
    return still[::-1]


def _overlapping(scene: Scene, radii: Sequence[float], rng: np.random.Generator) -> list[np.ndarray]:
    """Centres of the front and the back object: the front one hides a part that shows, and never most of the back.

    Thin shapes, such as two rings, can hide little of each other: the least share sinks with every vain attempt.
    """
    x, y = _grid(64)
    for attempt in count():
        angle = rng.uniform(0, 2 * np.pi)
        apart = np.array([np.cos(angle), np.sin(angle)]) * rng.uniform(0.35, 0.8) * sum(radii)
        middle = rng.uniform(-0.06, 0.06, 2)
        centres = [middle + apart / 2, middle - apart / 2]
        front, back = (
            signed_distance(thing.shape, x - centre[0], y - centre[1], radius) < 0
            for thing, centre, radius in zip(scene.things, centres, radii, strict=True)
        )
        hidden = (front & back).mean()
        if 0.012 * 0.98**attempt < hidden < 0.35 * back.mean():
            return centres
    raise AssertionError("count() does not end")


def _trajectory(scene: Scene, rng: np.random.Generator, frames: int) -> Drawn:
    """A path at a random place: rotary positions tell relative places only, so a path must not be tied to one."""
    (thing,) = scene.things
    time = np.linspace(-1, 1, frames)
    still = np.ones(frames)
    radius = SIZES[thing.size or "small"] * rng.uniform(0.92, 1.08) * still
    angle = np.zeros(frames)
    x, y = still * 0, still * 0
    motion = scene.motion or ""
    if motion.startswith("moving"):
        reach = rng.uniform(0.35, 0.48)
        room = max(0.0, 1 - radius[0] - reach)
        across = max(0.0, 1 - radius[0])
        along = rng.uniform(-room, room) + reach * time * (1 if motion in ("moving right", "moving down") else -1)
        beside = rng.uniform(-across, across) * still
        x, y = (along, beside) if motion in ("moving right", "moving left") else (beside, along)
    else:
        if motion == "rotating":
            angle = np.deg2rad(TURN) * rng.uniform(0.9, 1.1) * np.arange(frames)
        else:
            low, high = 0.17 * rng.uniform(0.9, 1.1), 0.5 * rng.uniform(0.9, 1.1)
            radius = (low + high) / 2 + (high - low) / 2 * time * (1 if motion == "growing" else -1)
        room = max(0.0, 0.95 - float(radius.max()))
        x, y = rng.uniform(-room, room) * still, rng.uniform(-room, room) * still
    return Drawn(thing.shape, thing.color, x, y, radius, angle)


@cache
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    axis = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    return x, y


def background(color: str, texture: str, size: int, rng: np.random.Generator, grain: float = 1.0) -> np.ndarray:
    """The background alone, [size, size, 3], values 0 to 255. ``grain``: how coarse its pattern is."""
    first, second = (np.array(tone, np.float32) for tone in BACKGROUNDS[color])
    mix = _TEXTURES[texture](size, rng, grain).astype(np.float32)[..., None]
    return first + (second - first) * mix


def _turned(size: int, angle: float) -> tuple[np.ndarray, np.ndarray]:
    x, y = _grid(size)
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _soft(distance: np.ndarray, size: int) -> np.ndarray:
    """Coverage of a pixel by the side where ``distance`` is negative."""
    return np.clip(0.5 - distance * size / 2, 0, 1)


def _plain(size: int, rng: np.random.Generator, grain: float) -> np.ndarray:
    return np.full((size, size), rng.choice([0.0, 0.25]))


def _striped(size: int, rng: np.random.Generator, grain: float) -> np.ndarray:
    along, _ = _turned(size, rng.uniform(0, np.pi))
    period = rng.uniform(0.22, 0.34) * grain
    return _soft(np.abs((along / period + rng.random()) % 1 - 0.5) * period - period / 4, size)


def _checked(size: int, rng: np.random.Generator, grain: float) -> np.ndarray:
    cell = rng.uniform(0.15, 0.22) * grain
    u, v = _turned(size, rng.uniform(0, np.pi / 2))
    stripes = [np.abs((w / (2 * cell) + rng.random()) % 1 - 0.5) * 2 * cell - cell / 2 for w in (u, v)]
    a, b = (_soft(stripe, size) for stripe in stripes)
    return a + b - 2 * a * b


def _dotted(size: int, rng: np.random.Generator, grain: float) -> np.ndarray:
    pitch = rng.uniform(0.24, 0.34) * grain
    u, v = _turned(size, rng.uniform(0, np.pi / 2))
    offset = [(w / pitch + rng.random()) % 1 - 0.5 for w in (u, v)]
    return _soft((np.hypot(*offset) - rng.uniform(0.2, 0.26)) * pitch, size)


def _cloudy(size: int, rng: np.random.Generator, grain: float) -> np.ndarray:
    """Value noise in two octaves, interpolated by cosines."""
    total = np.zeros((size, size), np.float32)
    for cells, weight in ((round(5 / grain), 0.7), (round(11 / grain), 0.3)):
        values = rng.random((cells + 2, cells + 2))
        at = np.linspace(0, cells, size, endpoint=False)
        low = at.astype(int)
        blend = (1 - np.cos((at - low) * np.pi)) / 2
        weights = np.zeros((size, cells + 2))
        weights[np.arange(size), low] = 1 - blend
        weights[np.arange(size), low + 1] = blend
        total += (weight * (weights @ values @ weights.T)).astype(np.float32)
    return np.clip((total - 0.5) * 1.5 + 0.5, 0, 1)


def _shaded(size: int, rng: np.random.Generator, grain: float) -> np.ndarray:
    along, _ = _turned(size, rng.uniform(0, 2 * np.pi))
    return np.clip(along * 0.5 + 0.5, 0, 1)


_TEXTURES = {
    "plain": _plain,
    "striped": _striped,
    "checked": _checked,
    "dotted": _dotted,
    "cloudy": _cloudy,
    "shaded": _shaded,
}


def paint(scene: Scene, drawn: Sequence[Drawn], size: int, rng: np.random.Generator) -> np.ndarray:
    """The picture or clip, [F, size, size, 3] uint8, F = 1 for a still scene."""
    frames = len(drawn[0].x)
    grain = CLIP_GRAIN if scene.motion else 1.0
    ground = background(scene.background or "gray", scene.texture or "plain", size, rng, grain)
    canvas = np.repeat(ground[None], frames, axis=0)
    x, y = _grid(size)
    for thing in drawn:
        light = rng.uniform(0, 2 * np.pi)  # where the object is lit from
        margin = 1.45 * thing.radius.max() + 4 / size
        left, top = (_pixel(c.min() - margin, size) for c in (thing.x, thing.y))
        right, bottom = (_pixel(c.max() + margin, size) + 1 for c in (thing.x, thing.y))
        window = (slice(None), slice(top, bottom), slice(left, right))
        dx, dy = (
            grid[None, top:bottom, left:right] - centre[:, None, None].astype(np.float32)
            for grid, centre in ((x, thing.x), (y, thing.y))
        )
        cos, sin = (f(thing.angle)[:, None, None].astype(np.float32) for f in (np.cos, np.sin))
        radius = thing.radius[:, None, None].astype(np.float32)
        cover = _soft(signed_distance(thing.shape, dx * cos + dy * sin, dy * cos - dx * sin, radius), size)[..., None]
        shade = 1 + 0.08 * (dx * np.cos(light) + dy * np.sin(light)) / radius
        colored = np.array(COLORS[thing.color], np.float32) * np.clip(shade, 0.9, 1.1)[..., None]
        canvas[window] += (colored - canvas[window]) * cover
    return (np.clip(canvas, 0, 255) + 0.5).astype(np.uint8)


def _pixel(coordinate: float, size: int) -> int:
    return int(np.clip((coordinate + 1) / 2 * size, 0, size - 1))


def draw_image(scene: Scene, size: int, rng: np.random.Generator) -> np.ndarray:
    """A still scene, placed and painted: [size, size, 3] uint8."""
    return paint(scene, place(scene, rng), size, rng)[0]


def draw_clip(scene: Scene, size: int, rng: np.random.Generator, frames: int = FRAMES) -> np.ndarray:
    """A moving scene, placed and painted: [frames, size, size, 3] uint8."""
    return paint(scene, place(scene, rng, frames), size, rng)

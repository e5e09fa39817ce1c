"""What the bundled pipelines' drawn world consists of: words, shapes, captions. numpy only.

A scene is one or two coloured shapes on a background, standing still or (one shape) moving. Coordinates run from -1 at
the left and the top edge to 1 at the right and the bottom edge; a radius is in the same unit, so 1 is half the picture.
The drawing itself is in ``assets/make/world.py``, the reading of pictures in ``eval/checker.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from diffaccel.errors import InputError

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLORS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "red": (220, 40, 40),
        "green": (40, 170, 60),
        "blue": (45, 80, 220),
        "yellow": (240, 215, 40),
        "purple": (135, 50, 170),
        "orange": (245, 135, 25),
        "cyan": (50, 205, 215),
        "pink": (245, 130, 185),
    }
)
# Each background colour with its second tone, which textures mix in.
BACKGROUNDS: Mapping[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = MappingProxyType(
    {
        "white": ((242, 242, 242), (200, 200, 200)),
        "black": ((16, 16, 16), (58, 58, 58)),
        "gray": ((112, 112, 112), (150, 150, 150)),
        "brown": ((88, 58, 35), (122, 81, 49)),
    }
)
TEXTURES = ("plain", "striped", "checked", "dotted", "cloudy", "shaded")  # plain goes without saying
SIZES: Mapping[str, float] = MappingProxyType({"small": 0.25, "large": 0.42})  # radius
PLACES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"left": (-0.46, 0.0), "right": (0.46, 0.0), "top": (0.0, -0.46), "bottom": (0.0, 0.46), "center": (0.0, 0.0)}
)
PLACE_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "left": "on the left",
        "right": "on the right",
        "top": "at the top",
        "bottom": "at the bottom",
        "center": "in the center",
    }
)
# Where the first and the second object of a pair stand; "in front of" overlaps anywhere.
RELATIONS: Mapping[str, tuple[str, str] | None] = MappingProxyType(
    {
        "left of": ("left", "right"),
        "right of": ("right", "left"),
        "above": ("top", "bottom"),
        "below": ("bottom", "top"),
        "in front of": None,
    }
)
MOTIONS = ("moving right", "moving left", "moving up", "moving down", "growing", "shrinking", "rotating")
# Order of rotational symmetry; 0 = looks the same at every angle, so it is never said to rotate.
SYMMETRY: Mapping[str, int] = MappingProxyType(
    {"circle": 0, "ring": 0, "square": 4, "triangle": 3, "star": 5, "cross": 4}
)
WORDS = tuple(
    dict.fromkeys(
        " ".join(
            [
                "a on the at in and of background",
                *SHAPES,
                *COLORS,
                *BACKGROUNDS,
                *TEXTURES[1:],
                *SIZES,
                *PLACES,
                *RELATIONS,
                *MOTIONS,
            ]
        ).split()
    )
)


@dataclass(frozen=True)
class Thing:
    """One object. ``size`` and ``place`` are None where the caption leaves them open."""

    shape: str
    color: str
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Scene:
    """What a caption asks for, or what was drawn; None = left open.

    Args:
        things: one or two; of a pair in front of each other, the front one first.
        relation: of the first to the second, a key of ``RELATIONS``.
        texture: one of ``TEXTURES``; a caption without the word leaves it open.
        background: a key of ``BACKGROUNDS``.
        motion: one of ``MOTIONS``, for videos.
    """

    things: tuple[Thing, ...]
    relation: str | None = None
    texture: str | None = None
    background: str | None = None
    motion: str | None = None


def caption(scene: Scene, *, places: bool = False) -> str:
    """The sentence for ``scene``. ``places``: a pair side by side is told by two places instead of a relation."""
    if len(scene.things) == 2 and not places:
        first, second = (_name(replace(thing, place=None)) for thing in scene.things)
        text = f"{first} {scene.relation or 'and'} {second}"
    else:
        text = " and ".join(_name(thing) for thing in scene.things)
    if scene.motion:
        text += f" {scene.motion}"
    if scene.background:
        texture = "" if scene.texture in (None, "plain") else f"{scene.texture} "
        text += f" on a {texture}{scene.background} background"
    return text


def _name(thing: Thing) -> str:
    words = ["a", thing.size, thing.color, thing.shape, thing.place and PLACE_WORDS[thing.place]]
    return " ".join(word for word in words if word)


def _any(words: Mapping[str, object] | tuple[str, ...]) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


_THING = rf"a (?:(?P<size>{_any(SIZES)}) )?(?P<color>{_any(COLORS)}) (?P<shape>{_any(SHAPES)})"
_PLACE = rf"(?: (?:on|at|in) the (?P<place>{_any(PLACES)}))?"
_GROUND = rf"(?: on a (?:(?P<texture>{_any(TEXTURES)}) )?(?P<background>{_any(BACKGROUNDS)}) background)?"
_TAIL = rf"(?: (?P<motion>{_any(MOTIONS)}))?{_GROUND}"


def _numbered(pattern: str, number: int) -> str:
    return re.sub(r"\?P<(\w+)>", rf"?P<\g<1>{number}>", pattern)


_CAPTION = re.compile(
    rf"{_numbered(_THING + _PLACE, 1)}"
    rf"(?: (?P<relation>and|{_any(RELATIONS)}) {_numbered(_THING + _PLACE, 2)})?{_TAIL}"
)


def parse(text: str) -> Scene:
    """The scene that ``text`` asks for; what it does not mention is None.

    Raises:
        InputError: ``text`` is no sentence of this world.
    """
    found = _CAPTION.fullmatch(text.strip().lower())
    if not found:
        raise InputError(
            f"the checker reads captions such as 'a small red ring left of a large blue star on a striped gray "
            f"background' or 'a large red circle moving left', got {text!r}"
        )
    part = found.groupdict()
    count = 2 if part["shape2"] else 1
    things = [Thing(*(part[f"{name}{i}"] for name in ("shape", "color", "size", "place"))) for i in range(1, count + 1)]
    relation = part["relation"] if part["relation"] != "and" else None
    sides = RELATIONS[relation] if relation else None
    if sides:
        things = [replace(thing, place=thing.place or side) for thing, side in zip(things, sides, strict=True)]
    elif count == 2 and relation is None:
        together = tuple(thing.place for thing in things)
        relation = next((name for name, sides in RELATIONS.items() if sides == together), None)
    return Scene(tuple(things), relation, part["texture"], part["background"], part["motion"])


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray | float) -> np.ndarray:
    """Distance of points to the outline of an upright ``shape`` around the origin, negative inside.

    Args:
        shape: one of ``SHAPES``.
        x: rightward offsets from the centre, any shape of array.
        y: downward offsets, broadcastable with ``x``.
        radius: of the shape, broadcastable too.
    """
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.76 * radius) - 0.24 * radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.85 * radius
    if shape == "cross":
        ax, ay = np.abs(x), np.abs(y)
        arm = 0.32 * radius
        return np.minimum(np.maximum(ax - radius, ay - arm), np.maximum(ax - arm, ay - radius))
    if shape == "triangle":  # apex at -radius, base at 0.75 radius
        return np.maximum(y - 0.75 * radius, (np.abs(x) * 1.75 - (y + radius)) / np.hypot(1.75, 1.0))
    if shape == "star":  # folded to half a point: the edge runs from the tip (radius, 0) to the notch at 36 degrees
        half = np.pi / 5
        angle = np.abs((np.arctan2(x, -y) + half) % (2 * half) - half)
        distance = np.hypot(x, y)
        notch_x, notch_y = 0.45 * np.cos(half), 0.45 * np.sin(half)
        edge = np.hypot(notch_x - 1, notch_y)
        return ((distance * np.cos(angle) - radius) * notch_y - distance * np.sin(angle) * (notch_x - 1)) / edge
    raise ValueError(f"unknown shape {shape!r}; known are {', '.join(SHAPES)}")

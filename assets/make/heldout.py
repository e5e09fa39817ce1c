"""Combinations that are kept for evaluation and never drawn in training, and the prompt sets.

``python assets/make/heldout.py`` writes ``assets/prompts/heldout.json`` (the combinations), ``heldout_image.txt`` and
``heldout_video.txt`` (prompts made of them, to report on), ``tuning_image.txt`` and ``tuning_video.txt`` (prompts of
other combinations, to choose settings on), always the same by ``SEED``. The lines are shuffled, so that the first few
are a fair sample. Kept back are

- of each object with a place: (size, colour, shape, place), one in seven;
- of two objects in one picture: {(colour, shape), (colour, shape)} under whichever relation, one in ten;
- of moving objects: (colour, shape, motion), one in seven.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np

from diffaccel.eval.scenes import COLORS, MOTIONS, PLACES, SHAPES, SIZES, SYMMETRY, Scene

PROMPTS = Path(__file__).resolve().parent.parent / "prompts"
SEED = 20251122
IMAGE_PROMPTS = (160, 96)  # of one object, of two
VIDEO_PROMPTS = 128
TUNING_PROMPTS = 64


def choose() -> dict[str, list[Any]]:
    """The combinations that are held out, drawn by ``SEED``."""
    rng = np.random.default_rng(SEED)
    looks = list(product(COLORS, SHAPES))
    everything: dict[str, list[Any]] = {
        "placed": list(product(SIZES, COLORS, SHAPES, PLACES)),
        "pairs": [pair for pair in combinations(looks, 2) if pair[0][0] != pair[1][0]],
        "moving": [(c, s, m) for c, s in looks for m in MOTIONS if m != "rotating" or SYMMETRY[s]],
    }
    share = {"placed": 7, "pairs": 10, "moving": 7}
    return {
        name: [options[i] for i in sorted(rng.permutation(len(options))[: len(options) // share[name]])]
        for name, options in everything.items()
    }


@cache
def _held_out() -> dict[str, frozenset[Any]]:
    lists = json.loads((PROMPTS / "heldout.json").read_text())
    return {
        "placed": frozenset(map(tuple, lists["placed"])),
        "pairs": frozenset(frozenset(map(tuple, pair)) for pair in lists["pairs"]),
        "moving": frozenset(map(tuple, lists["moving"])),
    }


def is_held_out(scene: Scene) -> bool:
    """Whether any combination in a fully described ``scene`` is kept for evaluation."""
    held = _held_out()
    if scene.motion:
        return any((t.color, t.shape, scene.motion) in held["moving"] for t in scene.things)
    if len(scene.things) == 2 and frozenset((t.color, t.shape) for t in scene.things) in held["pairs"]:
        return True
    return any((t.size, t.color, t.shape, t.place) in held["placed"] for t in scene.things)


def prompts() -> dict[str, list[str]]:
    """The prompt sets by file name, no line twice."""
    from diffaccel.assets.make import world  # world reads the list that this module writes

    rng = np.random.default_rng(SEED + 1)
    tuning_rng = np.random.default_rng(SEED + 2)

    def tuning(draw: Callable[[np.random.Generator], Scene]) -> list[str]:
        found: dict[str, None] = {}
        while len(found) < TUNING_PROMPTS:
            found[world.describe(draw(tuning_rng), tuning_rng)] = None
        return list(found)

    image: dict[str, None] = {}
    for pairs, count in zip((0.0, 1.0), IMAGE_PROMPTS, strict=True):
        goal = len(image) + count
        while len(image) < goal:
            image[world.describe(world.draw_scene(rng, pairs=pairs, held_out=True), rng)] = None
    video: dict[str, None] = {}
    while len(video) < VIDEO_PROMPTS:
        video[world.describe(world.draw_moving_scene(rng, held_out=True), rng)] = None
    lists = {"heldout_image.txt": list(image), "heldout_video.txt": list(video)}
    for lines in lists.values():
        rng.shuffle(lines)
    return {
        **lists,
        "tuning_image.txt": tuning(world.draw_scene),
        "tuning_video.txt": tuning(world.draw_moving_scene),
    }


def main() -> None:
    lists = {name: [json.dumps(row) for row in rows] for name, rows in choose().items()}
    body = ",\n".join(f'"{name}": [\n' + ",\n".join(rows) + "\n]" for name, rows in lists.items())
    (PROMPTS / "heldout.json").write_text("{\n" + body + "\n}\n")
    for name, lines in prompts().items():
        (PROMPTS / name).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""Writes the prompt sets of the interim pipelines, `image.txt` and `video.txt`: ``python assets/make/prompts.py``.

Every line is drawn from the grammar that they were trained on, with a seed that training did not use. The prompts for
what run.py trains, whose world is larger, are heldout.py's.
"""

from __future__ import annotations

import random
from pathlib import Path

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink")
BACKGROUNDS = ("white", "black", "gray", "brown")
SIZES = ("small", "large")
PLACES = ("on the left", "on the right", "at the top", "at the bottom", "in the center")
PAIRS = (PLACES[:2], PLACES[1::-1], PLACES[2:4], PLACES[3:1:-1])
MOTIONS = ("moving right", "moving left", "moving up", "moving down", "growing", "shrinking")
COUNT = 64
SEED = 20251121


def image_prompt(rng: random.Random) -> str:
    """One object, or with probability 0.35 two, each with size, colour, shape and place."""
    places = rng.choice(PAIRS) if rng.random() < 0.35 else (rng.choice(PLACES),)
    objects = [f"a {rng.choice(SIZES)} {rng.choice(COLORS)} {rng.choice(SHAPES)} {place}" for place in places]
    return f"{' and '.join(objects)} on a {rng.choice(BACKGROUNDS)} background"


def video_prompt(rng: random.Random) -> str:
    """One moving object; those that grow or shrink have no size."""
    motion = rng.choice(MOTIONS)
    size = f"{rng.choice(SIZES)} " if motion.startswith("moving") else ""
    return f"a {size}{rng.choice(COLORS)} {rng.choice(SHAPES)} {motion} on a {rng.choice(BACKGROUNDS)} background"


def main() -> None:
    folder = Path(__file__).resolve().parent.parent / "prompts"
    for name, draw in (("image", image_prompt), ("video", video_prompt)):
        rng = random.Random(SEED)
        prompts: dict[str, None] = {}
        while len(prompts) < COUNT:
            prompts[draw(rng)] = None
        (folder / f"{name}.txt").write_text("\n".join(prompts) + "\n")


if __name__ == "__main__":
    main()

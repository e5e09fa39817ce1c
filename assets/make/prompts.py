"""Writes the prompt sets of the interim video pipeline, to report and to choose settings on.

Every line is drawn from the grammar that it was trained on, with a seed that training did not use. The prompts for
what run.py trains, whose world is larger, are heldout.py's.
"""

from __future__ import annotations

import random
from pathlib import Path

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink")
BACKGROUNDS = ("white", "black", "gray", "brown")
SIZES = ("small", "large")
MOTIONS = ("moving right", "moving left", "moving up", "moving down", "growing", "shrinking")
COUNT = 64
SEED = 20251121


def video_prompt(rng: random.Random) -> str:
    """One moving object; those that grow or shrink have no size."""
    motion = rng.choice(MOTIONS)
    size = f"{rng.choice(SIZES)} " if motion.startswith("moving") else ""
    return f"a {size}{rng.choice(COLORS)} {rng.choice(SHAPES)} {motion} on a {rng.choice(BACKGROUNDS)} background"


def main() -> None:
    folder = Path(__file__).resolve().parent.parent / "prompts"
    rng = random.Random(SEED)
    prompts: dict[str, None] = {}
    while len(prompts) < 2 * COUNT:
        prompts[video_prompt(rng)] = None
    lines = list(prompts)
    (folder / "tuning_video_interim.txt").write_text("\n".join(lines[:COUNT]) + "\n")
    (folder / "video.txt").write_text("\n".join(lines[COUNT:]) + "\n")


if __name__ == "__main__":
    main()

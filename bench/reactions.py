"""Do the measures of quality react? Rows that must come out worse than the original, beyond the intervals of both.

    python bench/reactions.py                        # 132 prompts: 15 minutes on 2 cores
    python bench/reactions.py --folder out/reactions # an interrupted run goes on from there

On the bundled image pipeline and its evaluator: fewer steps, noise on the pictures, and every picture scored with
another's prompt. FID and CMMD are distances to drawings of the combinations that the prompts ask for and that training
never saw.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from diffaccel.assets.make.world import draw_image, draw_scene
from diffaccel.eval.compare import compare
from diffaccel.eval.measures import Score, measures_of, score
from diffaccel.pipelines.bundled import bundled
from diffaccel.pipelines.loading import load

MEASURES = ("clip", "adherence", "fid", "cmmd")
DRAWINGS = 400
NOISE = 0.1
SWAPPED = "another's prompt"
# By row, the measures that must show it to be worse than the original.
WORSE = {
    SWAPPED: ("clip", "adherence"),
    "noise": ("clip", "fid", "cmmd"),
    "8 steps": ("clip", "fid"),
    "4 steps": ("clip", "adherence", "fid", "cmmd"),
}
Number = tuple[float, float, float]
"""A value and its 95 % interval."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=132, help="more than the evaluator's 128 features")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where results go, and an interrupted run goes on from")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rows = run(folder, bundled("bundled:image").prompts()[: options.prompts])
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("", *MEASURES):
        table.add_column(name, no_wrap=True)
    for row, (scores, drops) in rows.items():
        table.add_row(row, *(_text(scores.get(m)) for m in MEASURES))
        if drops:
            table.add_row("  worse by", *(_text(drops.get(m)) for m in MEASURES), style="dim")
    Console(width=140).print(table)
    unclear = [f"{m} on {row}" for row, measures in WORSE.items() for m in measures if not rows[row][1][m][1] > 0]
    print("in dim lines: worse than the reference by so much, paired by prompt, with its 95 % interval")
    print(f"not clear: {', '.join(unclear)}" if unclear else "every row is worse beyond the interval, as it must be")
    sys.exit(bool(unclear))


def run(folder: Path, prompts: list[str]) -> dict[str, tuple[dict[str, Number], dict[str, Number]]]:
    """By row and measure: the number, and by how much it is worse than the reference's."""
    result = compare(
        load("bundled:image"),
        {"noise": noisy},
        prompts,
        controls=[8, 4],
        measures=MEASURES,
        against=drawings(folder / "drawings"),
        folder=folder / "run",
        turn=len(prompts),
    )
    rows = {}
    for row in result.rows:
        numbers = {name: score for name, score in row.numbers().items() if name in MEASURES}
        drops = {name: tuple(score.drop) for name, score in numbers.items() if score.drop is not None}
        rows[row.name] = {name: _number(score) for name, score in numbers.items()}, drops
    assert result.store is not None
    swapped: dict[str, Score] = {}
    count = len(prompts)
    for one in measures_of(("clip", "adherence"), prompts, video=False):
        if one.measure.name in MEASURES:
            samples = [result.store.shown("reference", i) for i in range(count)]
            own = [one.compute(x, prompts[i]) for i, x in enumerate(samples)]
            others = [one.compute(x, prompts[(i + count // 2) % count]) for i, x in enumerate(samples)]
            swapped[one.measure.name] = score(one.measure, others, range(count), own)
    drops = {name: tuple(value.drop) for name, value in swapped.items() if value.drop is not None}
    rows[SWAPPED] = {name: _number(value) for name, value in swapped.items()}, drops
    return rows


def drawings(folder: Path) -> Path:
    """Pictures of held-out combinations, drawn as for training."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(DRAWINGS):
        picture = draw_image(draw_scene(rng, held_out=True), 256, rng)
        if not (file := folder / f"{i:04}.png").exists():
            Image.fromarray(picture).save(file)
    return folder


@contextlib.contextmanager
def noisy(pipe: Any) -> Iterator[None]:
    """Adds noise to what the decoder gives, whose range is -1 to 1."""
    generator = torch.Generator().manual_seed(0)

    def add(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 2 * NOISE * torch.randn(output.shape, generator=generator)

    handle = pipe.vae.decoder.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _number(value: Any) -> Number:
    return getattr(value, "mean", getattr(value, "value", 0.0)), value.low, value.high


def _text(number: Number | None) -> str:
    return "" if number is None else "{:.3g} [{:.3g}, {:.3g}]".format(*number)


if __name__ == "__main__":
    main()

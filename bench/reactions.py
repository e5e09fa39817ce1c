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
from diffaccel.eval.measures import measures_of, score
from diffaccel.pipelines.bundled import bundled
from diffaccel.pipelines.loading import load

MEASURES = ("clip", "adherence", "fid", "cmmd")
DRAWINGS = 400
NOISE = 0.1
# (measure, what must be better, what must be worse)
ORDERS = [
    ("clip", "reference", "another's prompt"),
    ("adherence", "reference", "another's prompt"),
    ("clip", "reference", "noise"),
    ("fid", "reference", "noise"),
    ("cmmd", "reference", "noise"),
    ("adherence", "reference", "4 steps"),
    ("clip", "reference", "4 steps"),
    ("fid", "reference", "4 steps"),
    ("fid", "8 steps", "4 steps"),
    ("cmmd", "reference", "4 steps"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=132, help="more than the evaluator's 128 features")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where results go, and an interrupted run goes on from")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        values = run(folder, bundled("bundled:image").prompts()[: options.prompts])
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("", *MEASURES):
        table.add_column(name)
    for row, scores in values.items():
        table.add_row(row, *("%.3g [%.3g, %.3g]" % scores[m] if m in scores else "-" for m in MEASURES))  # noqa: UP031
    Console().print(table)
    wrong = [order for order in ORDERS if not clear(values, *order)]
    for measure, better, worse in ORDERS:
        said = "NOT clear" if (measure, better, worse) in wrong else "clear"
        print(f"{measure}: {better} better than {worse}: {said}")
    sys.exit(bool(wrong))


def run(folder: Path, prompts: list[str]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """By row and measure: the value and its 95 % interval."""
    wrapped = load("bundled:image")
    result = compare(
        wrapped,
        {"noise": noisy},
        prompts,
        controls=[8, 4],
        measures=MEASURES,
        against=drawings(folder / "drawings"),
        folder=folder / "run",
        turn=len(prompts),
    )
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for row in result.rows:
        found[row.name] = {name: _interval(score) for name, score in row.numbers().items() if name in MEASURES}
    assert result.store is not None
    found["another's prompt"] = {}
    for one in measures_of(("clip", "adherence"), prompts, video=False):
        if one.measure.name not in MEASURES:
            continue
        values = [
            one.compute(result.store.shown("reference", i), prompts[(i + len(prompts) // 2) % len(prompts)])
            for i in range(len(prompts))
        ]
        found["another's prompt"][one.measure.name] = _interval(score(one.measure, values, list(range(len(prompts)))))
    return found


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


def clear(values: dict[str, dict[str, tuple[float, float, float]]], measure: str, better: str, worse: str) -> bool:
    """Whether the intervals lie apart, on the right sides."""
    (_, low, high), (_, worse_low, worse_high) = values[better][measure], values[worse][measure]
    return high < worse_low if measure in ("fid", "cmmd") else worse_high < low


def _interval(value: Any) -> tuple[float, float, float]:
    return (getattr(value, "mean", getattr(value, "value", None)), value.low, value.high)


if __name__ == "__main__":
    main()

"""Pictures of a comparison: side by side, contact sheet, speed against fidelity. Each returns the path it wrote.

matplotlib is imported when a figure is drawn, and drawn to without a display; its global state is left alone.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffaccel.errors import InputError
from diffaccel.eval.measures import MEASURES, Score
from diffaccel.eval.metrics.psnr import PSNR_CAP
from diffaccel.eval.result import Result, Row
from diffaccel.eval.sets import SETS, SetScore
from diffaccel.eval.store import REFERENCE, Store, slug

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_AMPLIFY = 10
_COLOURS = {
    "reference": "#444444",
    "plan": "#1b6ca8",
    "peer": "#7a4fa3",
    "control": "#c8742a",
    "noise floor": "#888888",
}


def draw(result: Result, folder: str | os.PathLike[str]) -> list[Path]:
    """All figures of a comparison into ``folder``; returns their paths.

    The side-by-side picture of each plan shows its median item by fidelity, neither the best nor the worst.
    """
    folder = Path(folder).expanduser()
    paths = [contact_sheet(result, folder / "contact-sheet.png")]
    for row in (row for row in result.rows if row.kind == "plan"):
        out = folder / f"side-by-side-{slug(row.name)}.png"
        paths.append(side_by_side(result, row.name, out, items=(_typical(result, row.name),)))
    if len(result.rows) > 1:
        paths.append(speed_against_fidelity(result, folder / "speed-fidelity.png"))
    return paths


def side_by_side(result: Result, plan: str, out: str | os.PathLike[str], *, items: Sequence[int] = (0,)) -> Path:
    """Original, accelerated and their difference times ten, one line per item; of a video the middle frame.

    Args:
        result: of `compare`.
        plan: name of the row to show.
        out: a .png (or .pdf, .svg) to write.
        items: numbers of the items, which count prompts first, seeds within a prompt.

    Raises:
        InputError: no such row or item.
    """
    row, store = _row(result, plan), _store(result)
    figure = _figure(9, 3.4 * len(items))
    axes = figure.subplots(len(items), 3, squeeze=False)
    for line, item in zip(axes, items, strict=True):
        prompt, seed = _item(result, item)
        original, fast = store.shown(REFERENCE, item), store.shown(plan, item)
        db = store.records("item", row=plan, item=item)[0]["scores"]["psnr"]  # files of clips have losses
        db = PSNR_CAP if db is None else db
        difference = (np.abs(fast - original) * _AMPLIFY).clip(0, 1)
        captions = (f"original\n{prompt}, seed {seed}", f"{plan}, {row.speedup.value:.2f}x\nPSNR {db:.1f} dB", "")
        captions = (*captions[:2], f"difference x {_AMPLIFY}")
        for axis, picture, caption in zip(line, (original, fast, difference), captions, strict=True):
            _show(axis, _middle(picture), caption)
    return _write(figure, out)


def contact_sheet(result: Result, out: str | os.PathLike[str], *, limit: int = 8) -> Path:
    """One column per item, one line per row of the table; of a video the middle frame.

    Args:
        result: of `compare`.
        out: the file to write.
        limit: most items shown.
    """
    store = _store(result)
    count = min(limit, len(result.prompts) * len(result.seeds))
    if count < 1:
        raise InputError(f"limit must be >= 1, got {limit}")
    figure = _figure(1.6 * count + 0.8, 1.6 * len(result.rows) + 0.4)
    axes = figure.subplots(len(result.rows), count, squeeze=False)
    for line, row in zip(axes, result.rows, strict=True):
        for item, axis in enumerate(line):
            prompt, seed = _item(result, item)
            _show(
                axis,
                _middle(store.shown(row.name, item)),
                textwrap.fill(f"{prompt}, seed {seed}", 36) if row is result.rows[0] else "",
                5,
            )
        line[0].set_ylabel(f"{row.name}\n{row.speedup.value:.2f}x", fontsize=7)
    return _write(figure, out)


def speed_against_fidelity(result: Result, out: str | os.PathLike[str]) -> Path:
    """PSNR and every further measure of the run over speed-up, a panel each; of fidelities the bar goes to the worst
    tenth, of others it is the interval. The controls are joined by a line that plans should beat.

    Args:
        result: of `compare`.
        out: the file to write.

    Raises:
        InputError: nothing was compared.
    """
    scored = [row for row in result.rows if row.kind not in ("reference", "noise floor")]
    if not scored:
        raise InputError("the result has no row beside the reference: nothing to draw")
    names = [name for name in dict.fromkeys(n for row in scored for n in row.numbers()) if name != "ssim"]
    columns = min(2, len(names))
    lines = -(-len(names) // columns)
    figure = _figure(6.4 * columns, 4.2 * lines)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for name, axis in zip(names, axes, strict=False):
        _panel(axis, name, scored, result.row(REFERENCE))
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    count = f"{len(result.prompts)} prompts, {len(result.seeds)} seeds"
    title = f"{result.conditions.get('pipeline', '')}, {count}, {result.conditions.get('device', '')}"
    figure.suptitle(title, fontsize=9)
    return _write(figure, out)


def _panel(axis: Any, name: str, rows: Sequence[Row], reference: Row) -> None:
    points = [(row, row.speedup, row.numbers()[name]) for row in rows if name in row.numbers()]
    for row, speed, score in points:
        colour = _COLOURS[row.kind]
        value, low, high = _extent(name, score)
        axis.errorbar(
            speed.value,
            value,
            xerr=([speed.value - speed.low], [speed.high - speed.value]),
            yerr=([value - low], [high - value]),
            fmt="o",
            color=colour,
            capsize=2,
            linewidth=1,
        )
        axis.annotate(row.name, (speed.value, value), (5, 4), textcoords="offset points", fontsize=8, color=colour)
    controls = sorted((speed.value, _extent(name, score)[0]) for row, speed, score in points if row.kind == "control")
    if len(controls) > 1:
        axis.plot(*zip(*controls, strict=True), "--", color=_COLOURS["control"], linewidth=1, zorder=0)
    if name in reference.numbers():
        axis.axhline(
            _extent(name, reference.numbers()[name])[0], color=_COLOURS["reference"], linewidth=0.8, linestyle=":"
        )
    axis.axvline(1, color=_COLOURS["reference"], linewidth=0.8, linestyle=":")
    axis.set_xlabel("speed-up of the denoising loop (95 % interval)")
    axis.set_ylabel(_label(name))
    if not _is_better_higher(name):
        axis.invert_yaxis()  # up is better in every panel


def _extent(name: str, score: Score | SetScore) -> tuple[float, float, float]:
    """Value and the ends of its bar; an end that one prompt leaves open is the value."""
    value = score.mean if isinstance(score, Score) else score.value
    if isinstance(score, Score) and MEASURES[name].fidelity:
        return value, min(value, score.worst_decile), max(value, score.worst_decile)
    low, high = (end if math.isfinite(end) else value for end in (score.low, score.high))
    return value, min(low, value), max(high, value)


def _is_better_higher(name: str) -> bool:
    return (MEASURES.get(name) or SETS[name]).higher_is_better


def _label(name: str) -> str:
    if name == "psnr":
        return "PSNR in dB: mean, down to the worst tenth"
    direction = "" if _is_better_higher(name) else " (lower is better)"
    of_samples = name in MEASURES and MEASURES[name].fidelity
    return f"{name}{direction}: {'mean, to the worst tenth' if of_samples else '95 % interval'}"


def _figure(width: float, height: float) -> Figure:
    """A figure of its own, without pyplot's registry and backend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _write(figure: Figure, out: str | os.PathLike[str]) -> Path:
    path = Path(out).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")  # wrapped titles are taller than the layout reckons
    return path


def _show(axis: Any, picture: np.ndarray, caption: str, size: int = 8) -> None:
    axis.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray", vmin=0, vmax=1)
    axis.set_title(caption, fontsize=size, wrap=True)
    axis.set_xticks([])
    axis.set_yticks([])


def _typical(result: Result, name: str) -> int:
    items = _store(result).records("item", row=name)
    ordered = sorted(items, key=lambda r: PSNR_CAP if r["scores"]["psnr"] is None else r["scores"]["psnr"])
    return int(ordered[len(ordered) // 2]["item"])


def _middle(sample: np.ndarray) -> np.ndarray:
    return sample[len(sample) // 2]


def _row(result: Result, name: str) -> Row:
    try:
        return result.row(name)
    except KeyError as error:
        raise InputError(str(error.args[0])) from None


def _item(result: Result, item: int) -> tuple[str, int]:
    count = len(result.prompts) * len(result.seeds)
    if not 0 <= item < count:
        raise InputError(f"no item {item}; the comparison has {count}, counted from 0")
    return result.prompts[item // len(result.seeds)], result.seeds[item % len(result.seeds)]


def _store(result: Result) -> Store:
    if result.store is None:
        raise InputError("this result came without its outputs; draw figures from what compare returned")
    return result.store

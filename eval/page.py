"""A comparison as one HTML page that needs nothing else: the table, the plot, and every sample to flip through.

Pictures stand inside the page as WebP, clips as animated WebP, so they play in place; both are lossless by default.
"""

from __future__ import annotations

import base64
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffaccel.errors import InputError
from diffaccel.eval.figures import speed_against_fidelity
from diffaccel.eval.measures import FIDELITY
from diffaccel.eval.result import COSTS, Result, Row, cost_cells, mebibytes, score_text
from diffaccel.eval.sample_files import to_bytes

_TEMPLATE = Path(__file__).with_name("page.html.j2")
_MILLISECONDS = 125  # a frame of a clip: its real rate is not known here


def write_page(
    result: Result, out: str | os.PathLike[str], *, items: int = 24, quality: int | None = None, title: str = ""
) -> Path:
    """Write the page of a comparison.

    Args:
        result: of `compare`, with its outputs.
        out: the .html file.
        items: how many items show their samples, evenly over all; more = a larger file.
        quality: of the pictures, 1 to 100 with losses; None for lossless. Large clips want 80 or so.
        title: of the page.

    Returns:
        ``out``.

    Raises:
        InputError: ``items`` is less than 1, or the result came without its outputs.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    if items < 1:
        raise InputError(f"items must be at least 1, got {items}")
    if result.store is None:
        raise InputError("this result came without its outputs; write the page from what compare returned")
    path = Path(out).expanduser()
    count = len(result.prompts) * len(result.seeds)
    shown = sorted({round(i) for i in np.linspace(0, count - 1, min(items, count))})
    rows = result.in_order()
    samples = [
        {
            "prompt": result.prompts[item // len(result.seeds)],
            "seed": result.seeds[item % len(result.seeds)],
            "pictures": {row.name: _embedded(result.store.shown(row.name, item), quality) for row in rows},
            "values": {row.name: _values(result, row, item) for row in rows},
        }
        for item in shown
    ]
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATE.parent), undefined=StrictUndefined, autoescape=True, trim_blocks=True
    )
    html = environment.get_template(_TEMPLATE.name).render(
        title=title or f"{result.conditions.get('pipeline', 'pipeline')}: what acceleration gains and costs",
        rows=[_cells(row) for row in rows],
        measures=[name for name in _measures(result) if name != "psnr"],
        plot=_plot(result),
        cost_names=COSTS,
        costs=[(row.name, row.kind, cost_cells(row)) for row in rows],
        conditions=_conditions(result),
        notes=[*result.set_legends(), *result.notes, *(f"{row.name}: {note}" for row in rows for note in row.notes)],
        restored=result.restored,
        shown=len(shown),
        count=count,
        samples=json.dumps(samples).replace("</", "<\\/"),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(html, encoding="utf-8")
    os.replace(partial, path)
    return path


def _embedded(sample: np.ndarray, quality: int | None) -> str:
    """``[F, H, W, C]`` floats -> a data address of a picture or an animation."""
    frames = [Image.fromarray(frame.squeeze(-1) if frame.shape[-1] == 1 else frame) for frame in to_bytes(sample)]
    how: dict[str, Any] = {"lossless": True, "method": 2} if quality is None else {"quality": quality, "method": 4}
    if len(frames) > 1:
        how |= {"save_all": True, "append_images": frames[1:], "duration": _MILLISECONDS, "loop": 0}
    file = io.BytesIO()
    frames[0].save(file, "WEBP", **how)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def _plot(result: Result) -> str:
    """The plot as SVG, or nothing where there is only the reference."""
    if len(result.rows) < 2 or result.store is None:
        return ""
    file = speed_against_fidelity(result, result.store.folder / "speed-against-fidelity.svg")
    svg = file.read_text(encoding="utf-8")
    return svg[svg.index("<svg") :]


def _measures(result: Result) -> list[str]:
    return list(dict.fromkeys([*FIDELITY, *(name for row in result.rows for name in row.numbers())]))


def _values(result: Result, row: Row, item: int) -> dict[str, float | None]:
    assert result.store is not None
    return result.store.records("item", row=row.name, item=item)[0]["scores"]


def _cells(row: Row) -> dict[str, Any]:
    speed = row.speedup
    return {
        "name": row.name,
        "kind": row.kind,
        "steps": row.steps,
        "loop": "" if row.loop_seconds is None else f"{row.loop_seconds:.3g}",
        "speed": "1" if row.kind == "reference" else f"{speed.value:.2f}",
        "speed_interval": "" if row.kind == "reference" else f"[{speed.low:.2f}, {speed.high:.2f}]",
        "psnr": "" if row.psnr is None else f"{row.psnr.mean:.1f}",
        "worst": "" if row.psnr is None else f"{row.psnr.worst_decile:.1f}",
        "scores": {name: score_text(score, 4).split(" ", 1) for name, score in row.numbers().items()},
        "peak": mebibytes(row.peak_bytes, 0),
        "model": mebibytes(row.model_bytes, 1),
    }


def _processor(result: Result) -> str:
    assert result.store is not None
    known = json.loads((result.store.folder / "environment.json").read_text())
    return f", {known['processor']} ({known['cores']} cores), {known['date']}"


def _conditions(result: Result) -> list[tuple[str, str]]:
    c = result.conditions
    versions = ", ".join(f"{name} {v}" for name, v in c.get("versions", {}).items())
    calls = ", ".join(f"{name}={value}" for name, value in c.get("calls", {}).items())
    return [
        ("prompts and seeds", f"{len(result.prompts)} prompts, seeds {', '.join(map(str, result.seeds))}, batch 1"),
        ("machine", f"{c.get('device')}, {c.get('dtype')}, {c.get('threads')} threads{_processor(result)}"),
        ("call", calls),
        ("versions", versions),
        *([("loading", f"{result.load_seconds.median:.3g} s")] if result.load_seconds else []),
    ]

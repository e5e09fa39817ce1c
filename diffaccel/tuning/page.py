"""A tuning as one HTML page: the frontier as a plot and a table, what the plan does where and when, every trial."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from diffaccel.denoiser import Denoiser
from diffaccel.eval.store import REFERENCE, Store
from diffaccel.tuning.result import HEAD, PSNR, WORST, Tuning, table
from diffaccel.tuning.search import Point
from diffaccel.tuning.timeline import draw, timelines

_TEMPLATE = Path(__file__).with_name("page.html.j2")


def write_page(found: Tuning, store: Store, pipe: Any, denoisers: Sequence[Denoiser], steps: int | None) -> Path:
    """Write ``report.html``, ``frontier.png`` and ``timeline.png`` into the store's folder; returns the page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    plot = _frontier(found, store)
    line = None
    if found.best is not None and steps is not None:
        line = draw(timelines(found.plan, pipe, denoisers, steps, found.best.outcome.report))
    for name, figure in (("frontier.png", plot), ("timeline.png", line)):
        if figure is not None:
            store.write(store.folder / name, partial(figure.savefig, dpi=150))
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATE.parent), undefined=StrictUndefined, autoescape=True, trim_blocks=True
    )
    html = environment.get_template(_TEMPLATE.name).render(
        title=f"{type(pipe).__name__}: plans for {found.budget}",
        verdict=found.verdict,
        restored=found.restored,
        plot=_svg(plot),
        timeline="" if line is None else _svg(line),
        head=HEAD,
        rows=table(found.points, found.best),
        alone=_alone(found, store),
        conditions=_conditions(found, store),
        notes=found.notes,
    )
    return store.write(store.folder / "report.html", lambda file: file.write_text(html, encoding="utf-8"))


def _frontier(found: Tuning, store: Store) -> Any:
    """Speed-up across, PSNR up: every trial as a dot, the frontier as a line, the chosen plan marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    tried = _trials(found, store)
    axis.scatter([t[1] for t in tried], [t[2] for t in tried], s=12, color="#9aa2aa", label="tried")
    if found.points:
        xs, ys = [1 / p.outcome.cost for p in found.points], [p.outcome.estimate(PSNR) for p in found.points]
        lows = [max(0.0, y - p.outcome.bound(PSNR)) for y, p in zip(ys, found.points, strict=True)]
        axis.errorbar(
            xs, ys, yerr=[lows, [0.0] * len(ys)], marker="o", color="#1b6ca8", label="frontier, with 95 % bound"
        )
    if found.best is not None:
        best = found.best
        axis.scatter(
            [1 / best.outcome.cost],
            [best.outcome.estimate(PSNR)],
            s=140,
            marker="*",
            color="#c8742a",
            zorder=3,
            label="chosen",
        )
    for limit in found.budget.limits:
        if limit.name == "psnr":
            axis.axhline(limit.bound, color="#c8742a", linewidth=0.8, linestyle="--")
        if limit.name == "speedup":
            axis.axvline(limit.bound, color="#c8742a", linewidth=0.8, linestyle="--")
    axis.set_xlabel("speed-up of the denoising loop")
    axis.set_ylabel("PSNR, dB")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return figure


def _trials(found: Tuning, store: Store) -> list[tuple[str, float, float]]:
    """Name, speed-up and PSNR of everything that was tried, as the records of its items have them."""
    records: dict[str, list[dict[str, Any]]] = {}
    for record in store.records("item"):
        records.setdefault(record["row"], []).append(record)
    base = {r["item"]: r["seconds"] / r["pace"] for r in records.pop(REFERENCE, [])}
    tried = []
    for name, items in records.items():
        ratios = sorted(r["seconds"] / r["pace"] / base[r["item"]] for r in items)
        decibels = [100.0 if r["scores"]["psnr"] is None else min(r["scores"]["psnr"], 100.0) for r in items]
        tried.append((name, 1 / ratios[len(ratios) // 2], sum(decibels) / len(decibels)))
    return tried


def _alone(found: Tuning, store: Store) -> list[list[str]]:
    points = [Point(frozenset({option}), outcome) for option, outcome in found.alone.items()]
    return [
        [
            p.name,
            f"{1 / p.outcome.cost:.2f}x",
            f"{p.outcome.estimate(PSNR):.1f}",
            f"{p.outcome.estimate(WORST):.1f}",
            f"{p.outcome.share:.2f}",
        ]
        for p in points
    ]


def _conditions(found: Tuning, store: Store) -> list[tuple[str, str]]:
    settings = json.loads((store.folder / "run.json").read_text())
    environment = json.loads((store.folder / "environment.json").read_text())
    speed = [("predicted speed-up", f"{found.predicted:.2f}x")] if found.predicted else []
    calls = ", ".join(f"{name}={value}" for name, value in settings["calls"].items())
    return [
        ("budget", str(found.budget)),
        *speed,
        ("trials", f"{found.trials} runs of the pipeline, {found.seconds / 60:.1f} min"),
        (
            "prompts",
            f"{len(settings['prompts'])}, seeds {settings['seeds']}, split by seed {settings['seed']}",
        ),
        ("call", calls),
        (
            "machine",
            f"{environment['processor']}, {settings['device']}, {settings['dtype']}, {settings['threads']} threads",
        ),
        ("versions", ", ".join(f"{name} {v}" for name, v in settings["versions"].items())),
    ]


def _svg(figure: Any) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg")
    text = file.getvalue()
    return text[text.index("<svg") :]

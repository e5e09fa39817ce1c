"""An inspection as a tree for the terminal and as a picture of bars."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from diffaccel.inspection.structure import ATTENTION, DenoiserInfo, Inspection, Share

_AXES = {"parameters": "% of parameters", "flops": "% of FLOPs", "seconds": "% of seconds"}


def tree(inspection: Inspection) -> Tree:
    """The whole inspection; `rich.print` shows it."""
    root = Tree(Text(inspection.model, style="bold"))
    if inspection.run:
        root.add(Text(f"run: {inspection.run}", style="dim"))
    total = sum(inspection.phases.values())
    if total:
        parts = ", ".join(
            f"{name} {seconds:.2f} s ({seconds / total:.0%})" for name, seconds in inspection.phases.items()
        )
        root.add(f"whole call: {parts}")
    if len(inspection.components) > 1:
        root.add("components").add(_shares(inspection.components))
    for denoiser in inspection.denoisers:
        _add_denoiser(root, denoiser)
    for note in inspection.notes:
        root.add(Text(f"note: {note}", style="dim"))
    return root


def _add_denoiser(root: Tree, denoiser: DenoiserInfo) -> None:
    calls = f", {denoiser.calls} calls" if denoiser.calls else ""
    branch = root.add(Text(f"{denoiser.component}: {denoiser.class_name}{calls}", style="bold"))
    for block, names in denoiser.blocks.items():
        branch.add(f"{len(names)} x {block}: {names[0]}{' ... ' + names[-1] if len(names) > 1 else ''}")
    branch.add("roles").add(_shares(denoiser.roles))
    if denoiser.attention:
        attention = branch.add("attention calls, in each denoiser call")
        for kind in denoiser.attention:
            shape = f"{kind.calls} x {kind.role}: batch {kind.batch}, {kind.heads} heads of {kind.width}"
            tokens = f"{kind.queries} tokens" if kind.queries == kind.keys else f"{kind.queries} on {kind.keys} tokens"
            line = f"{shape}, {tokens}{', masked' if kind.masked else ''}"
            attention.add(f"{line}{': ' + kind.layout if kind.layout else ''}")


def _shares(shares: Sequence[Share]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("")
    for name in ("layers", "parameters", "%", "FLOPs", "%", "seconds", "%"):
        table.add_column(name, justify="right")
    parameters, flops, seconds = (sum(getattr(s, n) for s in shares) for n in ("parameters", "flops", "seconds"))
    for s in shares:
        layers = str(s.modules) if s.modules and s.name != ATTENTION else ""
        figures = (_count(s.parameters), _part(s.parameters, parameters), _count(s.flops), _part(s.flops, flops))
        table.add_row(s.name, layers, *figures, f"{s.seconds:.3f}" if seconds else "", _part(s.seconds, seconds))
    return table


def _part(value: float, whole: float) -> str:
    return f"{100 * value / whole:.1f}" if whole else ""


def _count(value: float) -> str:
    if not value:
        return ""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return str(value)


def draw(inspection: Inspection, out: str | os.PathLike[str]) -> Path:
    """Bars of parameters, FLOPs and seconds by component and by role, written to ``out``; returns the path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = [(f"{d.component} ({d.class_name})", d.roles) for d in inspection.denoisers]
    if len(inspection.components) > 1:
        groups.insert(0, (inspection.model, inspection.components))
    kinds = [
        k for k in ("parameters", "flops", "seconds") if any(getattr(s, k) for _, shares in groups for s in shares)
    ]
    heights = [max(len(shares), 2) for _, shares in groups]
    figure = Figure(figsize=(4 * len(kinds) + 1.5, 0.28 * sum(heights) + 0.9 * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(groups), len(kinds), squeeze=False, height_ratios=heights)
    for line, (title, shares) in zip(axes, groups, strict=True):
        for axis, kind in zip(line, kinds, strict=True):
            _bars(axis, shares, kind, title if kind == kinds[0] else "", named=kind == kinds[0])
    path = Path(out).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _bars(axis: Any, shares: Sequence[Share], kind: str, title: str, named: bool) -> None:
    values = [getattr(s, kind) for s in shares]
    whole = sum(values) or 1
    bars = axis.barh([s.name for s in shares], [100 * v / whole for v in values], color="#1b6ca8")
    axis.bar_label(bars, [f"{100 * v / whole:.0f} %" if v else "" for v in values], padding=2, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(0, 115)
    axis.tick_params(labelsize=7, labelleft=named)
    axis.set_xlabel(
        {"parameters": "% of parameters", "flops": "% of FLOPs", "seconds": "% of seconds"}[kind], fontsize=7
    )
    axis.set_title(title, fontsize=8, loc="left")

"""What a plan does where and when: roles down, steps across, for one denoiser. As a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffaccel.clock import Clock
from diffaccel.denoiser import Denoiser, Site, select
from diffaccel.plan import Plan, in_steps
from diffaccel.quantization import attach as quantization
from diffaccel.quantization.schedule import Schedule
from diffaccel.technique import Context

_FULL = 32.0


@dataclass(frozen=True)
class Timeline:
    """Of one denoiser.

    Args:
        component: its name.
        rows: roles of its layers, ``attention``, ``guidance``.
        values: what is left of the work or the bits there, 1 for all, [rows, steps].
        words: the same in words, "" where nothing was changed.
        skipped: whether the whole call was reused in the run that was looked at, [steps].
    """

    component: str
    rows: tuple[str, ...]
    values: np.ndarray
    words: tuple[tuple[str, ...], ...]
    skipped: tuple[bool, ...]


def timelines(
    plan: Plan, pipe: Any, denoisers: Sequence[Denoiser], steps: int, report: Mapping[str, Any]
) -> list[Timeline]:
    """One for each denoiser.

    Args:
        plan: that fits the pipeline, which is not accelerated.
        steps: of the schedule.
        report: of a run with it, which knows the steps that a cache left out.
    """
    context = Context(tuple(denoisers), Clock(pipe), plan.artefacts, pipeline=pipe)
    sections: Any = plan.quantization
    schedules = quantization.resolve(sections, context).sites if sections else {}
    computed = report.get("techniques", {}).get("caching", {}).get("steps_computed", {})
    progress = [i / (steps - 1) if steps > 1 else 0.0 for i in range(steps)]
    return [_timeline(plan, denoiser, schedules, progress, computed.get(denoiser.component)) for denoiser in denoisers]


def draw(lines: Sequence[Timeline]) -> Any:
    """A matplotlib figure of them, one above the other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = sum(0.28 * len(line.rows) + 1.0 for line in lines)
    figure = Figure(figsize=(2.6 + 0.36 * lines[0].values.shape[1], height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(lines), 1, squeeze=False, height_ratios=[len(line.rows) + 2 for line in lines])[:, 0]
    for axis, line in zip(axes, lines, strict=True):
        axis.imshow(line.values, aspect="auto", cmap="YlGnBu_r", vmin=-0.35, vmax=1.25)
        for y, row in enumerate(line.words):
            for x, word in enumerate(row):
                if word and not line.skipped[x]:
                    axis.text(x, y, word, ha="center", va="center", fontsize=6)
        for x, skipped in enumerate(line.skipped):
            if skipped:
                axis.axvspan(x - 0.5, x + 0.5, color="white", alpha=0.85)
                axis.text(x, (len(line.rows) - 1) / 2, "reused", rotation=90, ha="center", va="center", fontsize=6)
        axis.set_yticks(range(len(line.rows)), line.rows, fontsize=7)
        axis.set_xticks(range(line.values.shape[1]))
        axis.tick_params(axis="x", labelsize=6)
        axis.set_title(f"{line.component}: bits of weights, density of attention, by step", fontsize=8)
    return figure


def _timeline(
    plan: Plan,
    denoiser: Denoiser,
    schedules: Mapping[Site, Schedule],
    progress: Sequence[float],
    computed: Sequence[int] | None,
) -> Timeline:
    rows: list[str] = []
    values, words = [], []
    roles = sorted({site.role for site in denoiser.layers})
    for role in roles:
        sites = [site for site in denoiser.layers if site.role == role]
        bits = [float(np.mean([_bits(schedules, site, p) for site in sites])) for p in progress]
        rows.append(role)
        values.append([b / _FULL for b in bits])
        words.append(tuple("" if b == _FULL else f"{b:.3g}" for b in bits))
    if plan.attention:
        densities = [_density(plan, denoiser, p) for p in progress]
        rows.append("attention")
        values.append(densities)
        words.append(tuple("" if d == 1 else f"{d:.0%}" for d in densities))
    guidance: Any = plan.guidance
    if guidance is not None:
        inside = [in_steps(p, guidance.steps) for p in progress]
        rows.append("guidance")
        values.append([0.5 if i else 1.0 for i in inside])
        words.append(tuple(f"1/{guidance.every}" if i else "" for i in inside))
    count = len(progress)
    kept = set(range(count)) if computed is None else set(computed)
    return Timeline(
        denoiser.component,
        tuple(rows),
        np.array(values, np.float64).reshape(len(rows), count),
        tuple(words),
        tuple(i not in kept for i in range(count)),
    )


def _bits(schedules: Mapping[Site, Schedule], site: Site, progress: float) -> float:
    """Of the weight at this step; of one that is left alone as many as it has, counted as 32."""
    schedule = schedules.get(site, ())
    form = next((form for steps, form in schedule if in_steps(progress, steps)), None)
    return _FULL if form is None else float(form.scheme.bits)


def _density(plan: Plan, denoiser: Denoiser, progress: float) -> float:
    """Mean over the attention sites of the part that is computed."""
    left: dict[Site, float] = {}
    for section in plan.attention:
        density, steps = getattr(section, "density", 1.0), getattr(section, "steps", (0.0, 1.0))
        sites = select([denoiser], getattr(section, "sites", "attn"), "attentions")
        left |= {site: density if in_steps(progress, steps) else 1.0 for site in sites}
    return float(np.mean(list(left.values()))) if left else 1.0

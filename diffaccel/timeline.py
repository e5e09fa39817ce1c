"""What happened to each part of a denoiser at each step of a run: computed, reused or forecast."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from diffaccel.errors import InputError

STATES = {"computed": "#", "reused": ".", "forecast": "~"}
"""Each state and how it is drawn in text."""


class Timeline:
    """One run of one denoiser: rows are branches of guidance, or a branch and a group of modules."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[int, str]] = {}
        self.steps = 0

    def note(self, step: int, row: str, state: str, steps: int | None = None) -> None:
        """Take in a state; the last one of a step counts."""
        self.rows.setdefault(row, {})[step] = state
        self.steps = max(self.steps, step + 1, steps or 0)

    def computed(self) -> dict[str, list[int]]:
        """By row the steps that were computed."""
        return {row: [s for s, state in states.items() if state == "computed"] for row, states in self.rows.items()}

    def to_dict(self) -> dict[str, str]:
        """By row a character per step: those of `STATES`, a space where there was no call."""
        return {
            row: "".join(STATES.get(states.get(step, ""), " ") for step in range(self.steps))
            for row, states in self.rows.items()
        }


def drawn(name: str, rows: Mapping[str, str]) -> list[str]:
    """Rows of `Timeline.to_dict` as lines, below what the marks mean and a ruler that counts steps in fives."""
    if not rows:
        return []
    used = [f"{mark} {state}" for state, mark in STATES.items() if any(mark in marks for marks in rows.values())]
    width, length = max(map(len, rows)), max(map(len, rows.values()))
    ruler = "".join(f"{step:<5}" for step in range(0, length, 5))[:length]
    lines = [f"last run of {name}: {', '.join(used)}", f"  {'':{width}} {ruler}"]
    return lines + [f"  {row:{width}} {marks}" for row, marks in rows.items()]


def plot_rows(rows: Sequence[tuple[str, str, str]], path: str | os.PathLike[str]) -> None:
    """A picture with one line of coloured cells for each row.

    Args:
        rows: name, technique and marks as in `Timeline.to_dict`.
        path: of a file whose ending matplotlib knows, such as ``.png`` or ``.svg``.

    Raises:
        InputError: no rows, or the file cannot be written.
    """
    if not rows:
        raise InputError("there is no timeline to draw: nothing in the plan skips steps, or no run was made yet")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    length = max(len(marks) for _, _, marks in rows)
    figure = Figure(figsize=(2.5 + 0.22 * length, 1.1 + 0.32 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for y, (_, _, marks) in enumerate(rows):
        for step, mark in enumerate(marks):
            if mark in _COLOURS:
                axes.add_patch(_cell(step, y, _COLOURS[mark]))
    axes.set(xlim=(-0.5, length - 0.5), ylim=(len(rows) - 0.5, -0.5), xlabel="step")
    axes.set_yticks(range(len(rows)), [f"{technique}: {name}" for name, technique, _ in rows])
    axes.set_xticks(range(0, length, max(1, length // 10)))
    axes.spines[:].set_visible(False)
    axes.legend(
        handles=[Patch(color=_COLOURS[mark], label=state) for state, mark in STATES.items()],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(STATES),
        frameon=False,
    )
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:  # no such folder; an ending that matplotlib does not know
        raise InputError(f"no picture can be written to {str(path)!r}: {error}") from None


_COLOURS = {"#": "#3b6ea5", ".": "#e3e6ea", "~": "#f2b56b"}


def _cell(step: int, y: int, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((step - 0.45, y - 0.38), 0.9, 0.76, color=colour)

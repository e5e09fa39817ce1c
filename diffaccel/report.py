"""What really happened: one report per technique, as data and as a table."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from diffaccel.timeline import drawn, plot_rows


@dataclass
class TechniqueReport:
    """What one technique did so far.

    Args:
        technique: the plan's field, such as ``caching``.
        settings: the sections in short, for people.
        sites: how many places it acts on.
        facts: figures by name, JSON-ready: ``computed``, ``reused``, ``bytes_before``, ``bytes_after``, ``path``, ...
        notes: what a user should know: sites left alone and why, fallbacks taken, slower than expected.
    """

    technique: str
    settings: str
    sites: int
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What an acceleration did so far; ``print(report)`` shows a table, `to_dict` gives JSON.

    Args:
        plan: the plan's name, or ``custom``.
        denoisers: component -> class name.
        calls: component -> denoiser calls seen (0 while nothing watches the denoiser).
        techniques: one entry per technique in use.
        notes: about the plan as a whole, such as what a preset left out and why.
        seconds: component -> seconds of each denoiser call; empty unless profiled.
    """

    plan: str
    denoisers: dict[str, str]
    calls: dict[str, int]
    techniques: list[TechniqueReport]
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "plan": self.plan,
            "denoisers": self.denoisers,
            "calls": self.calls,
            "seconds": self.seconds,
            "notes": self.notes,
            "techniques": {
                t.technique: {"settings": t.settings, "sites": t.sites, **t.facts, "notes": t.notes}
                for t in self.techniques
            },
        }

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write the timeline of the last run as a picture: for each denoiser what was computed at which step.

        Raises:
            InputError: no technique here skips anything, no run was made, or ``path`` cannot be written.
        """
        rows = [
            (f"{component} {row}" if len(self.denoisers) > 1 else row, t.technique, marks)
            for t in self.techniques
            for component, lines in t.facts.get("timeline", {}).items()
            for row, marks in lines.items()
        ]
        plot_rows(rows, path)

    def __str__(self) -> str:
        names = ", ".join(f"{c} ({n})" for c, n in self.denoisers.items())
        lines = [f"plan {self.plan} on {names}"]
        for component, seconds in self.seconds.items():
            if seconds:
                total, median = sum(seconds), sorted(seconds)[len(seconds) // 2]
                lines.append(f"  {component}: {len(seconds)} calls, {total:.2f} s, median {median * 1e3:.1f} ms")
        for t in self.techniques:
            facts = "; ".join(f"{k.replace('_', ' ')} {_short(v)}" for k, v in t.facts.items() if k != "timeline")
            lines.append(f"  {t.technique}: {t.settings}")
            lines.append(f"    {t.sites} site{'s' if t.sites != 1 else ''}{'; ' + facts if facts else ''}")
            for component, rows in t.facts.get("timeline", {}).items():
                lines += [f"    {line}" for line in drawn(component, rows)]
            lines += [f"    note: {note}" for note in t.notes]
        if not self.techniques:
            lines.append("  nothing applied")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, int) and abs(value) >= 1 << 20:
        return f"{value / (1 << 20):.1f} Mi"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_short(v)}" for k, v in value.items()) + "}"
    return str(value)

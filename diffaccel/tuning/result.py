"""The folder that a tuning leaves: the plan, the frontier, the evidence and a page to look at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from diffaccel import frontier
from diffaccel.eval.store import Store
from diffaccel.eval.timing import Ratio
from diffaccel.plan import Plan
from diffaccel.tuning.budget import Budget, Limit
from diffaccel.tuning.outcome import Outcome
from diffaccel.tuning.search import Point
from diffaccel.tuning.space import Option, compose

PSNR = Limit("psnr", "psnr", "mean", 0.0, True)
WORST = Limit("psnr_worst", "psnr", "worst", 0.0, True)


@dataclass(frozen=True)
class Tuning:
    """What was found.

    Args:
        plan: the fastest within the budget; empty where only the original keeps to it.
        budget: that was asked for.
        best: its point, or None.
        points: the frontier, from the nearest to the original to the fastest.
        speedup: of the denoising loop, measured in turns with the original, or None.
        predicted: the same as the cost model had it from what each technique gains alone.
        trials: how many runs of the pipeline.
        seconds: that they took, over all sittings.
        restored: whether the pipeline gave its first output again to the bit.
        alone: what each setting does by itself.
        notes: what was left out and why.
    """

    plan: Plan
    budget: Budget
    best: Point | None
    points: Sequence[Point]
    speedup: Ratio | None
    predicted: float | None
    trials: int
    seconds: float
    restored: bool
    alone: Mapping[Option, Outcome] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def verdict(self) -> str:
        """In one line."""
        if self.best is None:
            return f"nothing but the original surely keeps to {self.budget}"
        outcome = self.best.outcome
        parts = [
            f"{limit.name} {outcome.estimate(limit):.4g} (surely {outcome.bound(limit):.4g})"
            for limit in self.budget.limits
        ]
        speed = self.speedup
        measured = f"{speed.value:.2f}x [{speed.low:.2f}, {speed.high:.2f}]" if speed else f"{1 / outcome.cost:.2f}x"
        return f"{measured}, {', '.join(parts)} on {len(set(outcome.prompts))} prompts: {self.best.name}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "verdict": self.verdict,
            "budget": self.budget.to_dict(),
            "plan": self.plan.to_dict(),
            "frontier": [entry(p, f"frontier/{i}", p == self.best) for i, p in enumerate(self.points)],
            "speedup": None if self.speedup is None else self.speedup.to_dict(),
            "predicted_speedup": self.predicted,
            "trials": self.trials,
            "seconds": self.seconds,
            "restored": self.restored,
            "notes": list(self.notes),
        }

    def __rich__(self) -> Group:
        lines = [self.verdict, *(f"left out: {n}" for n in self.notes)]
        if not self.restored:
            lines.insert(0, "the pipeline does not give its first output again to the bit")
        return Group(as_table(table(self.points, self.best)), *(Text(line) for line in lines))


def entry(point: Point, folder: str, chosen: bool) -> dict[str, Any]:
    """A line of ``frontier.json``."""
    outcome = point.outcome
    return {
        "folder": folder,
        "name": point.name,
        "psnr": round(outcome.estimate(PSNR), 4),
        "psnr_bound": round(outcome.bound(PSNR), 4),
        "psnr_worst": round(outcome.estimate(WORST), 4),
        "speedup": round(1 / outcome.cost, 4),
        "memory": round(outcome.share, 4),
        "prompts": len(set(outcome.prompts)),
        "chosen": chosen,
    }


def write_plans(
    store: Store, best: Point | None, points: Sequence[Point], budget: Budget, key: Mapping[str, Any]
) -> Plan:
    """Write the plan and the frontier; returns the plan. At any moment the folder holds the best so far.

    A plan is written before the file that names it, and each file is replaced as a whole.
    """
    plan = plan_of(best, budget, key)
    entries = []
    for number, point in enumerate(points):
        place = f"frontier/{number}"
        plan_of(point, budget, key).save(store.folder / place)
        entries.append(entry(point, place, point == best))
    text = json.dumps({"schema": 1, "budget": budget.to_dict(), "plans": entries}, indent=1, allow_nan=False)
    store.write(store.folder / frontier.FILE, lambda partial: partial.write_text(text))
    plan.save(store.folder)
    return plan


def plan_of(point: Point | None, budget: Budget, key: Mapping[str, Any]) -> Plan:
    """The plan of a point with what it was tuned for; the empty plan of none."""
    if point is None:
        return Plan(name="tuned: the original", key=dict(key))
    tuned = {
        "budget": budget.to_dict(),
        "psnr": round(point.outcome.estimate(PSNR), 3),
        "psnr_worst": round(point.outcome.estimate(WORST), 3),
        "speedup": round(1 / point.outcome.cost, 3),
        "prompts": len(set(point.outcome.prompts)),
    }
    return compose(point.choice, name="tuned", key={**key, "tuned": {**key.get("tuned", {}), **tuned}})


def table(points: Sequence[Point], best: Point | None) -> list[list[str]]:
    """The frontier in words, a row a plan: name, speed-up, PSNR, of the worst tenth, bytes, prompts, whether chosen."""
    rows = []
    for point in points:
        o = point.outcome
        rows.append(
            [
                point.name,
                f"{1 / o.cost:.2f}x",
                f"{o.estimate(PSNR):.1f}",
                f"{o.estimate(WORST):.1f}",
                f"{o.share:.2f}",
                str(len(set(o.prompts))),
                "chosen" if point == best else "",
            ]
        )
    return rows


HEAD = ("plan", "loop", "PSNR dB", "worst tenth", "bytes", "prompts", "")


def as_table(rows: Sequence[Sequence[str]]) -> Table:
    """Rows of `table` for the terminal."""
    shown = Table(*HEAD, box=box.SIMPLE)
    for row in rows:
        shown.add_row(*row, style="bold green" if row[-1] else "")
    return shown

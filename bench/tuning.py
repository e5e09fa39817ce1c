"""Does a tuned plan keep its budget, and what does it gain? Plans are tuned on tuning prompts, judged on held-out ones.

    python bench/tuning.py                     # both pipelines, both budgets, 5 seeds: some hours on 2 cores
    python bench/tuning.py --model video --budget 40,30 --seeds 2 --minutes 10 --held-out 32
    python bench/tuning.py --model image --budget 36,26 --resolves 50    # and what other draws would choose

A budget is mean PSNR, PSNR of the worst tenth. Each plan stands beside fewer steps at its time (from `compare`) and
beside the best plan of a single technique that the same trials found. All is kept in --folder and resumes there.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from diffaccel import Budget, Plan
from diffaccel.eval.compare import compare
from diffaccel.pipelines.bundled import bundled
from diffaccel.pipelines.loading import load
from diffaccel.tuning.outcome import Outcome
from diffaccel.tuning.result import PSNR, WORST
from diffaccel.tuning.search import Search, Split
from diffaccel.tuning.space import Option, compose
from diffaccel.tuning.tune import run

BUDGETS = ("40,30", "36,26")
PROMPTS = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("image", "video", "both"), default="both")
    parser.add_argument("--budget", nargs="+", default=BUDGETS, help="mean,worst in dB")
    parser.add_argument("--seeds", type=int, default=5, help="tunings that differ in the split of the prompts")
    parser.add_argument("--minutes", type=float, default=5.0, help="of each tuning")
    parser.add_argument("--held-out", type=int, default=32, help="prompts that the plans are judged on")
    parser.add_argument("--resolves", type=int, default=0, help="bootstrap draws of the recorded trials to choose from")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, default=Path("out/bench-tuning"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console()
    for kind in ("image", "video") if options.model == "both" else (options.model,):
        for text in options.budget:
            mean, worst = (float(part) for part in text.split(","))
            table = judged(kind, Budget(psnr=mean, psnr_worst=worst), options)
            console.print(f"\nbundled:{kind}, {mean:g} dB mean and {worst:g} dB worst tenth")
            console.print(table, markup=False)


def _best_single(alone: dict, points: list, budget: Budget) -> Option | None:
    """The fastest plan of one technique within the budget, as far as the trials tell."""
    tried = [(p.outcome, *p.choice) for p in points if len(p.choice) == 1] + [(out, o) for o, out in alone.items()]
    fitting = [(outcome.cost, option) for outcome, option in tried if outcome.keeps(budget, surely=False)]
    return min(fitting, default=(1.0, None), key=lambda pair: pair[0])[1]


def judged(kind: str, budget: Budget, options: argparse.Namespace) -> str:
    """A table in markdown: each tuning on the held-out prompts."""
    wrapped, known = load(f"bundled:{kind}"), bundled(f"bundled:{kind}")
    prompts = known.tuning_prompts()[:PROMPTS]
    place = options.folder / f"{kind}-{budget.psnr:g}-{budget.psnr_worst:g}"
    plans: dict[str, Plan] = {}
    predicted: dict[str, float] = {}
    for seed in range(options.seeds):
        name = f"seed {seed}"
        found = run(wrapped, prompts, budget, minutes=options.minutes, folder=place / f"seed-{seed}", seed=seed)
        plans[name], predicted[name] = found.plan, found.predicted or 1.0
        if seed == 0:
            best = _best_single(found.alone, found.points, budget)
            if best is not None:
                plans["single"] = compose([best])
        if options.resolves:
            held = resolved(found.alone, found.points, budget, len(prompts), seed, options.resolves)
            told = f"seed {seed}: {held:.0%} of {options.resolves} draws choose a plan that all prompts confirm"
            Console(stderr=True).print(told)
    result = compare(wrapped, plans, known.prompts()[: options.held_out], folder=place / "held-out")
    lines = [
        "| plan | loop [95 %] | predicted | PSNR | worst tenth | holds | fewer steps at its time |",
        "|---|--:|--:|--:|--:|---|---|",
    ]
    for name in plans:
        row = result.row(name)
        assert row.psnr is not None
        holds = row.psnr.mean >= (budget.psnr or 0) and row.psnr.worst_decile >= (budget.psnr_worst or 0)
        control = next((r for r in result.rows if name in r.control_of), None)
        beside = ""
        if control is not None and control.psnr is not None:
            beside = f"{control.name}: {control.psnr.mean:.1f} / {control.psnr.worst_decile:.1f} dB"
        guess = f"{predicted[name]:.2f}x" if name in predicted else ""
        speed = f"{row.speedup.value:.2f}x [{row.speedup.low:.2f}, {row.speedup.high:.2f}]"
        lines.append(
            f"| {name} | {speed} | {guess} | {row.psnr.mean:.1f} | {row.psnr.worst_decile:.1f} | "
            f"{'yes' if holds else 'no'} | {beside} |"
        )
    return "\n".join(lines)


class Recorded:
    """Trials that were made, on prompts drawn again with replacement; what was not tried cannot be chosen."""

    def __init__(self, outcomes: dict[str, Outcome], drawn: dict[int, int]) -> None:
        self._outcomes, self._drawn = outcomes, drawn
        self.elapsed = 0.0

    def reference(self, items: object) -> None:
        """There already."""

    def why_not(self, name: str) -> str:
        return "it is not on record"

    def run(self, name: str, plan: Plan, items: tuple[int, ...]) -> Outcome | None:
        return self.outcome(name, items) if name in self._outcomes else None

    def outcome(self, name: str, items: tuple[int, ...]) -> Outcome:
        known = self._outcomes[name]
        decibels = list(known.scores["psnr"])
        at = [self._drawn[i] % len(decibels) for i in items]
        scores = {"psnr": [decibels[i] for i in at]}
        return Outcome(tuple(items), tuple(items), scores, {}, known.cost, known.share, known.report)


def resolved(alone: dict, points: list, budget: Budget, count: int, seed: int, draws: int) -> float:
    """Share of the draws whose choice keeps to the budget on all recorded prompts."""
    outcomes = {option.label: outcome for option, outcome in alone.items()} | {p.name: p.outcome for p in points}
    families = list({option.family.name: option.family for option in alone}.values())
    rng, held, chosen = np.random.default_rng(seed), 0, 0
    for _ in range(draws):
        drawn = {i: int(rng.integers(count)) for i in range(count)}
        search = Search(Recorded(outcomes, drawn), budget, families, Split.of(range(count), seed))  # type: ignore[arg-type]
        best = search.run()
        if best is not None:
            chosen += 1
            whole = outcomes[best.name]
            held += whole.estimate(PSNR) >= (budget.psnr or 0) and whole.estimate(WORST) >= (budget.psnr_worst or 0)
    return held / chosen if chosen else float("nan")


if __name__ == "__main__":
    main()

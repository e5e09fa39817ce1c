"""What each kind of reuse is worth on a bundled pipeline, beside fewer steps and others' caches at the same cost.

    python bench/reuse.py --folder runs/reuse                             # everything, both pipelines: some hours
    python bench/reuse.py --folder runs/r --model image --parts schedules --prompts 8      # about half an hour
    python bench/reuse.py --folder runs/r --model video --parts guidance modules

Parts: ``schedules`` (static schedules, EasyCache, SeaCache and others' caches at several costs, with fewer steps),
``forecasts`` (the same schedule with each forecast), ``transfer`` (20, 30 and 50 steps with a calibration at 30 steps
and with one of their own), ``guidance``, ``modules`` (FORA, SmoothCache, PAB, TaylorSeer), ``exact`` and ``tokens``.

Every prompt runs alone; rows take turns, so that drift of the machine cancels. "Computed" is the share of denoiser
operations that are left, counted. PSNR in dB on floats in [0, 1] against the untouched pipeline, mean and mean of the
worst tenth. Calibration and rows use tuning prompts, none of those that README reports on; calibration uses the last
ones, the rows the first. A run that was cut off goes on from its folder.
"""

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from diffaccel import ExactReuse, GuidanceReuse, MergeTokens, Plan, StepCache, calibrate
from diffaccel.eval.compare import compare
from diffaccel.eval.result import Result
from diffaccel.pipelines.bundled import bundled
from diffaccel.pipelines.loading import load

PEERS = ("first-block-cache", "sea-cache", "mag-cache", "cache-dit", "smooth-cache", "pyramid-attention-broadcast")
SHARES = (0.75, 0.65, 0.55, 0.5, 0.45, 0.4, 0.33)
CONTROLS = (0.75, 0.65, 0.55, 0.5, 0.45, 0.4, 0.33)


class Bench:
    """One bundled pipeline."""

    def __init__(self, kind: str, options: argparse.Namespace) -> None:
        self.kind, self.options = kind, options
        self.wrapped, self.known = load(f"bundled:{kind}"), bundled(f"bundled:{kind}")
        self.prompts = self.known.tuning_prompts()[: options.prompts]
        self.steps = int(self.wrapped.defaults["num_inference_steps"])

    def calibrated(self, section: StepCache, name: str, steps: int) -> Plan:
        """A plan with what the section needs at a number of steps; from the folder where it was measured before."""
        folder = self.options.folder / self.kind / f"calibrated-{name}-{steps}"
        if (folder / "plan.json").is_file():
            return Plan.load(folder)
        prompts = self.known.tuning_prompts()[-self.options.calibration :]
        call = {**self.wrapped.defaults, "num_inference_steps": steps}
        call.pop("output_type", None)
        plan = calibrate(self.wrapped.pipe, section, prompts=prompts, **call)
        plan.save(folder)
        return plan

    def schedule(self, steps: int | None = None) -> Callable[..., Plan]:
        """A function from settings of `StepCache.scheduled` to plans."""
        plan = self.calibrated(StepCache.scheduled(share=0.5), "schedule", steps or self.steps)

        def make(**settings: Any) -> Plan:
            return dataclasses.replace(plan, caching=StepCache.scheduled(**settings))

        return make

    def run(self, part: str, plans: Mapping[str, Plan], **settings: Any) -> None:
        """Compare and print."""
        result = compare(
            self.wrapped,
            plans,
            self.prompts,
            folder=self.options.folder / self.kind / part,
            flops=True,
            **{"controls": ()} | settings,
        )
        print(
            f"\n### {part}, bundled:{self.kind}, {len(self.prompts)} tuning prompts\n\n{markdown(result)}", flush=True
        )
        for note in result.notes:
            Console(stderr=True).print(f"note: {note}")


def markdown(result: Result) -> str:
    """A table, the cheapest row last."""
    whole = result.rows[0].flops
    lines = ["| | loop speed-up | computed | PSNR | worst tenth |", "|---|---|---|---|---|"]
    cost = lambda row: 1.0 if whole is None or row.flops is None else row.flops.denoiser / whole.denoiser  # noqa: E731
    for row in sorted((r for r in result.rows if r.kind != "reference"), key=cost, reverse=True):
        psnr = row.psnr
        dB = ("-", "-") if psnr is None else (f"{psnr.mean:.1f} dB", f"{psnr.worst_decile:.1f} dB")
        lines.append(f"| {row.name} | {row.speedup.value:.2f}x | {cost(row):.0%} | {dB[0]} | {dB[1]} |")
    return "\n".join(lines)


def schedules(bench: Bench) -> None:
    make = bench.schedule()
    plans = {f"schedule, {share:.0%} of the steps": make(share=share) for share in SHARES}
    plans |= {f"schedule, {psnr} dB": make(psnr=psnr) for psnr in (35, 40, 45)}
    plans |= {f"easy {t:g}": Plan(caching=StepCache(threshold=t)) for t in (0.03, 0.05, 0.08, 0.12, 0.18)}
    plans |= {f"sea {t:g}": Plan(caching=StepCache.seacache(t)) for t in (0.15, 0.25, 0.4)}
    plans |= {f"first block {t:g}": Plan(caching=StepCache.first_block(t)) for t in (0.08, 0.12, 0.2)}
    controls = sorted({max(round(share * bench.steps), 1) for share in CONTROLS})
    bench.run("schedules", plans, controls=controls, peers=PEERS)


def forecasts(bench: Bench) -> None:
    make = bench.schedule()
    bench.run(
        "forecasts",
        {f"{f}, {s:.0%}": make(forecast=f, share=s) for s in (0.65, 0.5, 0.4) for f in ("hold", "linear", "fitted")},
    )


def transfer(bench: Bench) -> None:
    at_30 = bench.schedule(30)
    for steps in (20, 30, 50):
        own = bench.schedule(steps)
        plans = {}
        for share in (0.65, 0.5, 0.4):
            plans[f"calibrated at 30, {share:.0%}"] = at_30(share=share)
            plans[f"calibrated at {steps}, {share:.0%}" if steps != 30 else f"again, {share:.0%}"] = own(share=share)
        bench.run(f"transfer-{steps}", plans, calls={"num_inference_steps": steps})


def guidance(bench: Bench) -> None:
    sections = {f"every {n}, {f}": GuidanceReuse(every=n, forecast=f) for n in (2, 3, 5) for f in ("hold", "frequency")}
    sections |= {f"every {n} from .2": GuidanceReuse(every=n, steps=(0.2, 1.0)) for n in (2, 3, 5)}
    sections |= {f"changes by {c:g}": GuidanceReuse(every=9, change=c, steps=(0.1, 1.0)) for c in (0.02, 0.05, 0.1)}
    sections |= {f"until {a:g}": GuidanceReuse(every=3, agree=a, steps=(0.2, 1.0)) for a in (0.99, 0.999)}
    sections["none from .8"] = GuidanceReuse(forecast="zero", steps=(0.8, 1.0))
    bench.run("guidance", {name: Plan(guidance=section) for name, section in sections.items()})


def modules(bench: Bench) -> None:
    smooth = bench.calibrated(StepCache.smoothcache(), "smooth", bench.steps)
    plans = {
        f"SmoothCache {t:g}": dataclasses.replace(smooth, caching=StepCache.smoothcache(t)) for t in (0.1, 0.2, 0.3)
    }
    plans |= {f"FORA {n}": Plan(caching=StepCache.fora(n)) for n in (2, 3)}
    plans |= {f"TaylorSeer {n}": Plan(caching=StepCache.taylorseer_full(n)) for n in (2, 3)}
    plans |= {f"TaylorSeer lite {n}": Plan(caching=StepCache.taylorseer(n)) for n in (2, 3)}
    plans |= {"PAB": Plan(caching=StepCache.pab()), "TeaCache signal": Plan(caching=StepCache.teacache())}
    bench.run("modules", plans)


def exact(bench: Bench) -> None:
    plans = {
        name: Plan(exact=ExactReuse(**{other: other in on for other in ("constants", "encoders", "trim")}))
        for name, on in {
            "constants": ("constants",),
            "trim": ("trim",),
            "all": ("constants", "encoders", "trim"),
        }.items()
    }
    bench.run("exact", plans)
    calls = {"max_sequence_length": 300}  # PixArt's own default; the text of the bundled pipeline is at most 32 long
    if bench.kind == "image":
        bench.run("exact-300", plans, calls=calls)


def tokens(bench: Bench) -> None:
    axes = ("space", "time") if bench.kind == "video" else ("space",)
    plans = {
        f"{ratio:.0%} along {axis}": Plan(tokens=[MergeTokens(ratio=ratio, axis=axis)])
        for axis in axes
        for ratio in (0.25, 0.5)
    }
    bench.run("tokens", plans)


PARTS = {f.__name__: f for f in (schedules, forecasts, transfer, guidance, modules, exact, tokens)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where results go, and a run goes on from")
    parser.add_argument("--model", choices=("image", "video", "both"), default="both")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--prompts", type=int, default=16, help="how many of the tuning prompts")
    parser.add_argument("--calibration", type=int, default=4, help="how many others to calibrate on")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for kind in ("image", "video") if options.model == "both" else (options.model,):
        bench = Bench(kind, options)
        for part in options.parts:
            PARTS[part](bench)


if __name__ == "__main__":
    main()

"""Does a plan that changes bit-width over the steps beat the best that does not, at the same average bits?

    python bench/bits_by_step.py --folder runs/bits                 # the table; goes on where it was cut off
    python bench/bits_by_step.py --model video --folder runs/bits-video --held-out 128
    python bench/bits_by_step.py --folder runs/try --tuning 4 --held-out 4 --bits 6 --ranges 4 --sensitivity 1

For each number of average bits (of a weight, over weights and steps) both kinds of plan are searched alike: the integer
program is solved with errors of all steps counting alike, as they show in the final latents, and in between, for plans
by step also with ranges half and a quarter as many; the plan of each kind whose pictures come nearest to the untouched
pipeline's on tuning prompts is kept, and both are measured on held-out ones. PSNR in dB on floats in [0, 1], mean with
its 95 % interval over prompts; the difference is paired.
"""

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

# The product that rounds activations, also where the machine would rather not: rows are about fidelity.
os.environ.setdefault("DIFFACCEL_KERNELS", "int8_linear=onednn;int4_linear=onednn")

import torch
from rich.progress import Progress

from diffaccel import Plan, Quantize
from diffaccel.eval.compare import compare
from diffaccel.eval.metrics.intervals import difference_interval, mean_interval
from diffaccel.pipelines.bundled import bundled
from diffaccel.pipelines.loading import load
from diffaccel.plan import in_steps
from diffaccel.quantization.allocation import Allocation, allocate
from diffaccel.quantization.sensitivities import Sensitivities, load_sensitivities, regroup
from diffaccel.quantization.sensitivity import measure

CANDIDATES = (Quantize(weights="int4", group=64), Quantize())
# Powers of how much a range shows in the end: 0 lets all steps count alike.
POWERS = (0.0, 0.5, 1.0)


def average_bits(allocation: Allocation, steps: int) -> float:
    """Of a weight, over the weights and the steps that really are in each range."""
    s = allocation.sensitivities
    widths = torch.tensor([c.form().scheme.bits for c in s.candidates], dtype=torch.float64)
    inside = [sum(in_steps(i / max(steps - 1, 1), part) for i in range(steps)) for part in s.ranges]
    share = torch.tensor(inside, dtype=torch.float64) / steps
    return float((widths[allocation.choice] * share * s.weights[:, None]).sum() / s.weights.sum())


def searched(found: Sensitivities, bits: float, *, constant: bool) -> dict[str, Allocation]:
    """By name, the plans to try; those that come out alike once."""
    total = len(found.ranges)
    ranges = [1] if constant else [n for n in (total, total // 2, total // 4) if n > 1 and total % n == 0]
    plans: dict[str, Allocation] = {}
    for count in ranges:
        for power in POWERS:
            weighted = replace(found, shows=found.shows**power)
            coarse = regroup(weighted, count)
            allocation = allocate(coarse, budget=bits, kind="bits")
            if all(allocation.sections != other.sections for other in plans.values()):
                plans[f"{bits:g} bits, {'constant' if constant else f'{count} ranges'}, power {power:g}"] = allocation
    return plans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("image", "video"), default="image")
    parser.add_argument("--bits", type=float, nargs="+", default=[5.0, 6.0])
    parser.add_argument("--ranges", type=int, help="of steps; divides their number (default: half of it)")
    parser.add_argument("--sensitivity", type=int, default=4, help="tuning prompts that sensitivities are measured on")
    parser.add_argument("--tuning", type=int, default=48, help="tuning prompts that plans are chosen on")
    parser.add_argument("--held-out", type=int, default=256, help="prompts of the table")
    parser.add_argument("--folder", type=Path, required=True, help="for everything found; an interrupted run goes on")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    wrapped, known = load(f"bundled:{options.model}"), bundled(f"bundled:{options.model}")
    steps, tuning = wrapped.defaults["num_inference_steps"], known.tuning_prompts()
    count = options.ranges or steps // 2
    if steps % count:
        sys.exit(f"--ranges {count} does not divide the {steps} steps, so that averages over both would differ")
    options.folder.mkdir(parents=True, exist_ok=True)
    found = sensitivities(wrapped, tuning[: options.sensitivity], count, options.folder / "sensitivities.safetensors")

    rows: dict[str, Allocation] = {}
    for bits in options.bits:
        for constant in (True, False):
            rows |= searched(found, bits, constant=constant)
    tried = tuning[options.sensitivity :][: options.tuning]
    chosen = run(wrapped, rows, tried, options.folder / "tuning")
    best = []
    for bits in options.bits:
        for constant in (True, False):
            names = searched(found, bits, constant=constant)
            best.append(max(names, key=lambda name: sum(chosen[name])))
    held = run(
        wrapped, {name: rows[name] for name in best}, known.prompts()[: options.held_out], options.folder / "held-out"
    )

    print(f"\n{len(tried)} tuning and {options.held_out} held-out prompts, {steps} steps")
    print("| plan | average bits | bytes | tuning PSNR | held-out PSNR | over constant |\n|---|---|---|---|---|---|")
    for constant, by_step in zip(best[::2], best[1::2], strict=True):
        for name in (constant, by_step):
            gain = difference_interval(held[name], held[constant]) if name == by_step else None
            words = "" if gain is None else f"{gain.value:+.2f} ({gain.low:+.2f} to {gain.high:+.2f})"
            bits, share = average_bits(rows[name], steps), rows[name].cost("bytes")
            mean = mean_interval(held[name])
            tuned = sum(chosen[name]) / len(chosen[name])
            psnr = f"{mean.value:.2f} ({mean.low:.2f} to {mean.high:.2f})"
            print(f"| {name} | {bits:.3f} | {share:.3f} | {tuned:.2f} | {psnr} | {words} |")
    for name in best[1::2]:
        print(f"\n{name}\n{rows[name]}")


def sensitivities(wrapped: object, prompts: list[str], ranges: int, file: Path) -> Sensitivities:
    """Measured, or what an earlier run measured."""
    if file.exists():
        return load_sensitivities(file)
    pipe = wrapped.pipe
    pipe.set_progress_bar_config(disable=True)
    requests = [
        {**wrapped.defaults, "prompt": p, "generator": torch.Generator().manual_seed(1000 + i)}
        for i, p in enumerate(prompts)
    ]
    with Progress() as progress:
        task = progress.add_task("sensitivities", total=None)
        found = measure(
            pipe,
            CANDIDATES,
            requests,
            ranges=ranges,
            advance=lambda what: progress.update(task, advance=1, description=what),
        )
    found.save(file)
    return found


def run(wrapped: object, rows: dict[str, Allocation], prompts: list[str], folder: Path) -> dict[str, list[float]]:
    """PSNR of every prompt's picture, by row."""
    plans = {name: Plan(quantization=tuple(allocation.sections)) for name, allocation in rows.items()}
    compare(wrapped, plans, prompts, controls=(), folder=folder, turn=len(prompts))
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return {name: [line["scores"]["psnr"] for line in lines if line["row"] == name] for name in plans}


if __name__ == "__main__":
    main()

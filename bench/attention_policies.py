"""What each policy of sparse attention is worth on a bundled pipeline, at several densities.

    python bench/attention_policies.py --prompts 8 --folder runs/attention       # the table; about an hour on two cores
    python bench/attention_policies.py --finalists 64 --folder runs/attention    # its best rows on more prompts
    python bench/attention_policies.py --prompts 1 --steps 4 --densities 0.3     # to try it out

Every row makes the clips of the same prompts and seeds; PSNR in dB on floats in [0, 1] against dense attention, with
its 95 % interval over prompts and the mean of the worst tenth. Beside it the signal-to-noise ratio of the denoiser's
output along the untouched trajectory, where nothing tips over: few prompts tell much there. Calibration uses the first
tuning prompts, the rows the last of them. A run that was cut off goes on where it stopped.
"""

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffaccel import BlockSparse, Plan, accelerate, calibrate
from diffaccel.attention.calibrate import sites_of
from diffaccel.attention.patterns import PatternMaker
from diffaccel.attention.profile import Profiler
from diffaccel.eval.compare import compare
from diffaccel.pipelines.bundled import bundled
from diffaccel.pipelines.loading import load
from diffaccel.plan import in_steps

AXES = ("fhw", "fwh", "hfw", "hwf", "wfh", "whf")
POLICIES: dict[str, dict[str, Any]] = {
    "window": dict(policy="window"),
    "arrow": dict(policy="arrow"),
    "online (Sparge-like)": dict(policy="online"),
    "online, Hilbert": dict(policy="online", reorder="hilbert"),
    "spatial-temporal (SVG-like)": dict(policy="spatial-temporal"),
    "mass, natural order": dict(policy="mass"),
    **{f"mass, {name}": dict(reorder=name) for name in (*AXES[1:], "hilbert", "morton")},
    "mass, best fixed order": dict(reorder="fixed"),
    "mass, order per head": dict(reorder=True),
    "mass, order per head, allocated by share": dict(reorder=True, allocate="share"),
    "mass, order per head, allocated by error": dict(reorder=True, allocate="error"),
    "influence, natural order": dict(policy="influence"),
    "influence, order per head": dict(policy="influence", reorder=True),
    "influence, order per head, allocated by error": dict(policy="influence", reorder=True, allocate="error"),
}
WARM_UPS = {"": (0.0, 1.0), ", dense warm-up": (0.2, 1.0)}


def sqnr(pipe: Any, plan: Plan, requests: list[dict[str, Any]]) -> float:
    """Mean over calls within the section's steps of the SQNR of the denoiser's output, dB, on the dense trajectory."""
    section = plan.attention[0]
    assert isinstance(section, BlockSparse)
    found: list[float] = []
    with accelerate(pipe, Plan()) as accel:
        context = accel._context
        for denoiser in context.denoisers:
            sites = sites_of(section, denoiser)
            profiler = Profiler(denoiser, sites, section, context)
            maker = PatternMaker([section], plan.artefacts, sites)

            def trial(call, output, again, profiler=profiler, maker=maker):
                if not in_steps(call.progress, section.steps):
                    return
                for site, patterns in profiler.sparse(section, maker, call).items():
                    profiler.put(site, patterns)
                moved = again()
                for site in range(len(profiler.sites)):
                    profiler.put(site, ())
                noise = sum(float((a - b).square().sum()) for a, b in zip(moved, output, strict=True))
                found.append(-10 * math.log10(max(noise / sum(float(x.square().sum()) for x in output), 1e-30)))

            profiler.trial = trial
        for request in requests:
            pipe(**request, output_type="latent")
    return sum(found) / len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:video")
    parser.add_argument("--prompts", type=int, default=8, help="of the tuning prompts, from the last one on")
    parser.add_argument("--finalists", type=int, help="only the rows that were best in --folder, on this many prompts")
    parser.add_argument("--calibration", type=int, default=4, help="prompts of the calibration")
    parser.add_argument("--sqnr-prompts", type=int, default=1, help="prompts of the denoiser's SQNR")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.3, 0.2])
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--warm-up", choices=("both", "with", "without"), default="both", help="dense first fifth")
    parser.add_argument("--rows", nargs="+", help="only policies whose name contains one of these")
    parser.add_argument("--no-clips", action="store_true", help="SQNR only")
    parser.add_argument("--steps", type=int, help="instead of the pipeline's own number")
    parser.add_argument("--size", type=int, help="side of the frames, instead of the pipeline's own")
    parser.add_argument("--frames", type=int, help="instead of the pipeline's own number")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--folder", type=Path, default=Path("runs/attention-policies"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    wrapped, known = load(options.model), bundled(options.model)
    changed = {
        "num_inference_steps": options.steps,
        "height": options.size,
        "width": options.size,
        "num_frames": options.frames,
    }
    wrapped.defaults = {**wrapped.defaults, **{n: v for n, v in changed.items() if v is not None}}
    pipe, prompts = wrapped.pipe, known.tuning_prompts()
    pipe.set_progress_bar_config(disable=True)
    options.folder.mkdir(parents=True, exist_ok=True)

    def requests(some: list[str]) -> list[dict[str, Any]]:
        return [
            {**wrapped.defaults, "prompt": p, "generator": torch.Generator().manual_seed(1000 + i)}
            for i, p in enumerate(some)
        ]

    store = options.folder / "rows.json"
    done: dict[str, dict[str, Any]] = json.loads(store.read_text()) if store.exists() else {}
    plans: dict[str, Plan] = {}
    ways = {n: s for n, s in WARM_UPS.items() if options.warm_up == "both" or bool(n) == (options.warm_up == "with")}
    for density in options.densities:
        for extra, steps in ways.items():
            for policy, settings in POLICIES.items():
                name = f"{policy}{extra}, {density:g}"
                if options.rows and not any(part in name for part in options.rows):
                    continue
                if options.finalists and name not in _best(done, options.densities):
                    continue
                section = BlockSparse(density=density, steps=steps, block_size=options.block_size, **settings)
                plans[name] = _plan(pipe, section, requests(prompts[: options.calibration]), options.folder, done, name)
                if "sqnr" not in done[name]:
                    done[name]["sqnr"] = sqnr(pipe, plans[name], requests(prompts[-options.sqnr_prompts :]))
                    store.write_text(json.dumps(done, indent=1))
                print(
                    f"{name}: SQNR {done[name]['sqnr']:.2f} dB, calibrated in {done[name]['seconds']:.0f} s", flush=True
                )
    if not options.no_clips:
        some = prompts[-(options.finalists or options.prompts) :]
        result = compare(
            wrapped, dict(plans), some, controls=(), measures=["adherence"], folder=options.folder / f"{len(some)}"
        )
        for name in plans:
            row = result.row(name)
            score, p = row.scores.get("adherence"), row.psnr
            assert p is not None
            done[name] |= {"psnr": [p.mean, p.low, p.high, p.worst_decile], "prompts": len(some)}
            if score and score.drop:
                done[name]["drop"] = [score.drop.value, score.drop_bound]
        store.write_text(json.dumps(done, indent=1))
    print("| policy, density | denoiser SQNR | PSNR | worst tenth | adherence lost |\n|---|---|---|---|---|")
    for name in plans:
        print(_line(name, done[name]))


def _plan(
    pipe: Any, section: BlockSparse, requests: list[dict[str, Any]], folder: Path, done: dict[str, Any], name: str
) -> Plan:
    """Calibrated, or read from an earlier run."""
    place = folder / "plans" / name.replace(" ", "_").replace(",", "")
    if name in done and (place / "plan.json").exists():
        return Plan.load(place)
    started, plan = time.perf_counter(), Plan(attention=section)
    if section.needs_calibration:
        plan = calibrate(pipe, plan, prompts=requests)
    plan = replace(plan, name=name)
    plan.save(place)
    done[name] = {"seconds": time.perf_counter() - started}
    return plan


def _best(done: dict[str, Any], densities: list[float], count: int = 3) -> set[str]:
    """The best rows at each density and way, by PSNR."""
    chosen: set[str] = set()
    for density in densities:
        for warm in (True, False):
            rows = [
                n for n, d in done.items() if n.endswith(f", {density:g}") and ("warm-up" in n) == warm and "psnr" in d
            ]
            chosen |= set(sorted(rows, key=lambda n: -done[n]["psnr"][0])[:count])
    return chosen


def _line(name: str, row: dict[str, Any]) -> str:
    psnr = "{:.2f} ({:.2f} to {:.2f}) | {:.2f}".format(*row["psnr"]) if "psnr" in row else " | "
    drop = "{:+.3f} (at most {:+.3f})".format(*row["drop"]) if "drop" in row else ""
    return f"| {name} | {row['sqnr']:.2f} | {psnr} | {drop} |"


if __name__ == "__main__":
    main()

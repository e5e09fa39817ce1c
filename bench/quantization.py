"""What each part of quantization is worth on a bundled pipeline: schemes, conditioning, allocation, each row by itself.

    python bench/quantization.py --folder runs/q --prompts 8              # image pipeline, about 30 minutes on one core
    python bench/quantization.py --folder runs/q --prompts 256            # the table; goes on where it was cut off
    python bench/quantization.py --folder runs/v --model video --prompts 128
    python bench/quantization.py --folder runs/w8 --rows W8A8 --prompts 16   # only rows whose name contains a word
    python bench/quantization.py --folder runs/small --rows "W4A8 mixed" --prompts 256 --plans runs/small/plans

Every row makes the pictures of the same held-out prompts and seeds; PSNR in dB on floats in [0, 1] against the
untouched pipeline, with its 95 % interval over prompts and the mean of the worst tenth. Beside it, the signal-to-noise
ratio of the denoiser's output when it is asked again what the untouched pipeline asked on tuning prompts (no trajectory
tips over, so that a few calls tell more than many pictures), and the bytes of the denoiser's weights as a share of
what they are in float32. "Naive" and "simulated" rows round tensors and put them back as floats: they have fidelity,
but neither the bytes nor the speed. Calibration and sensitivities use tuning prompts. In the second table the orderings
that papers found, as paired differences.
"""

import argparse
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

# The products that round activations, also where the machine would rather not: rows are about fidelity.
os.environ.setdefault("DIFFACCEL_KERNELS", "int8_linear=onednn;int8_static_linear=onednn;int4_linear=onednn")

import torch
from quantization_rows import (
    LEARNT,
    RANK,
    W4,
    allocations,
    calibrated_sections,
    candidates,
    orderings,
    plan_rows,
    simulated_rows,
)
from rich.progress import Progress

from diffaccel import Plan, accelerate, calibrate, learn_rounding
from diffaccel.denoiser import find_denoisers
from diffaccel.eval.compare import compare
from diffaccel.eval.metrics.intervals import difference_interval
from diffaccel.eval.result import Row
from diffaccel.pipelines.bundled import bundled
from diffaccel.pipelines.loading import load
from diffaccel.quantization.heatmap import draw
from diffaccel.quantization.replay import Recorded, Recorder, at_work, errors
from diffaccel.quantization.sensitivities import Sensitivities, load_sensitivities
from diffaccel.quantization.sensitivity import measure


def sqnr(pipe: object, how: Plan | Callable, calls: list[Recorded]) -> tuple[float, float | None]:
    """Mean over calls of the SQNR of the denoiser's output in dB, and the share of the bytes that the weights take."""
    if isinstance(how, Plan):
        with accelerate(pipe, how) as accel:
            found = list(errors(calls, accel._context))
            facts = accel.report().techniques[0].facts
        whole = sum(p.numel() * 4 for d in find_denoisers(pipe) for p in d.module.parameters())
        share = 1 - (facts["bytes_before"] - facts["bytes_after"]) / whole
    else:
        with at_work(pipe) as context, how(pipe):
            found, share = list(errors(calls, context)), None
    return sum(-10 * math.log10(max(e.output, 1e-30)) for e in found) / len(found), share


def line(row: Row, decibels: float, share: float | None) -> str:
    p = row.psnr
    assert p is not None
    score = row.scores.get("adherence")
    drop = f"{score.drop.value:+.3f} (at most {score.drop_bound:+.3f})" if score and score.drop else ""
    size = "simulated" if share is None else f"{share:.3f}"
    spread = f"{p.mean:.2f} ({p.low:.2f} to {p.high:.2f})"
    return f"| {row.name} | {size} | {decibels:.2f} | {spread} | {p.worst_decile:.2f} | {drop} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("image", "video"), default="image")
    parser.add_argument("--folder", type=Path, required=True, help="for everything found; an interrupted run goes on")
    parser.add_argument("--prompts", type=int, default=8, help="held-out ones, of the pictures")
    parser.add_argument("--calibration", type=int, default=8, help="tuning prompts of the calibration")
    parser.add_argument("--sensitivity", type=int, default=2, help="tuning prompts of the sensitivities")
    parser.add_argument("--iterations", type=int, default=300, help="of learnt rounding, for every block")
    parser.add_argument("--bits", type=float, default=6, help="average of the allocations by bits")
    parser.add_argument("--rows", nargs="+", help="only rows whose name contains one of these")
    parser.add_argument("--measures", nargs="*", default=["adherence"], help="beside PSNR and SSIM")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plans", type=Path, help="a folder for the plans of the rows")
    parser.add_argument("--map", help="a picture of the allocation by step")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    wrapped, known = load(f"bundled:{options.model}"), bundled(f"bundled:{options.model}")
    pipe = wrapped.pipe
    pipe.set_progress_bar_config(disable=True)

    def requests(count: int) -> list[dict]:
        """Anew each time: generators run on, and what is resumed must find them as they were."""
        return [
            {**wrapped.defaults, "prompt": prompt, "generator": torch.Generator().manual_seed(1000 + i)}
            for i, prompt in enumerate(known.tuning_prompts()[:count])
        ]

    def wanted(name: str) -> bool:
        return not options.rows or any(part in name for part in options.rows)

    with at_work(pipe) as context:
        recorder = Recorder(context, lambda call: call.step % 3 == 0)
        for request in requests(2):
            pipe(**request, output_type="latent")
        recorder.remove()
    sections = calibrated_sections()
    calibrated = calibrate(
        pipe, Plan(quantization=sections), prompts=requests(options.calibration), folder=options.folder
    )
    rows: dict[str, Plan | Callable] = {**simulated_rows(calibrated.artefacts), **plan_rows(calibrated)}
    if wanted(LEARNT):
        learnt = replace(calibrated, quantization=(replace(W4, rounding="learnt"),))
        rows[LEARNT] = learn_rounding(
            pipe, learnt, prompts=requests(options.calibration), iterations=options.iterations, folder=options.folder
        )
    notes: dict[str, str] = {}
    if wanted("mixed") or any("mixed" in part for part in options.rows or ()):
        found = sensitivities(pipe, requests(options.sensitivity), calibrated, options.folder)
        share = stored_share(pipe, rows[f"W4 groups + rank {RANK}"])
        for name, allocation in allocations(found, pipe, share, options.bits).items():
            rows[name] = replace(calibrated, quantization=tuple(allocation.sections))
            notes[name] = str(allocation)
            if options.map and name.endswith("by step"):
                draw(allocation, options.map)
    rows = {name: how for name, how in rows.items() if wanted(name)}
    if options.plans:
        for name, how in rows.items():
            if isinstance(how, Plan):
                how.save(options.plans / name.replace(" ", "_"))
    prompts, pictures = known.prompts()[: options.prompts], options.folder / "pictures"
    result = compare(
        wrapped, rows, prompts, controls=(), measures=options.measures, folder=pictures, turn=options.prompts
    )
    exact = {name: sqnr(pipe, how, recorder.calls) for name, how in rows.items()}
    print(f"{len(prompts)} held-out prompts, bundled:{options.model}\n")
    print("| | bytes | denoiser SQNR | PSNR | worst tenth | adherence lost |\n|---|---|---|---|---|---|")
    for name, (decibels, share) in exact.items():
        print(line(result.row(name), decibels, share))
    scores = read_scores(pictures)
    print("\n| better | than | PSNR over it | adherence over it |\n|---|---|---|---|")
    for better, worse in orderings(options.bits):
        if better in rows and worse in rows:
            print(f"| {better} | {worse} | {' | '.join(paired(scores, better, worse))} |")
    body = {"result": result.to_dict(), "sqnr_and_bytes": exact, "allocations": notes}
    (options.folder / "table.json").write_text(json.dumps(body, indent=1, default=str))


def sensitivities(pipe: object, requests: list[dict], calibrated: Plan, folder: Path) -> Sensitivities:
    """Measured, or what an earlier run measured."""
    file = folder / "sensitivities.safetensors"
    if not file.exists():
        ranges = next(n for n in (4, 5, 3, 2, 1) if requests[0]["num_inference_steps"] % n == 0)
        with Progress() as progress:
            task = progress.add_task("sensitivities", total=None)
            measure(
                pipe,
                candidates(),
                requests,
                sites=candidates()[0].sites,
                ranges=ranges,
                artefacts=calibrated.artefacts,
                advance=lambda what: progress.update(task, advance=1, description=what),
            ).save(file)
    return load_sensitivities(file)


def stored_share(pipe: object, plan: Plan) -> float:
    """Bytes of the quantized weights over what they were."""
    with accelerate(pipe, plan) as accel:
        facts = accel.report().techniques[0].facts
    return facts["bytes_after"] / facts["bytes_before"]


def read_scores(folder: Path) -> dict[str, dict[str, list[float]]]:
    """By row and measure, of every sample."""
    found: dict[str, dict[str, list[float]]] = {}
    for record in map(json.loads, (folder / "samples.jsonl").read_text().splitlines()):
        for measure_, value in (record["scores"] or {}).items():
            found.setdefault(record["row"], {}).setdefault(measure_, []).append(value)
    return found


def paired(scores: dict[str, dict[str, list[float]]], better: str, worse: str) -> list[str]:
    """Differences with their intervals."""
    words = []
    for name, digits in (("psnr", 2), ("adherence", 3)):
        if name not in scores[better]:
            words.append("")
            continue
        gain = difference_interval(scores[better][name], scores[worse][name])
        words.append(f"{gain.value:+.{digits}f} ({gain.low:+.{digits}f} to {gain.high:+.{digits}f})")
    return words


if __name__ == "__main__":
    main()

"""What each part of quantization is worth on a bundled pipeline: schemes, conditioning, allocation, each row by itself.

    python bench/quantization.py --prompts 8                     # image pipeline, about 20 minutes on one core
    python bench/quantization.py --prompts 256 --folder runs/q   # the table; goes on where it was cut off
    python bench/quantization.py --rows W8A8 --prompts 16        # only rows whose name contains a word

Every row makes the pictures of the same prompts and seeds; PSNR in dB on floats in [0, 1] against the untouched
pipeline, with its 95 % interval over prompts and the mean of the worst tenth. Beside it, the signal-to-noise ratio of
the denoiser's output when it is asked again what the untouched pipeline asked (no trajectory tips over, so that a few
calls tell more than many pictures). "Naive" rows round tensors and put them back as floats: they have fidelity, but
neither the bytes nor the speed. Calibration and sensitivities use the tuning prompts, the pictures the last of them.
"""

import argparse
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

# The product that rounds activations, also where the machine would rather not: rows are about fidelity.
os.environ.setdefault("DIFFACCEL_KERNELS", "int8_linear=onednn;int4_linear=onednn")

import torch
from torch import Tensor, nn

from diffaccel import Plan, Quantize, accelerate, calibrate
from diffaccel.denoiser import find_denoisers, select
from diffaccel.eval.compare import compare
from diffaccel.eval.result import Row
from diffaccel.pipelines.bundled import bundled
from diffaccel.pipelines.loading import load
from diffaccel.quantization.allocation import Allocation, allocate, allocate_in_groups, closed_form
from diffaccel.quantization.eligible import keeps_activations
from diffaccel.quantization.heatmap import draw
from diffaccel.quantization.replay import Recorded, Recorder, at_work, errors
from diffaccel.quantization.sensitivities import Sensitivities
from diffaccel.quantization.sensitivity import measure

W4 = Quantize(weights="int4", activations="float", group=64)
W8A8, W4A8 = Quantize(), Quantize(weights="int4", group=64)
RANK = 16
AVERAGE_BITS = 6


def rounded(x: Tensor, levels: int, dims: tuple[int, ...]) -> Tensor:
    """``x`` on a grid of 2 * levels + 1 values between its extremes over ``dims``."""
    scale = x.abs().amax(dims, keepdim=True).clamp(min=1e-30) / levels
    return (x / scale).round() * scale


@contextmanager
def naive(pipe: object, levels: int, *, per_channel: bool = False, activations: bool = False) -> Iterator[None]:
    """Rounded weights (and activations, one scale for the tensor) in the linears that `Quantize` means by default."""
    sites = select(find_denoisers(pipe), Quantize.sites, "layers")
    sites = [s for s in sites if isinstance(s.module, nn.Linear)]
    originals = [s.module.weight.data for s in sites]
    hooks = []
    for site in sites:
        weight = site.module.weight
        weight.data = rounded(weight.data, levels, (1,) if per_channel else (0, 1))
        if activations and not keeps_activations(W8A8, site):
            hooks.append(site.module.register_forward_pre_hook(lambda m, x: (rounded(x[0], 127, (0, 1, 2)),)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for site, original in zip(sites, originals, strict=True):
            site.module.weight.data = original


def naive_rows() -> dict[str, Callable]:
    return {
        "W4 per tensor, naive": lambda pipe: naive(pipe, 7),
        "W4 per channel, naive": lambda pipe: naive(pipe, 7, per_channel=True),
        "W8A8 per tensor, naive": lambda pipe: naive(pipe, 127, activations=True),
    }


def plan_rows(calibrated: Plan) -> dict[str, Plan]:
    def plan(section: Quantize, **settings: object) -> Plan:
        section = replace(section, **settings)
        return replace(calibrated, quantization=(section,))

    return {
        "W4 per channel": Plan(quantization=replace(W4, group=None)),
        "W4 groups": Plan(quantization=W4),
        "W4 groups, calibrated": plan(W4),
        "W4 groups + balance": plan(W4, balance=0.5),
        "W4 groups + rotation": plan(W4, rotate=True),
        "W4 groups + balance + rotation": plan(W4, balance=0.5, rotate=True),
        "W4 groups + rotation + balance": plan(W4, balance=0.5, rotate=True, first="rotate"),
        f"W4 groups + rank {RANK}": plan(W4, low_rank=RANK),
        f"W4 groups + rank {RANK}, refined": plan(W4, low_rank=RANK, refine=5),
        f"W4 groups + rotation + rank {RANK}, refined": plan(W4, low_rank=RANK, refine=5, rotate=True),
        "W4A8 groups": plan(W4A8),
        "W8A8": Plan(quantization=W8A8),
        "W8A8 + balance": plan(W8A8, balance=0.5),
        "W8A8 + rotation": Plan(quantization=replace(W8A8, rotate=True)),
        "W8A8 + balance + rotation": plan(W8A8, balance=0.5, rotate=True),
        "W8A16": Plan(quantization=replace(W8A8, activations="float")),
    }


def allocations(found: Sensitivities, share: float) -> dict[str, Allocation]:
    """``share`` of the bytes, and `AVERAGE_BITS`, in several ways."""
    bits = AVERAGE_BITS
    rows = {
        f"mixed, {share:.3f} of the bytes": allocate(found, budget=share),
        f"mixed, {bits} bits, constant": allocate(found, budget=bits, kind="bits", constant=True),
        f"mixed, {bits} bits, by step": allocate(found, budget=bits, kind="bits"),
        f"mixed, {bits} bits, closed form": closed_form(found, bits=bits),
    }
    if not found.text.isnan().all():
        for ratio in (0.8, 1.0, 1.2):
            rows[f"mixed, {bits} bits, text apart {ratio:g}"] = allocate_in_groups(found, bits=bits, ratio=ratio)
    return rows


def sqnr(pipe: object, how: Plan | Callable, calls: list[Recorded]) -> tuple[float, float | None]:
    """Mean over calls of the SQNR of the denoiser's output in dB, and the share of the bytes that the weights take."""
    if isinstance(how, Plan):
        with accelerate(pipe, how) as accel:
            found = list(errors(calls, accel._context))
            facts = accel.report().techniques[0].facts
            share = facts["bytes_after"] / facts["bytes_before"]
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
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--calibration", type=int, default=8, help="prompts of the calibration")
    parser.add_argument("--sensitivity", type=int, default=2, help="prompts of the sensitivities")
    parser.add_argument("--rows", nargs="+", help="only rows whose name contains one of these")
    parser.add_argument("--measures", nargs="*", default=["adherence"], help="beside PSNR and SSIM")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", help="where the pictures' results go, and an interrupted run goes on from")
    parser.add_argument("--out", help="a JSON file for everything")
    parser.add_argument("--map", help="a picture of the allocation by step")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    wrapped, known = load(f"bundled:{options.model}"), bundled(f"bundled:{options.model}")
    pipe, prompts = wrapped.pipe, known.tuning_prompts()
    pipe.set_progress_bar_config(disable=True)

    def requests(count: int) -> list[dict]:
        return [
            {**wrapped.defaults, "prompt": p, "generator": torch.Generator().manual_seed(1000 + i)}
            for i, p in enumerate(prompts[:count])
        ]

    def wanted(name: str) -> bool:
        return not options.rows or any(part in name for part in options.rows)

    with at_work(pipe) as context:
        recorder = Recorder(context, lambda call: call.step % 3 == 0)
        for request in requests(2):
            pipe(**request, output_type="latent")
        recorder.remove()
    both = [replace(W8A8, balance=0.5), replace(W8A8, balance=0.5, rotate=True, first="rotate")]
    calibrated = calibrate(pipe, Plan(quantization=both), prompts=requests(options.calibration))
    rows: dict[str, Plan | Callable] = {**naive_rows(), **plan_rows(calibrated)}
    notes: dict[str, str] = {}
    if not options.rows or wanted("mixed"):
        found = measure(pipe, [W4A8, W8A8], requests(options.sensitivity), artefacts=calibrated.artefacts)
        _, share = sqnr(pipe, rows[f"W4 groups + rank {RANK}"], recorder.calls[:1])
        assert share is not None
        for name, allocation in allocations(found, share).items():
            rows[name] = replace(calibrated, quantization=tuple(allocation.sections))
            notes[name] = str(allocation)
            if options.map and name.endswith("by step"):
                draw(allocation, options.map)
    rows = {name: how for name, how in rows.items() if wanted(name)}
    result = compare(
        wrapped,
        rows,
        prompts[-options.prompts :],
        controls=(),
        measures=options.measures,
        folder=options.folder,
        turn=options.prompts,
    )
    exact = {name: sqnr(pipe, how, recorder.calls) for name, how in rows.items()}
    print("| | bytes | denoiser SQNR | PSNR | worst tenth | adherence lost |\n|---|---|---|---|---|---|")
    for name, (decibels, share) in exact.items():
        print(line(result.row(name), decibels, share))
    if options.out:
        body = {"result": result.to_dict(), "sqnr_and_bytes": exact, "allocations": notes}
        with open(options.out, "w") as file:
            json.dump(body, file, indent=1, default=str)


if __name__ == "__main__":
    main()

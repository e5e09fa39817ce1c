"""``diffaccel eval``: one plan on many prompts: how much faster, how close, how good, and is it enough."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from diffaccel.cli.arguments import (
    Against,
    Details,
    Device,
    Dtype,
    Json,
    Lossless,
    Measures,
    Model,
    NoiseFloor,
    call_arguments,
    chosen_prompts,
    read_plan,
)
from diffaccel.cli.console import err, note, out, print_json, quiet_libraries
from diffaccel.errors import InputError

EXAMPLES = """
[bold]Examples[/]

diffaccel eval --plan balanced

diffaccel eval -m bundled:video --plan fast --measure adherence -n 64 --seeds 2 -o out/eval-video

diffaccel eval --plan fast --noise-floor --details

accelerate launch --num_processes 4 -m diffaccel.cli eval -m ./my-pipeline --plan fast -n 1000

diffaccel eval -m ./my-pipeline --prompts captions_val2014.json -n 500 --plan plans/mine --require "psnr>=36"

diffaccel eval --plan fast -n 200 --measure fid --measure cmmd --require "fid<=5"

diffaccel eval -m ./my-pipeline --prompts captions.txt -n 5000 --measure fid=inception:weights.pth --against val2014/
"""


def evaluate(
    model: Model = "bundled:image",
    plan: Annotated[str, typer.Option(help="Preset, or folder of a saved plan.")] = "balanced",
    prompts: Annotated[
        Path | None,
        typer.Option(help="Lines of text, JSON, JSONL, CSV or TSV; COCO, PartiPrompts, DrawBench, MJHQ, VBench as is."),
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many of the prompts.")] = 32,
    seeds: Annotated[int, typer.Option(min=1, help="Each prompt runs with the seeds 0, 1, ...")] = 1,
    measure: Measures = None,
    against: Against = None,
    require: Annotated[
        str | None, typer.Option(help='Exit with 1 unless met with 95 % confidence: "psnr>=36 & adherence_drop<=0.03".')
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    size: Annotated[str | None, typer.Option(help="One side, or WIDTHxHEIGHT.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video.")] = None,
    noise_floor: NoiseFloor = False,
    flops: Annotated[
        bool, typer.Option(help="Count the operations of each row, in one more call of the first item.")
    ] = True,
    output: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the run; one that was interrupted goes on there.")
    ] = Path("out/eval"),
    device: Device = None,
    dtype: Dtype = None,
    lossless: Lossless = False,
    details: Details = False,
    as_json: Json = False,
) -> None:
    """Run a pipeline with a plan and without on many prompts; report speed, memory, fidelity and quality.

    Every number has its 95 % interval over prompts. With --require the exit code is 1 where one cannot be shown to
    hold: too few prompts do not prove anything.
    """
    texts = chosen_prompts(model, prompts, count)
    chosen = read_plan(plan)
    if chosen is None:
        raise InputError("--plan none is the reference, which every run has")
    calls = call_arguments(steps, size, frames)
    quiet_libraries()
    from diffaccel.eval.compare import compare
    from diffaccel.eval.gate import judge, parse_requirements
    from diffaccel.eval.page import write_page
    from diffaccel.eval.processes import Processes
    from diffaccel.pipelines.loading import load

    required = parse_requirements(require, measure or (), against=against is not None) if require is not None else []
    started = time.perf_counter()
    wrapped = load(model, device=device, dtype=dtype)
    loaded = time.perf_counter() - started
    result = compare(
        wrapped,
        {"plan": chosen},
        texts,
        range(seeds),
        calls,
        controls=(),
        measures=measure or (),
        against=against,
        noise_floor=noise_floor,
        flops=flops,
        lossless=lossless,
        load_seconds=loaded,
        folder=output,
        progress=err.is_terminal,
    )
    if not Processes.here().first:
        return
    result.save(output / "result.json")
    verdicts = [judge(r, result.row("plan"), result.row("reference")) for r in required]
    if as_json:
        requirements = [{"requirement": str(v.requirement), "holds": v.holds, "text": str(v)} for v in verdicts]
        print_json({**result.to_dict(), "requirements": requirements})
    else:
        out.print(result)
        if details:
            out.print(result.costs())
        for verdict in verdicts:
            out.print(str(verdict), style="green" if verdict.holds else "bold red", highlight=False)
    note(f"wrote {write_page(result, output / 'report.html')} and result.json; every sample is in {output / 'outputs'}")
    if not all(verdict.holds for verdict in verdicts):
        raise typer.Exit(1)

"""``diffaccel tune``: the fastest plan within a budget, found by measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffaccel.cli.arguments import Device, Dtype, Json, Model, call_arguments, chosen_prompts
from diffaccel.cli.console import err, note, out, print_json, quiet_libraries
from diffaccel.tuning.budget import Budget

EXAMPLES = """
[bold]Examples[/]

diffaccel tune --psnr 36

diffaccel tune -m bundled:video --psnr 40 --psnr-worst 30 --minutes 10 -o plans/video

diffaccel tune --psnr 34 --adherence-drop 0.03 -n 32

diffaccel tune --memory 0.3

diffaccel tune --speedup 2

diffaccel tune -m ./my-pipeline --prompts prompts.txt --steps 30 --perceptual 0.1 -o plans/mine

diffaccel tune --check plans/video -m bundled:video --steps 30

diffaccel generate -m bundled:video --plan plans/video --prompt "a red circle moving left"
"""


def tune(
    model: Model = "bundled:image",
    psnr: Annotated[float | None, typer.Option(help="Least mean PSNR against the original output, dB.")] = None,
    psnr_worst: Annotated[float | None, typer.Option(help="Least PSNR of the worst tenth, dB.")] = None,
    ssim: Annotated[float | None, typer.Option(help="Least mean SSIM.")] = None,
    perceptual: Annotated[float | None, typer.Option(help="Most mean perceptual distance (LPIPS).")] = None,
    clip_drop: Annotated[float | None, typer.Option(help="Most that the CLIP score may fall.")] = None,
    adherence_drop: Annotated[
        float | None, typer.Option(help="Most that the share of right samples may fall (bundled pipelines).")
    ] = None,
    memory: Annotated[float | None, typer.Option(help="Most bytes of weights, as a share of the original's.")] = None,
    speedup: Annotated[float | None, typer.Option(help="Least speed-up of the denoising loop.")] = None,
    measure: Annotated[
        list[str] | None, typer.Option(help="How a measure above is computed: clip=ViT-B-32:openai, lpips=vgg.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts, one per line or JSON; not those you will report on.")
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many of the prompts.")] = 24,
    seeds: Annotated[int, typer.Option(min=1, help="Each prompt runs with the seeds 0, 1, ...")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    size: Annotated[str | None, typer.Option(help="One side, or WIDTHxHEIGHT.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Time for trials; then the best so far. Default: until nothing is better.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the split of the prompts.")] = 0,
    check: Annotated[
        Path | None,
        typer.Option(help="Only measure whether the tuned plan there keeps its budget here; exit code 1 if not."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the result; a tuning that was interrupted goes on there.")
    ] = Path("out/tune"),
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Find the fastest plan that surely keeps to a budget, over all techniques at once, by trying on this machine.

    Half of the prompts choose the plan, the other half confirm it. The folder then holds the plan, a frontier of others
    (`Plan.load(folder, at="psnr>=38")`), every trial, and report.html.
    """
    limits = {
        "psnr": psnr,
        "psnr_worst": psnr_worst,
        "ssim": ssim,
        "perceptual": perceptual,
        "clip_drop": clip_drop,
        "adherence_drop": adherence_drop,
        "memory": memory,
        "speedup": speedup,
    }
    given = {name: value for name, value in limits.items() if value is not None}
    if check is None and not given:
        given = {"psnr": 36.0}
        note("no budget given: --psnr 36")
    budget = Budget(**given, measures=tuple(measure or ())) if given else None
    texts = chosen_prompts(model, prompts, count, tuning=True)
    calls = call_arguments(steps, size, frames)
    quiet_libraries()
    from diffaccel.pipelines.loading import load
    from diffaccel.tuning import tune as tuning

    wrapped = load(model, device=device, dtype=dtype)
    if check is not None:
        holds, told = tuning.check(wrapped, check, texts, calls=calls, seeds=range(seeds))
        if as_json:
            print_json({"holds": holds, "text": told})
        else:
            out.print(told, style="green" if holds else "bold red", highlight=False)
        if not holds:
            raise typer.Exit(1)
        return
    assert budget is not None
    found = tuning.run(
        wrapped,
        texts,
        budget,
        calls=calls,
        seeds=tuple(range(seeds)),
        minutes=minutes,
        folder=output,
        seed=seed,
        progress=err.is_terminal,
    )
    if as_json:
        print_json(found.to_dict())
    else:
        out.print(found)
    note(f"wrote {output / 'report.html'}; use it as --plan {output if '/' in str(output) else f'./{output}'}")
    if found.best is None:
        raise typer.Exit(1)

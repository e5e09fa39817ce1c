"""``diffaccel prune``: a smaller denoiser, decided by measurement, as a plan and as a pipeline folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffaccel.cli.arguments import Device, Dtype, Json, Model, call_arguments, chosen_prompts
from diffaccel.cli.console import note, out, print_json, quiet_libraries
from diffaccel.pruning.section import Pruning

EXAMPLES = """
[bold]Examples[/]

diffaccel prune --ratio 0.2 --method taylor -o out/pruned

diffaccel prune --ratio 0.2 --method ecodiff --updates 60 -n 32 -o out/pruned

diffaccel prune --units block --method hierarchy --ratio 0.22 --protect 0.25 -o out/shallow

diffaccel prune -m ./my-pipeline --prompts prompts.txt --ratio 0.3 --budget latency --units "heads neurons sublayer"

diffaccel generate --plan out/pruned/plan --prompt "a red circle" --out circle.png

diffaccel distill --student out/pruned --teacher bundled:image --steps 1000 -o out/healed
"""


def prune(
    model: Model = "bundled:image",
    ratio: Annotated[float, typer.Option(help="Share of the budget that is to go.")] = 0.2,
    method: Annotated[
        str, typer.Option(help="ecodiff, hierarchy, evolution, taylor, activation, magnitude or random.")
    ] = "ecodiff",
    units: Annotated[
        str, typer.Option(help="What may be cut, of: heads neurons sublayer resnet block.")
    ] = "heads neurons",
    budget: Annotated[
        str, typer.Option(help="What --ratio is a share of: parameters, flops or latency.")
    ] = "parameters",
    scope: Annotated[
        str, typer.Option(help="global compares all layers; layer takes the same share of each.")
    ] = "global",
    multiple: Annotated[int, typer.Option(min=1, help="Kept neurons are multiples of this.")] = 8,
    protect: Annotated[float, typer.Option(help="Share of the blocks, from the first, that is not touched.")] = 0.0,
    updates: Annotated[int, typer.Option(min=1, help="EcoDiff: how often the masks are changed.")] = 100,
    accumulate: Annotated[int, typer.Option(min=1, help="EcoDiff: trajectories for each change.")] = 4,
    prompts: Annotated[Path | None, typer.Option(help="Prompts to try units on; one per line or JSON.")] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many of the prompts.")] = 16,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    size: Annotated[str | None, typer.Option(help="One side, or WIDTHxHEIGHT.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of random, evolution and EcoDiff's noise.")] = 0,
    output: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the result; EcoDiff goes on there if it was interrupted.")
    ] = Path("out/pruned"),
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Remove what a denoiser can do without, and save the smaller pipeline and the plan that makes it.

    The folder is a diffusers pipeline (import diffaccel before from_pretrained; blocks alone need not even that), and
    FOLDER/plan a plan that --plan takes on the original. Heal it with diffaccel distill.
    """
    section = Pruning(
        ratio=ratio,
        method=method,
        units=units,
        budget=budget,
        scope=scope,
        multiple=multiple,
        protect=protect,
        seed=seed,
    )
    texts = chosen_prompts(model, prompts, count, tuning=True)
    calls = call_arguments(steps, size, frames)
    quiet_libraries()
    from diffaccel.attach import accelerate
    from diffaccel.pipelines.loading import load, save
    from diffaccel.pruning.ecodiff import EcoDiff
    from diffaccel.pruning.prune import prune as run

    wrapped = load(model, device=device, dtype=dtype)
    plan = run(
        wrapped.pipe,
        section,
        prompts=texts,
        folder=output / "masks",
        settings=EcoDiff(updates=updates, accumulate=accumulate, seed=seed),
        notify=note,
        **{**wrapped.defaults, **calls},
    )
    plan.save(output / "plan")
    accel = accelerate(wrapped.pipe, plan, originals="device")
    report = accel.report()
    accel.bake()
    save(wrapped, output)
    if as_json:
        print_json(report.to_dict())
    else:
        out.print(str(report), highlight=False)
    note(f"wrote {output}; heal it by: diffaccel distill --student {output} --teacher {model}")

"""``diffaccel compare``: what plans gain and cost, beside fewer steps at the same cost."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

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

diffaccel compare

diffaccel compare -m bundled:video --plan balanced --plan fast -n 16 -o out/compare

diffaccel compare --plan fast --peer first-block-cache=0.12 --peer cache-dit --peer torch-compile

diffaccel compare --peer torchao-int8+cache-dit=0.12 --peer "command:openvino=/opt/ov/bin/python openvino_peer.py"

diffaccel compare --plan balanced --plan fast -n 160 --measure clip --measure fid

diffaccel compare --plan fast --noise-floor --flops --details

diffaccel compare -m ./my-pipeline --prompts prompts.txt --plan plans/mine --steps 30 --json > result.json
"""


def compare(
    model: Model = "bundled:image",
    plan: Annotated[
        list[str] | None, typer.Option(help="Preset or saved plan's folder; several: one row each.")
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            help="Acceleration of others beside: first-block-cache=0.08, cache-dit, torchao-int8+mag-cache=0.1 (both "
            "of them), all, or command:NAME=PROGRAM (one of its own, docs/evaluation.md). Several times."
        ),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="File with one prompt per line, or a JSON list.")] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many of the prompts.")] = 8,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="Each prompt runs with each seed; default 0.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    size: Annotated[str | None, typer.Option(help="One side, or WIDTHxHEIGHT.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video.")] = None,
    measure: Measures = None,
    against: Against = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often every item is timed.")] = 1,
    noise_floor: NoiseFloor = False,
    flops: Annotated[
        bool, typer.Option("--flops", help="Count the operations of each row, in one more call of the first item.")
    ] = False,
    output: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the comparison; a run that was interrupted goes on there.")
    ] = Path("out/compare"),
    device: Device = None,
    dtype: Dtype = None,
    lossless: Lossless = False,
    details: Details = False,
    as_json: Json = False,
) -> None:
    """Run a pipeline with and without plans; print a table and draw pictures.

    Every plan stands beside its control: the same pipeline with as many steps as cost the same time. Fidelity is
    measured against the unaccelerated output of the same prompt and seed.
    """
    texts = chosen_prompts(model, prompts, count)
    calls = call_arguments(steps, size, frames)
    chosen: dict[str, Any] = {}
    for text in plan or ["balanced"]:
        one = read_plan(text)
        if one is None:
            raise InputError("--plan none is the reference, which every comparison has")
        name = text if isinstance(one, str) else one.name or Path(text).name or text
        chosen[name if name not in chosen else text] = one
    quiet_libraries()
    from diffaccel.eval.compare import compare as run
    from diffaccel.eval.figures import contact_sheet, side_by_side, speed_against_fidelity
    from diffaccel.eval.page import write_page
    from diffaccel.eval.processes import Processes
    from diffaccel.eval.store import slug
    from diffaccel.pipelines.loading import load

    started = time.perf_counter()
    wrapped = load(model, device=device, dtype=dtype)
    loaded = time.perf_counter() - started
    result = run(
        wrapped,
        chosen,
        texts,
        seed or [0],
        calls,
        repeats=repeats,
        measures=measure or (),
        against=against,
        noise_floor=noise_floor,
        flops=flops,
        lossless=lossless,
        load_seconds=loaded,
        peers=peer or (),
        folder=output,
        progress=err.is_terminal,
    )
    if not Processes.here().first:
        return
    result.save(output / "result.json")
    pictures = [side_by_side(result, name, output / f"{slug(name)}.png") for name in chosen]
    pictures += [contact_sheet(result, output / "contact-sheet.png")]
    pictures += [speed_against_fidelity(result, output / "speed-against-fidelity.png")]
    pictures += [write_page(result, output / "report.html")]
    if as_json:
        print_json(result.to_dict())
    else:
        out.print(result)
        if details:
            out.print(result.costs())
    for picture in pictures:
        note(f"wrote {picture}")

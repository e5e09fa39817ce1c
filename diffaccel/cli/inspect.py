"""``diffaccel inspect``: what a model consists of, as a tree, a picture of bars or JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from diffaccel.cli.arguments import Device, Dtype, Json, Model, read_plan, read_size
from diffaccel.cli.console import err, note, out, print_json, quiet_libraries
from diffaccel.errors import InputError

EXAMPLES = """
[bold]Examples[/]

diffaccel inspect

diffaccel inspect -m bundled:video --picture video.png

diffaccel inspect -m ./my-pipeline --size 512 --json > model.json

diffaccel inspect -m bundled:video --memory --plan balanced

diffaccel inspect -m bundled:video --attention heads.png --plan plans/sparse
"""


def inspect(
    model: Model = "bundled:image",
    run: Annotated[
        bool, typer.Option("--run/--no-run", help="Measure a call of two steps, or only read the structure.")
    ] = True,
    size: Annotated[str | None, typer.Option(help="One side, or WIDTHxHEIGHT, of the call.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of the call's video.")] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Also predict each denoiser's peak memory on a CUDA GPU; needs none.")
    ] = False,
    plan: Annotated[
        str | None,
        typer.Option(help="With --memory or --attention: preset or saved plan's folder that the denoisers run under."),
    ] = None,
    attention: Annotated[
        Path | None,
        typer.Option(
            help="Write a picture of attention maps of some heads here (.png), before and after the plan's reordering, "
            "with its mask. Without --plan half of the blocks is planned, from a calibration with one prompt."
        ),
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Write a picture of bars (.png, .pdf, .svg) here.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Show blocks, sites with their roles and attention calls, and where parameters, operations and time go."""
    wh = read_size(size)
    chosen = read_plan(plan) if plan is not None else None
    if chosen is not None and not memory and attention is None:
        raise InputError("--plan without --memory or --attention: inspect shows the model as it is; add one of them")
    quiet_libraries()
    from diffaccel.inspection import draw, inspect_model, predict_pipeline_memory
    from diffaccel.inspection.render import tree
    from diffaccel.pipelines import BUNDLED, load

    wrapped = load(model, device=device, dtype=dtype)
    call: dict[str, Any] = {"num_frames": frames} if frames is not None else {}
    call |= {"width": wh[0], "height": wh[1]} if wh else {}
    if model in BUNDLED:
        call["prompt"] = BUNDLED[model].example
    with err.status("measuring a call of two steps") if run else err.status("reading"):
        inspection = inspect_model(wrapped, call or None, run=run)
    predicted = predict_pipeline_memory(wrapped, call, chosen) if memory else {}
    if as_json:
        more = {"memory": {name: p.to_dict() for name, p in predicted.items()}} if memory else {}
        print_json({**inspection.to_dict(), **more})
    else:
        out.print(tree(inspection))
        for name, p in predicted.items():
            syncs = ", ".join(f"{count} x {reason}" for reason, count in p.syncs.items()) or "none"
            where = f"{name} on a CUDA GPU{f' under {plan}' if plan else ''}"
            sizes = f"weights {p.weights_bytes / 2**20:.1f} MiB, peak {p.peak_bytes / 2**20:.1f} MiB"
            out.print(f"{where}: {sizes}; host syncs in a call: {syncs}")
    if attention is not None:
        _draw_attention(wrapped, call, chosen, attention)
    if picture is not None:
        note(f"wrote {draw(inspection, picture)}")


def _draw_attention(wrapped: Any, call: dict[str, Any], plan: Any, file: Path) -> None:
    from diffaccel import BlockSparse, Plan, calibrate
    from diffaccel.inspection.attention_map import draw_heads, head_maps

    arguments = {**wrapped.defaults, **call}
    if plan is None:
        prompt = arguments.pop("prompt", None)
        requests = [prompt] if prompt is not None else [arguments]
        plan = calibrate(wrapped.pipe, BlockSparse(reorder=True, block_size=16), prompts=requests, **arguments)
        arguments |= {"prompt": prompt} if prompt is not None else {}
    if not isinstance(plan, Plan):
        raise InputError(f"--plan {plan}: presets hold no sparse attention; give the folder of a calibrated plan")
    maps = head_maps(wrapped.pipe, plan, arguments)
    draw_heads(maps, file)
    note(f"wrote {file}: {len(maps)} heads")

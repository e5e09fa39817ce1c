"""``diffaccel distill``: a pruned pipeline is healed by its original, or guidance is learnt in one call."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated

import typer

from diffaccel.cli.arguments import Device, Dtype, Json, call_arguments, chosen_prompts
from diffaccel.cli.console import err, note, print_json, quiet_libraries
from diffaccel.distillation.settings import Distillation
from diffaccel.errors import InputError

EXAMPLES = """
[bold]Examples[/]

diffaccel distill --student out/pruned --teacher bundled:image --steps 1000 -o out/healed

diffaccel distill --student out/pruned --teacher bundled:image --lora 16 --rate 1e-3 --features 0.1 -o out/healed

diffaccel distill --student out/shallow --freeze 0.5 --guided-rates --sample-every 200 -o out/healed

diffaccel distill --student out/pruned --teacher bundled:image --data ./pictures --task 0.5 -o out/healed

diffaccel distill --student bundled:image --guidance --lora 32 --rate 5e-4 -o out/one-call

accelerate launch -m diffaccel.cli distill --student out/pruned --precision bf16 -o out/healed
"""


def distill(
    student: Annotated[str, typer.Option(help="The pipeline that learns: a folder, hub id or bundled name.")],
    teacher: Annotated[str | None, typer.Option(help="The pipeline to learn from; not for --guidance.")] = None,
    guidance: Annotated[
        bool, typer.Option("--guidance", help="Learn in one call what classifier-free guidance makes of two.")
    ] = False,
    scale: Annotated[
        float | None, typer.Option(help="The teacher's guidance scale; default: the pipeline's own.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Updates of the weights.")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Recorded calls in an update.")] = 4,
    rate: Annotated[float, typer.Option(help="Largest learning rate.")] = 1e-4,
    features: Annotated[float, typer.Option(help="Weight of the distance to the teacher's blocks.")] = 0.0,
    attention: Annotated[float, typer.Option(help="Weight of the distance to its self-attentions.")] = 0.0,
    lora: Annotated[int, typer.Option(min=0, help="Train adapters of this rank only, merged in the end.")] = 0,
    freeze: Annotated[float, typer.Option(help="Share of the blocks, from the first, that do not learn.")] = 0.0,
    guided_rates: Annotated[
        bool, typer.Option("--guided-rates", help="Learn more slowly where the loss reacts more.")
    ] = False,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute activations, to save memory.")
    ] = False,
    precision: Annotated[str, typer.Option(help="no or bf16.")] = "no",
    sample_every: Annotated[int, typer.Option(min=0, help="Steps between sample pictures; 0: none.")] = 0,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 50,
    prompts: Annotated[Path | None, typer.Option(help="Prompts of the teacher's runs; one per line or JSON.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Instead, a folder of pictures with captions: name.txt beside name.png, or metadata.jsonl."),
    ] = None,
    task: Annotated[float, typer.Option(help="Weight of the distance to the data's own answer, for --data.")] = 0.0,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many of the prompts.")] = 64,
    runs: Annotated[int | None, typer.Option(min=1, help="Runs of the teacher; default: one per prompt.")] = None,
    denoising_steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps of the teacher's runs.")] = None,
    size: Annotated[str | None, typer.Option(help="One side, or WIDTHxHEIGHT.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise and the order.")] = 0,
    component: Annotated[str | None, typer.Option(help="Which denoiser, where there are several.")] = None,
    output: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the result; training that was interrupted goes on there.")
    ] = Path("out/distilled"),
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Teach a denoiser to give what its teacher gives, and save the pipeline.

    FOLDER/training holds the teacher's runs, curve.csv (loss by step, as it goes) and the checkpoint; the same command
    goes on from there to the same result.
    """
    settings = Distillation(
        steps=steps,
        batch=batch,
        rate=rate,
        features=features,
        attention=attention,
        task=task,
        lora=lora,
        freeze=freeze,
        guided_rates=guided_rates,
        checkpointing=checkpointing,
        precision=precision,
        guidance=guidance,
        seed=seed,
        save_every=save_every,
        sample_every=sample_every,
    )
    if teacher is None and not guidance:
        raise InputError("give --teacher, the pipeline to learn from, or --guidance")
    texts = None if data is not None else chosen_prompts(teacher or student, prompts, count, tuning=True)
    calls = call_arguments(denoising_steps, size, frames) | ({} if scale is None else {"guidance_scale": scale})
    quiet_libraries()
    from accelerate import PartialState

    from diffaccel.distillation.distill import distill as run
    from diffaccel.pipelines.loading import load, save

    learner = load(student, device=device, dtype=dtype)
    guide = None if teacher is None else load(teacher, device=device, dtype=dtype)
    defaults = (guide or learner).defaults
    run(
        learner.pipe,
        teacher=None if guide is None else guide.pipe,
        prompts=texts,
        data=data,
        folder=output / "training",
        settings=settings,
        runs=runs,
        component=component,
        quiet=not err.is_terminal,
        **{**defaults, **calls},
    )
    learner.defaults = {**defaults, **learner.defaults} | ({"guidance_scale": 1.0} if guidance else {})
    if not PartialState().is_main_process:
        return
    save(learner, output)
    curve = output / "training" / "curve.csv"
    if as_json:
        with curve.open(newline="") as file:
            *_, last = csv.DictReader(file)
        numbers = {name: float(value) for name, value in last.items() if value}
        print_json({"folder": str(output), "curve": str(curve), "last": numbers})
    note(f"wrote {output}; curve: {curve}")

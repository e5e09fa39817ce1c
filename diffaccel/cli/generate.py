"""``diffaccel generate``: images and videos from prompts, resumable."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffaccel.cli.arguments import Device, Dtype, Json, Model, plan_identity, read_plan, read_size
from diffaccel.cli.console import err, note, out, print_json, quiet_libraries
from diffaccel.errors import InputError
from diffaccel.pipelines.prompts import read_prompts

if TYPE_CHECKING:
    from diffaccel.pipelines import Bundled, Job, Result, Wrapped

EXAMPLES = """
[bold]Examples[/]

diffaccel generate --prompt "a large red circle on the left on a gray background"

diffaccel generate -m bundled:video --prompt "a small yellow square moving left on a black background" -o square.mp4

diffaccel generate -m Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts prompts.txt --plan fast --size 832x480 -o out/wan

diffaccel generate --prompt "a large blue circle on the left on a gray background" --image start.png --strength 0.6
"""


def generate(
    model: Model = "bundled:image",
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; several are fine.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File with one prompt per line, or a JSON list.")] = None,
    image: Annotated[Path | None, typer.Option(help="Start image: image-to-image or image-to-video.")] = None,
    strength: Annotated[float | None, typer.Option(help="How far from the start image, in (0, 1].")] = None,
    negative: Annotated[str | None, typer.Option(help="Negative prompt.")] = None,
    plan: Annotated[
        str, typer.Option(help="lossless, balanced, fast, a saved plan's folder, or none for the original pipeline.")
    ] = "balanced",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first output; the next ones count up.")] = 0,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Outputs per prompt.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    size: Annotated[str | None, typer.Option(help="One side, or WIDTHxHEIGHT.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video.")] = None,
    fps: Annotated[float, typer.Option(min=0.1, help="Frames per second of the file.")] = 8,
    output: Annotated[
        Path,
        typer.Option("--out", "-o", help="A folder; or a file (.png .jpg .webp, .mp4 .gif) for one output."),
    ] = Path("out"),
    suffix: Annotated[str | None, typer.Option("--format", help="png, jpg, webp, mp4 or gif.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Make outputs again that are there already.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Generate images or videos, accelerated by a plan.

    A run that was interrupted goes on where it stopped: outputs that are there, made with the same settings, are kept.
    """
    texts = _prompts(model, prompt, prompts)
    if model.startswith("bundled:"):
        from diffaccel.pipelines.bundled import bundled

        _warn_of_words(bundled(model), texts)
    wh = read_size(size)
    chosen = read_plan(plan)
    start = _read_start(image)
    if strength is not None and start is None:
        raise InputError("--strength says how far to go from a start image; give one by --image")
    quiet_libraries()
    from diffaccel.pipelines.batch import make_jobs, pending, run_jobs
    from diffaccel.pipelines.loading import load
    from diffaccel.pipelines.media import check_writable

    settings = {
        "model": model, "plan": plan_identity(chosen), "image": _file_identity(image), "strength": strength,
        "negative": negative, "steps": steps, "guidance": guidance, "size": wh, "frames": frames, "dtype": dtype,
    }  # fmt: skip
    bundled_kind = {"bundled:image": False, "bundled:video": True}.get(model)
    one_file = bool(output.suffix) and not output.is_dir()

    def jobs_for(makes_video: bool) -> tuple[Path, list[Job]]:
        ending = _suffix(makes_video, output if one_file else None, suffix)
        jobs = make_jobs(texts, seed, ending, count)
        if not one_file:
            return output, jobs
        if len(jobs) > 1:
            raise InputError(f"--out {str(output)!r} is one file, but there are {len(jobs)} outputs; give a folder")
        return output.parent, [type(jobs[0])(jobs[0].prompt, jobs[0].seed, output.name)]

    if bundled_kind is not None:  # what is wrong with the outputs is said before a model is loaded
        pending(*jobs_for(bundled_kind), settings, overwrite=overwrite)
    check_writable(output.parent if one_file else output)
    wrapped = load(model, device=device, dtype=dtype)
    folder, jobs = jobs_for(wrapped.makes_video)
    if pending(folder, jobs, settings, overwrite=overwrite) and chosen is not None:
        wrapped.accelerate(chosen)
    call: dict[str, Any] = {"negative_prompt": negative, "steps": steps, "guidance": guidance, "size": wh}
    if frames is not None and not wrapped.makes_video:
        raise InputError(f"--frames: {model} makes images; drop it, or use -m bundled:video")
    if wrapped.makes_video:
        call["frames"] = frames

    def started(i: int, job: Job) -> None:
        label = f"[{i + 1}/{len(jobs)}] {(job.prompt or job.file)[:60]}"
        wrapped.pipe.set_progress_bar_config(desc=label, leave=False, disable=not sys.stderr.isatty())

    def finished(result: Result) -> None:
        if not as_json:
            took = "was there already" if result.seconds is None else f"{result.seconds:.2f} s"
            out.print(f"{result.path}  [dim]seed {result.job.seed}, {took}[/]", highlight=False, soft_wrap=True)

    results = run_jobs(
        wrapped, jobs, folder, settings=settings, image=start, strength=strength, fps=fps, overwrite=overwrite,
        started=started, finished=finished, **call,
    )  # fmt: skip
    _report(wrapped, model, results, as_json)


def _report(wrapped: Wrapped, model: str, results: list[Result], as_json: bool) -> None:
    report = wrapped.accel.report() if wrapped.accel else None
    if as_json:
        outputs = [r.to_dict() for r in results]
        print_json({"model": model, "outputs": outputs, "report": report.to_dict() if report else None})
    elif report is not None:
        err.print(str(report), style="dim", highlight=False, markup=False, soft_wrap=True)


def _prompts(model: str, prompt: list[str] | None, file: Path | None) -> list[str]:
    if prompt and file:
        raise InputError("give --prompt or --prompts, not both")
    if file is not None:
        return read_prompts(file)
    if prompt:
        return prompt
    from diffaccel.pipelines.bundled import BUNDLED

    example = BUNDLED[model].example if model in BUNDLED else "an astronaut riding a horse"
    raise InputError(f'no prompt; for example: diffaccel generate -m {model} --prompt "{example}"')


def _warn_of_words(pipeline: Bundled, texts: list[str]) -> None:
    unknown = sorted({w for text in texts for w in pipeline.unknown_words(text)})
    if unknown:
        words = ", ".join(unknown)
        note(f"bundled:{pipeline.kind} only knows drawn shapes, not {words}; try: {pipeline.example}")


def _read_start(image: Path | None) -> Any:
    if image is None:
        return None
    from diffaccel.pipelines.media import read_image

    return read_image(image)


def _file_identity(file: Path | None) -> str | None:
    import hashlib

    return None if file is None else hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _suffix(makes_video: bool, file: Path | None, suffix: str | None) -> str:
    from diffaccel.pipelines.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES

    allowed = VIDEO_SUFFIXES if makes_video else IMAGE_SUFFIXES
    chosen = f".{suffix.removeprefix('.')}" if suffix else file.suffix if file else allowed[0]
    if chosen.lower() not in allowed or (file is not None and chosen != file.suffix):
        kind = "videos" if makes_video else "images"
        raise InputError(f"the pipeline makes {kind}: --out or --format must be {', '.join(allowed)}, got {chosen}")
    return chosen

"""Many prompts into one folder, resumable: what is already there is not made again.

Beside the outputs lies ``diffaccel.jsonl``, one line per output with the settings it was made with. The line is written
before the output, and the output appears whole or not at all, so an interrupted run loses at most the item in flight.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from diffaccel.errors import InputError
from diffaccel.pipelines.media import check_writable, require_writer, save_image, save_video
from diffaccel.pipelines.wrapped import Wrapped

MANIFEST = "diffaccel.jsonl"


@dataclass(frozen=True)
class Job:
    """One output: its prompt (None for pipelines without one), seed and file name."""

    prompt: str | None
    seed: int
    file: str


@dataclass(frozen=True)
class Result:
    """What became of a job. ``seconds`` is None when the output was there already."""

    job: Job
    path: Path
    seconds: float | None = None
    skipped: bool = field(default=False)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self.job), "path": str(self.path), "seconds": self.seconds, "skipped": self.skipped}


def make_jobs(prompts: Sequence[str | None], seed: int, suffix: str, per_prompt: int = 1) -> list[Job]:
    """One job per prompt and image. Seeds count up from ``seed``; the file name says number, prompt and seed."""
    jobs = []
    for i, prompt in enumerate(p for p in prompts for _ in range(per_prompt)):
        slug = re.sub(r"[^a-z0-9]+", "-", (prompt or "").lower()).strip("-")[:60].strip("-")
        jobs.append(Job(prompt, seed + i, f"{i:04d}-{slug or 'output'}-s{seed + i}{suffix}"))
    return jobs


def pending(folder: Path, jobs: Sequence[Job], settings: Mapping[str, Any], *, overwrite: bool = False) -> list[Job]:
    """The jobs whose output is not there yet. Writes nothing, so a caller can ask before loading a model.

    Raises:
        InputError: a file of that name is there, but was made with other settings or not by a run like this.
        MissingPackageError: nothing here can write such files.
    """
    for suffix in {Path(job.file).suffix for job in jobs}:
        require_writer(suffix)
    if overwrite:
        return list(jobs)
    known = dict(_read(folder / MANIFEST))
    todo = []
    for job in jobs:
        if not (folder / job.file).exists():
            todo.append(job)
            continue
        have, want = known.get(job.file), _record(job, settings)
        if have != want:
            other = [k for k in want if have is not None and have.get(k) != want[k]]
            why = f"was made with other settings ({', '.join(other)})" if other else "is not from a run of diffaccel"
            raise InputError(f"{str(folder / job.file)!r} exists and {why}; use --overwrite or another --out")
    return todo


def run_jobs(
    wrapped: Wrapped,
    jobs: Sequence[Job],
    folder: str | os.PathLike[str],
    *,
    settings: Mapping[str, Any],
    image: Image.Image | None = None,
    strength: float | None = None,
    fps: float = 8,
    overwrite: bool = False,
    started: Callable[[int, Job], None] | None = None,
    finished: Callable[[Result], None] | None = None,
    **call: Any,
) -> list[Result]:
    """Generate each job's output into ``folder`` unless it is there.

    Args:
        wrapped: the pipeline.
        jobs: see `make_jobs`; file names end in a video suffix exactly for pipelines that make videos.
        folder: made if missing.
        settings: JSON-ready; whatever decides the outputs (model, plan, steps, ...); others are refused.
        image, strength: the start image, see `Wrapped.generate_image`.
        fps: of videos.
        overwrite: make everything again.
        started: called before each generation with its index and job.
        finished: called after each job.
        call: handed to `Wrapped.generate_image` or `generate_video`.

    Raises:
        InputError: see `pending`; or the folder cannot be written to.
    """
    folder = Path(folder)
    todo = set(pending(folder, jobs, settings, overwrite=overwrite))
    check_writable(folder)
    results = []
    for i, job in enumerate(jobs):
        result = Result(job, folder / job.file, skipped=True)
        if job in todo:
            if started is not None:
                started(i, job)
            begun = time.perf_counter()
            if wrapped.makes_video:
                video = wrapped.generate_video(job.prompt, image=image, seed=job.seed, **call)[0]
                _note(folder / MANIFEST, job, settings)
                save_video(video, folder / job.file, fps)
            else:
                picture = wrapped.generate_image(job.prompt, image=image, strength=strength, seed=job.seed, **call)[0]
                _note(folder / MANIFEST, job, settings)
                save_image(picture, folder / job.file)
            result = Result(job, folder / job.file, time.perf_counter() - begun)
        results.append(result)
        if finished is not None:
            finished(result)
    return results


def _record(job: Job, settings: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps({**settings, "prompt": job.prompt, "seed": job.seed}))


def _note(manifest: Path, job: Job, settings: Mapping[str, Any]) -> None:
    manifest.parent.mkdir(parents=True, exist_ok=True)
    torn = manifest.exists() and not manifest.read_bytes().endswith(b"\n")  # cut off while it was written
    with manifest.open("a") as file:
        file.write(("\n" if torn else "") + json.dumps({"file": job.file, **_record(job, settings)}) + "\n")


def _read(manifest: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """File name and settings of each line; the last line of a file counts."""
    if not manifest.exists():
        return
    for line in manifest.read_text().splitlines():
        try:
            record = json.loads(line)
            yield record.pop("file"), record
        except (ValueError, KeyError, AttributeError):  # a line cut off by an interruption: its output was not yet made
            continue

"""Peers that run as a program of their own, in an environment of their own: ``command:NAME=PROGRAM ARGUMENTS``.

For what cannot share our process: other versions of packages (Pruna), other formats of models (OpenVINO), licences that
must not be mixed (SDNQ). The program is started with one more argument, a JSON file:

    {"version": 1,
     "pipeline": FOLDER,               as save_pretrained writes it
     "device": "cpu", "dtype": "float32", "threads": 2,
     "warm_up": {...},                 arguments of one call before, which is not timed
     "items": [{"index": 0, "seed": 0, "arguments": {"prompt": ..., "num_inference_steps": ...}, "output": FILE.npy}],
     "answer": FILE.json}

For each item it calls the pipeline with these arguments and ``torch.Generator().manual_seed(seed)``, batch 1, and
writes the picture or clip as ``[H, W, C]`` or ``[F, H, W, C]``, floats in [0, 1] or uint8, to ``output``. Then it
writes

    {"seconds": [per item, the whole call],
     "loop_seconds": [per item, the denoising loop],     may be missing: the row is then timed by whole calls
     "peak_bytes": N, "model_bytes": N, "notes": ["OpenVINO 2026.4"]}          all may be missing

to ``answer`` and exits with 0. It is started once per turn, beside the turns of the other rows; loading the model is
not timed. docs/evaluation.md holds examples.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffaccel.errors import InputError
from diffaccel.eval.generate import Job
from diffaccel.eval.metrics.samples import as_samples

COMMAND = "command:"
_NAMED = re.compile(r"([\w .-]+)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Surroundings:
    """What a program is told of the run, beside its items."""

    pipeline: Path
    device: str
    dtype: str
    threads: int


class Command:
    """One such program.

    Args:
        text: ``NAME=PROGRAM ARGUMENTS``, as a shell would split it. Without a name it is that of the last file of
            Python, else of the program.

    Raises:
        InputError: nothing to run.
    """

    def __init__(self, text: str) -> None:
        match = _NAMED.fullmatch(text)
        name, line = match.groups() if match and "/" not in match[1] else (None, text)
        try:
            self.words = shlex.split(line)
        except ValueError as error:
            raise InputError(f"peer {COMMAND}{text}: {error}") from None
        if not self.words:
            raise InputError(f"peer {COMMAND}{text}: write {COMMAND}NAME=PROGRAM ARGUMENTS")
        scripts = [word for word in self.words if word.endswith(".py")]
        self.name = name.strip() if name else Path((scripts or self.words[:1])[-1]).stem

    def run(
        self,
        jobs: Sequence[Job],
        calls: Mapping[str, Any],
        warm_up: Mapping[str, Any],
        around: Surroundings,
        folder: Path,
    ) -> Iterator[tuple[Job, np.ndarray, dict[str, Any]]]:
        """Each item's sample, float32 ``[F, H, W, C]``, with its costs.

        Args:
            jobs: the items.
            calls: arguments of every call.
            warm_up: those of the call before.
            folder: where request, outputs, answer and log go.

        Raises:
            InputError: a prompt that is no text, or the program cannot be started, fails, or answers something else;
                the message ends with its last line.
        """
        folder.mkdir(parents=True, exist_ok=True)
        request, answer, log = (folder / name for name in ("request.json", "answer.json", "log.txt"))
        answer.unlink(missing_ok=True)
        items = [
            {
                "index": job.index,
                "seed": job.seed,
                "arguments": {**calls, **_prompt(job)},
                "output": str(folder / f"{job.index}.npy"),
            }
            for job in jobs
        ]
        body = {
            "version": 1,
            **{k: str(v) if isinstance(v, Path) else v for k, v in around.__dict__.items()},
            "warm_up": {**warm_up, **_prompt(jobs[0])},
            "items": items,
            "answer": str(answer),
        }
        try:
            request.write_text(json.dumps(body, indent=1))
        except TypeError as error:
            raise InputError(f"{self.name}: its arguments must be texts and numbers: {error}") from None
        self._start(request, log)
        yield from self._answers(jobs, items, answer)

    def _start(self, request: Path, log: Path) -> None:
        ours = ("PYTHONPATH", "PYTHONHOME")  # of another environment
        environment = {name: value for name, value in os.environ.items() if name not in ours}
        try:
            with log.open("w") as file:
                done = subprocess.run(
                    [*self.words, str(request)], stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment
                )
        except OSError as error:
            raise InputError(f"{self.name} cannot be started: {error.strerror or error}: {self.words[0]}") from None
        if done.returncode:
            last = next((line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), "")
            raise InputError(f"{self.name} ended with {done.returncode}: {last.strip():.200} (see {log})")

    def _answers(
        self, jobs: Sequence[Job], items: Sequence[Mapping[str, Any]], file: Path
    ) -> Iterator[tuple[Job, np.ndarray, dict[str, Any]]]:
        try:
            answer = json.loads(file.read_text())
            seconds = [float(s) for s in answer["seconds"]]
            loops = [float(s) for s in answer["loop_seconds"]] if answer.get("loop_seconds") else [None] * len(seconds)
            if len(seconds) != len(jobs) or len(loops) != len(jobs):
                raise ValueError(f"{len(seconds)} seconds for {len(jobs)} items")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.name} gave no answer as the protocol asks: {error}") from None
        for job, item, whole, loop in zip(jobs, items, seconds, loops, strict=True):
            try:
                tensor = as_samples([np.load(item["output"])])[0]
            except (OSError, ValueError) as error:
                raise InputError(f"{self.name} gave no sample for item {job.index}: {error}") from None
            Path(item["output"]).unlink()
            costs = {"seconds": whole, "loop_seconds": loop, "peak_bytes": answer.get("peak_bytes")}
            told = {"model_bytes": answer.get("model_bytes"), "notes": answer.get("notes", [])}
            yield job, np.ascontiguousarray(tensor.movedim(1, -1).numpy()), {**costs, **told}


def _prompt(job: Job) -> dict[str, Any]:
    return {"prompt": job.prompt} if isinstance(job.prompt, str) else dict(job.prompt)

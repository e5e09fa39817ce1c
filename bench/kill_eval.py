"""Kills `diffaccel eval` at random moments, resumes it, and compares with a run that nobody disturbed.

    python bench/kill_eval.py --kills 20

Compared are summary (all but seconds, memory and notes), rows of samples, and every file of outputs and features to the
bit. A run that ends before it is killed is compared, and another is begun.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

OPTIONS = "--plan fast -n 6 --steps 2 --size 64 --measure adherence"
COSTS = ("seconds", "loop_seconds", "text_seconds", "decode_seconds", "peak_bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="how many kills (default: 20)")
    parser.add_argument("--options", default=OPTIONS, help=f"of the command (default: {OPTIONS})")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the moments (default: the time)")
    arguments = parser.parse_args()
    # Once, before forking; no torch operation has run yet.
    import diffaccel.eval.compare
    import diffaccel.eval.gate
    import diffaccel.eval.page
    import diffaccel.pipelines.loading  # noqa: F401

    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as place:
        whole, started = Path(place) / "whole", time.monotonic()
        options = arguments.options.split()
        if wait_for(begin(whole, options)) != 0:
            sys.exit(f"{log_of(whole).read_text()}\nthe undisturbed run failed")
        took, kills, runs = time.monotonic() - started, 0, 0
        while kills < arguments.kills:
            runs += 1
            folder = Path(place) / f"run-{runs}"
            while kills < arguments.kills and not ended_before(folder, options, rng.uniform(0, took)):
                kills += 1
            if wait_for(begin(folder, options)) != 0:
                sys.exit(f"{log_of(folder).read_text()}\nresuming failed after {kills} kills (seed {arguments.seed})")
            if differing := differences(whole, folder):
                sys.exit(f"{differing} (seed {arguments.seed})")
        print(f"{kills} kills in {runs} runs of {took:.1f} s (seed {arguments.seed}): equal to the undisturbed run")


def begin(folder: Path, options: list[str]) -> int:
    """Starts the command in a process of its own; returns its number."""
    child = os.fork()
    if child:
        return child
    with log_of(folder).open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        code = 1
        try:
            command(folder, options)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            log.flush()
            os._exit(code)


def log_of(folder: Path) -> Path:
    """What the last process that ran in this folder printed."""
    return folder.with_suffix(".log")


def command(folder: Path, options: list[str]) -> None:
    import torch

    from diffaccel.cli import app

    torch.set_num_threads(1)
    app(["eval", *options, "-o", str(folder)])


def wait_for(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def ended_before(folder: Path, options: list[str], seconds: float) -> bool:
    """Run, and kill after so many seconds; whether it ended by itself before."""
    child = begin(folder, options)
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    return wait_for(child) != -signal.SIGKILL


def differences(whole: Path, folder: Path) -> str:
    """In words; nothing where there are none."""
    for name, read in (("result.json", summary), ("samples.jsonl", samples)):
        if read(whole / name) != read(folder / name):
            return f"{name} differs"
    ours, theirs = contents(whole), contents(folder)
    if ours.keys() != theirs.keys():
        return f"files differ: {sorted(ours.keys() ^ theirs.keys())[:5]}"
    return next((f"{name} differs" for name in ours if ours[name] != theirs[name]), "")


def summary(file: Path) -> Any:
    result = json.loads(file.read_text())
    rows = [
        {
            key: row[key]
            for key in ("name", "kind", "steps", "scores", "sets", "identical", "model_bytes", "notes", "flops")
        }
        for row in result["rows"]
    ]
    return rows, result["prompts"], result["seeds"], result["restored"]


def samples(file: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in COSTS} for line in lines]


def contents(folder: Path) -> dict[str, bytes]:
    """All files but those that hold seconds."""
    files = (f for part in ("outputs", "features") for f in (folder / part).rglob("*") if f.is_file())
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


if __name__ == "__main__":
    main()

"""``samples.jsonl`` of a run: one line for each row and item, to be read by any table program."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from diffaccel.eval.generate import Job
from diffaccel.eval.store import Store

_COSTS = ("seconds", "loop_seconds", "text_seconds", "decode_seconds", "denoiser_calls", "peak_bytes", "joules")


def write_samples(store: Store, jobs: Sequence[Job]) -> Path:
    """Write the lines, ordered by row and item; returns where.

    Of items that were timed several times, the costs are those of the first.

    Raises:
        InputError: there is no room.
    """
    by_item = {job.index: job for job in jobs}
    lines = []
    for record in sorted((r for r in store.records("item") if "files" in r), key=lambda r: (r["row"], r["item"])):
        job = by_item[record["item"]]
        line = {
            "row": record["row"],
            "item": record["item"],
            "prompt": job.label,
            "seed": job.seed,
            "file": str(store.file(record["row"], record["item"]).relative_to(store.folder)),
            "digest": record["digest"],
            "identical": record.get("identical"),
            "scores": record["scores"],
            **{name: record[name] for name in _COSTS},
        }
        lines.append(json.dumps(line, allow_nan=False) + "\n")
    return store.write(store.folder / "samples.jsonl", lambda partial: partial.write_text("".join(lines)))

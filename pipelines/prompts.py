"""Prompts from a file, in the forms in which prompt sets are published. No torch.

A form is told by structure, not by name: lines of text, a list or table with a column of prompts, COCO's captions. So
COCO, PartiPrompts, DrawBench, MJHQ and VBench are read as they are downloaded.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffaccel.errors import InputError

COLUMNS = ("prompt", "prompts", "caption", "prompt_en", "text")
"""Names under which tables hold their prompts, in any case; the first that is there counts."""

PUBLISHED: Mapping[str, str] = {
    "coco": "annotations/captions_val2014.json of the COCO 2014 train/val annotations, from cocodataset.org",
    "partiprompts": "PartiPrompts.tsv of the repository google-research/parti",
    "drawbench": "the table of DrawBench (Imagen, arXiv:2205.11487) saved as .csv with its column Prompts",
    "mjhq": "meta_data.json of the data set playgroundai/MJHQ-30K",
    "vbench": "VBench_full_info.json, or a list in prompts/, of the repository Vchitect/VBench",
}


def read_prompts(file: Path) -> list[str]:
    """The prompts of ``file``, in its order.

    Args:
        file: by its ending ``.json`` (a list of texts or of objects, an object of objects, or COCO's captions, of which
            the first of each image counts), ``.jsonl`` (a text or an object a line), ``.csv`` or ``.tsv`` with a
            header; anything else is text, one prompt a line, where empty lines and those that begin with # don't count.

    Raises:
        InputError: the file cannot be read or holds no prompts.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read prompts from {_told(file)}: {_reason(error)}{_where(file)}") from None
    kind = file.suffix.lower()
    if kind == ".json":
        prompts = list(_objects(_json(text, file), file))
    elif kind == ".jsonl":
        rows = [_json(line, file, number) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        prompts = list(_objects(rows, file))
    elif kind in (".csv", ".tsv"):
        table = csv.DictReader(text.splitlines(), delimiter="," if kind == ".csv" else "\t")
        prompts = list(_objects(list(table), file))
    else:
        prompts = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise InputError(f"{_told(file)} holds no prompts; write one per line")
    return prompts


def _objects(data: Any, file: Path) -> Iterator[str]:
    """The prompts in a list or an object of texts or objects."""
    if isinstance(data, dict) and isinstance(data.get("annotations"), list):  # COCO
        first: dict[Any, Any] = {}
        for row in data["annotations"]:
            first.setdefault(row.get("image_id") if isinstance(row, dict) else None, row)
        data = list(first.values())
    if not isinstance(data, list | dict):
        raise InputError(f"{_told(file)} must hold a list or an object of prompts, got {type(data).__name__}")
    for where, row in data.items() if isinstance(data, dict) else enumerate(data):
        if isinstance(row, str):
            yield row
            continue
        if not isinstance(row, dict):
            raise InputError(f"{_told(file)}: prompt {where} must be a text, got {type(row).__name__} {row!r:.80}")
        lower = {str(name).strip().lower(): value for name, value in row.items()}
        name = next((name for name in COLUMNS if name in lower), None)
        if name is None:
            raise InputError(
                f"{_told(file)}: entry {where} has none of {', '.join(COLUMNS)}, but {', '.join(map(str, row))}"
            )
        if not isinstance(lower[name], str):
            raise InputError(f"{_told(file)}: {name} of entry {where} must be a text, got {lower[name]!r:.80}")
        yield lower[name]


def _json(text: str, file: Path, line: int | None = None) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        where = "" if line is None else f" in line {line}"
        raise InputError(f"{_told(file)} is not JSON{where}: {error}") from None


def _where(file: Path) -> str:
    """Where to get a published set whose name was given instead of a file."""
    name = file.stem.lower().replace("-", "").replace("_", "")
    known = next((source for key, source in PUBLISHED.items() if name.startswith(key)), None)
    return "" if known is None else f". That set does not ship with diffaccel: download {known}, and give its path"


def _told(file: Path) -> str:
    return repr(str(file))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)

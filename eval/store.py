"""The folder of a comparison: each result is on disk as soon as it exists, so an interrupted run goes on where it was.

``run.json`` holds the settings, ``records.jsonl`` one line per event, ``outputs/<row>/`` the pictures: the reference as
float32 ``.npy`` (it is compared to the bit), the other rows as 8-bit ``.png`` or, for videos, ``.npy``. Where several
processes share a run, each further one writes ``records-<rank>.jsonl``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffaccel.errors import InputError

REFERENCE = "reference"


class Store:
    """Opens ``folder``, or a temporary one that is deleted with this object.

    Args:
        folder: a new or empty folder, or that of an earlier run with the same settings.
        settings: JSON-ready; what must be equal for results to belong together.
        rank: of this process among those that share the folder.

    Raises:
        InputError: the folder holds a run with other settings, or something else.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, settings: Mapping[str, Any], rank: int = 0) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="diffaccel-") if folder is None else None
        self.folder = Path(self._temporary.name if self._temporary else folder or "").expanduser()
        self._own = f"records-{rank}.jsonl" if rank else "records.jsonl"
        self.resumed = self._claim(json.loads(json.dumps(settings)))
        self._lines: list[dict[str, Any]] = []
        self.reload()

    def _claim(self, settings: dict[str, Any]) -> bool:
        file = self.folder / "run.json"
        if not file.exists():
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise InputError(f"{self.folder} exists and holds no comparison; give a new or an empty folder")
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(f"{self._own}.partial")
            partial.write_text(json.dumps(settings, indent=1))
            os.replace(partial, file)
            return False
        try:
            earlier = json.loads(file.read_text())
        except ValueError as error:
            raise InputError(f"{file} is damaged ({error}); give another folder") from None
        differing = sorted(k for k in {*earlier, *settings} if earlier.get(k) != settings.get(k))
        if differing:
            what = "; ".join(f"{k}: {_short(earlier.get(k))} there, {_short(settings.get(k))} here" for k in differing)
            raise InputError(f"{self.folder} holds a comparison with other settings ({what}); give another folder")
        return True

    def reload(self) -> None:
        """Take in what every process has written so far."""
        self._lines = [line for file in sorted(self.folder.glob("records*.jsonl")) for line in self._read(file)]

    def _read(self, file: Path) -> Iterator[dict[str, Any]]:
        lines = file.read_bytes().split(b"\n")
        if lines[-1] and file.name == self._own:  # cut off while it was written: drop it, the next line starts clean
            os.truncate(file, file.stat().st_size - len(lines[-1]))
        for line in lines[:-1]:
            yield json.loads(line)

    def append(self, **record: Any) -> None:
        """Add one record; on disk when this returns."""
        with (self.folder / self._own).open("ab") as file:
            file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._lines.append(record)

    def records(self, kind: str, **where: Any) -> list[dict[str, Any]]:
        """The records of one kind whose fields have the given values, in order."""
        return [r for r in self._lines if r["kind"] == kind and all(r.get(k) == v for k, v in where.items())]

    def save(self, row: str, item: int, sample: np.ndarray) -> Path:
        """Write one sample, float32 ``[F, H, W, C]`` in [0, 1]; returns where."""
        folder = self.folder / "outputs" / slug(row)
        exact = row == REFERENCE
        path = folder / f"{item:04d}{'.npy' if exact or len(sample) > 1 or sample.shape[-1] == 4 else '.png'}"
        if path.suffix == ".png":
            picture = to_bytes(sample[0])
            image = Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture)
            return self.write(path, image.save)
        return self.write_array(path, sample if exact else to_bytes(sample))

    def write_array(self, path: Path, array: np.ndarray) -> Path:
        """Write a .npy file."""
        return self.write(path, lambda partial: np.save(partial, array))

    def write(self, path: Path, save: Callable[[Path], object]) -> Path:
        """Let ``save`` write a file beside ``path`` and move it there, so that none is ever half done."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"partial-{self._own}{path.suffix}")
        save(partial)
        os.replace(partial, path)
        return path

    def load(self, row: str, item: int) -> np.ndarray:
        """One sample as float32 ``[F, H, W, C]`` in [0, 1]; to the bit for the reference.

        Raises:
            FileNotFoundError: it was not generated.
        """
        stem = self.folder / "outputs" / slug(row) / f"{item:04d}"
        if stem.with_suffix(".npy").exists():
            sample = np.load(stem.with_suffix(".npy"))
            return sample if sample.dtype == np.float32 else sample.astype(np.float32) / 255
        pixels = np.asarray(Image.open(stem.with_suffix(".png")), np.float32) / 255
        return pixels[None, ..., None] if pixels.ndim == 2 else pixels[None]


def to_bytes(sample: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] -> uint8, rounded."""
    return (sample.clip(0, 1) * 255).round().astype(np.uint8)


def slug(name: str) -> str:
    """``name`` as a file name; names that would collide differ by a digest."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def digest(sample: np.ndarray) -> str:
    """Identity of a sample to the bit."""
    return hashlib.sha256(np.ascontiguousarray(sample).tobytes()).hexdigest()[:16]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

"""The folder of a run: each result is on disk as soon as it exists, so an interrupted run goes on where it was.

============================  =========================================================================================
``run.json``                  what was asked for; a run with other settings is refused
``environment.json``          machine, packages and command of the first sitting
``records.jsonl``             one line per event; further processes of the run write ``records-<rank>.jsonl``
``outputs/<row>/<item>.png``  every sample, clips as ``.mp4``; the reference also as float32 ``.npy``, since others are
                              compared with it to the bit; small clips, with ``lossless`` all, as 8-bit ``.npy`` too
``features/``                 see `diffaccel.eval.feature_store`
``samples.jsonl``             at the end: a row and an item a line, with file, scores and costs
============================  =========================================================================================
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from diffaccel.errors import InputError
from diffaccel.eval.environment import environment
from diffaccel.eval.records import Records, out_of_room
from diffaccel.eval.sample_files import SUFFIXES, read_sample, suffixes_of, write_sample

REFERENCE = "reference"
_PARTIAL = "partial"
_HALF = re.compile(rf"\.?{_PARTIAL}-\d+\..*|.*\.{_PARTIAL}")  # what a writer that was killed leaves


class Store:
    """Opens ``folder``, or a temporary one that is deleted with this object.

    Process 0 opens it first, and puts right what a run that was killed has left: lines and files that are half written,
    and records whose sample is missing or damaged, which are then made again.

    Args:
        folder: a new or empty folder, or that of an earlier run with the same settings.
        settings: JSON-ready; what must be equal for results to belong together.
        rank: of this process among those that share the folder.
        lossless: whether clips are kept as frames beside the mp4.

    Raises:
        InputError: the folder holds a run with other settings, or something else, cannot be written to, or another run
            is at work in it.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        settings: Mapping[str, Any],
        rank: int = 0,
        *,
        lossless: bool = False,
    ) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="diffaccel-") if folder is None else None
        self.folder = Path(self._temporary.name if self._temporary else folder or "").expanduser()
        self._lossless, self._rank = lossless, rank
        self._own = Records(self.folder / (f"records-{rank}.jsonl" if rank else "records.jsonl"))
        self.resumed = self._claim(json.loads(json.dumps(settings)))
        self._lines: list[dict[str, Any]] = []
        self._lock = self._locked() if rank == 0 else None
        self._own.cut()
        self.reload()
        if self.resumed and rank == 0:
            self._put_right()

    def _claim(self, settings: dict[str, Any]) -> bool:
        file = self.folder / "run.json"
        if not file.exists():
            if self.folder.exists() and (not self.folder.is_dir() or any(map(_is_foreign, self.folder.iterdir()))):
                raise InputError(f"{self.folder} exists and holds no comparison; give a new or an empty folder")
            self.write(self.folder / "environment.json", lambda p: p.write_text(json.dumps(environment(), indent=1)))
            self.write(file, lambda p: p.write_text(json.dumps(settings, indent=1)))
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

    def _all(self) -> list[Records]:
        return [Records(file) for file in sorted(self.folder.glob("records*.jsonl"))]

    def reload(self) -> None:
        """Take in what every process has written so far."""
        self._lines = [record for records in self._all() for record in records.read()[0]]

    def _put_right(self) -> None:
        for left in self.folder.rglob(f"*{_PARTIAL}*"):
            if left.is_file() and _HALF.fullmatch(left.name):
                left.unlink()
        torn = sum(records.read()[1] for records in self._all())
        bad = {(r["row"], r["item"]) for r in self.records("item") if "files" in r and not self._is_whole(r)}
        references = {item for row, item in bad if row == REFERENCE}  # others were scored against what is lost
        if not torn and not bad:
            return

        def wanted(record: dict[str, Any]) -> bool:
            lost = record["kind"] == "item" and (record["item"] in references or (record["row"], record["item"]) in bad)
            return not lost

        for records in self._all():
            records.keep(wanted)
        self.reload()
        if torn:
            self.append(kind="note", text=f"{torn} damaged lines of the records were dropped, their items run again")
        if bad:
            told = ", ".join(f"{row} {item}" for row, item in sorted(bad)[:8])
            self.append(kind="note", text=f"{len(bad)} samples were missing or damaged and are made again: {told}")

    def _is_whole(self, record: Mapping[str, Any]) -> bool:
        stem = self._stem(record["row"], record["item"])
        return all(_checksum(stem.with_suffix(suffix)) == sum_ for suffix, sum_ in record["files"].items())

    def _locked(self) -> IO[str] | None:
        """Keeps other runs out of the folder for as long as it is open; a process that is killed holds no lock."""
        try:
            import fcntl
        except ImportError:  # Windows
            return None
        file = (self.folder / "run.json").open()
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise InputError(f"another run is writing to {self.folder}; wait for it, or give another folder") from None
        except OSError:  # a file system that has no locks
            pass
        return file

    def release(self) -> None:
        """Let other runs into the folder; nothing is written after this."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def append(self, **record: Any) -> None:
        """Add one record; on disk when this returns.

        Raises:
            InputError: it cannot be written.
        """
        self._own.append(record)
        self._lines.append(record)

    def records(self, kind: str, **where: Any) -> list[dict[str, Any]]:
        """The records of one kind whose fields have the given values, in order."""
        return [r for r in self._lines if r["kind"] == kind and all(r.get(k) == v for k, v in where.items())]

    def _stem(self, row: str, item: int) -> Path:
        return self.folder / "outputs" / slug(row) / f"{item:04d}"

    def save(self, row: str, item: int, sample: np.ndarray) -> dict[str, str]:
        """Write one sample, float32 ``[F, H, W, C]`` in [0, 1]; returns the files' suffixes with their checksums."""
        exact, stem = row == REFERENCE, self._stem(row, item)
        files = {}
        for suffix in suffixes_of(sample, exact=exact, lossless=self._lossless):
            path = self.write(stem.with_suffix(suffix), lambda partial: write_sample(partial, sample, exact=exact))
            files[suffix] = _checksum(path)
        return files

    def write_array(self, path: Path, array: np.ndarray) -> Path:
        """Write a .npy file."""
        return self.write(path, lambda partial: np.save(partial, array))

    def write(self, path: Path, save: Callable[[Path], object]) -> Path:
        """Let ``save`` write a file beside ``path`` and move it there, so that none is ever half done.

        Raises:
            InputError: it cannot be written.
        """
        partial = path.with_name(f"{_PARTIAL}-{self._rank}{path.suffix}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save(partial)
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise out_of_room(path, error) from None
        return path

    def file(self, row: str, item: int) -> Path:
        """Where a sample lies, in the form with the least losses.

        Raises:
            FileNotFoundError: it was not generated.
        """
        stem = self._stem(row, item)
        found = next((f for f in map(stem.with_suffix, SUFFIXES) if f.exists()), None)
        if found is None:
            raise FileNotFoundError(f"no sample {stem}")
        return found

    def shown(self, row: str, item: int) -> np.ndarray:
        """As `load`, for people: every row in the same form, so that none differs by the losses of its file alone.

        Raises:
            FileNotFoundError: it was not generated.
        """
        others = [f.suffix for f in (self.folder / "outputs").glob(f"*/{item:04d}.*")]
        lossy = ".mp4" in others and others.count(".mp4") > others.count(".npy")  # only the reference has its frames
        stem = self._stem(row, item)
        return read_sample(stem.with_suffix(".mp4")) if lossy else self.load(row, item)

    def load(self, row: str, item: int) -> np.ndarray:
        """One sample as float32 ``[F, H, W, C]`` in [0, 1]; to the bit for the reference.

        Raises:
            FileNotFoundError: it was not generated.
        """
        return read_sample(self.file(row, item))


def slug(name: str) -> str:
    """``name`` as a file name; names that would collide differ by a digest."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def digest(sample: np.ndarray) -> str:
    """Identity of a sample to the bit."""
    return hashlib.sha256(np.ascontiguousarray(sample).tobytes()).hexdigest()[:16]


def _checksum(file: Path) -> str:
    """Of a file's content; of none, nothing."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.exists() else ""


def _is_foreign(file: Path) -> bool:
    """Whether a file is more than what a run that was killed at its very beginning leaves."""
    return not _HALF.fullmatch(file.name) and file.name != "environment.json"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

"""Features in the folder of a run: those of each sample as soon as it exists, those of a folder of pictures once.

``features/<extractor>/<row>/<item>.npy`` and ``features/<extractor>/folder.npy``, float64. A file that is missing or
damaged is computed again from the sample that it belongs to.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

from diffaccel.errors import InputError
from diffaccel.eval.generate import Job
from diffaccel.eval.processes import Processes
from diffaccel.eval.sets import ChosenSet, SetScore, score_set
from diffaccel.eval.store import REFERENCE, Store, slug

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
CLIPS = (".mp4", ".gif", ".webm", ".mov", ".avi", ".mkv")


class Folder:
    """The pictures, or clips, under a folder of the user's.

    Args:
        path: searched with all that lies under it.
        video: whether it holds clips.

    Raises:
        InputError: no such folder, or none in it.
    """

    def __init__(self, path: str | os.PathLike[str], *, video: bool) -> None:
        self.path = Path(path).expanduser()
        suffixes = CLIPS if video else PICTURES
        if not self.path.is_dir():
            raise InputError(f"--against: no folder {str(self.path)!r}")
        self.files = sorted(f for f in self.path.rglob("*") if f.suffix.lower() in suffixes)
        if not self.files:
            what = "clips" if video else "pictures"
            raise InputError(f"--against: {str(self.path)!r} holds no {what} ({', '.join(suffixes)})")

    @property
    def identity(self) -> str:
        """Of its names and sizes."""
        told = "\n".join(f"{f.relative_to(self.path)} {f.stat().st_size}" for f in self.files)
        return f"{len(self.files)} files {hashlib.sha256(told.encode()).hexdigest()[:16]}"

    @property
    def words(self) -> str:
        return f"the {len(self.files)} files in {self.path}"


class FeatureStore:
    """Features of one run.

    Args:
        store: its folder.
        chosen: the measures of rows.
    """

    def __init__(self, store: Store, chosen: Sequence[ChosenSet]) -> None:
        self._store = store
        self.chosen = tuple(chosen)
        self._networks = {one.key: one for one in chosen}

    def add(self, row: str, item: int, sample: np.ndarray) -> None:
        """Keep the features of a sample."""
        for one in self._networks.values():
            self._compute(one, row, item, sample)

    def _compute(self, one: ChosenSet, row: str, item: int, sample: np.ndarray) -> np.ndarray:
        try:
            features = one.extract(sample)
        except ValueError as error:
            raise InputError(f"measure {one.measure.name!r}, {row}, item {item}: {error}") from None
        self._store.write_array(self._file(one, row, item), features)
        return features

    def _file(self, one: ChosenSet, row: str, item: int) -> Path:
        return self._folder(one) / slug(row) / f"{item:04d}.npy"

    def _folder(self, one: ChosenSet) -> Path:
        name = slug(one.key)
        return self._store.folder / "features" / f"{name[:40]}-{hashlib.sha256(one.key.encode()).hexdigest()[:8]}"

    def _load(self, one: ChosenSet, row: str, items: Sequence[int]) -> np.ndarray:
        found = []
        for item in items:
            features = _read(self._file(one, row, item), one.features)
            if features is None:
                features = self._compute(one, row, item, self._store.load(row, item))
            found.append(features)
        return np.stack(found)

    def read_folder(self, folder: Folder, *, progress: bool = False) -> None:
        """Compute the features of a folder, unless that was done.

        Raises:
            InputError: one of its files cannot be read.
        """
        for one in self._networks.values():
            file = self._folder(one) / "folder.npy"
            if not one.measure.compares or _read(file, one.features, len(folder.files)) is not None:
                continue
            files = track(
                folder.files, description=f"features of {folder.path.name}", transient=True, disable=not progress
            )
            self._store.write_array(file, np.stack([_of_file(one, f) for f in files]))

    def scores(
        self, rows: Sequence[str], jobs: Sequence[Job], folder: Folder | None, processes: Processes
    ) -> dict[str, dict[str, SetScore]]:
        """By row and name of the measure; process 0 computes them for all."""
        return processes.agree(self._scores(rows, jobs, folder) if processes.first else {})

    def _scores(
        self, rows: Sequence[str], jobs: Sequence[Job], folder: Folder | None
    ) -> dict[str, dict[str, SetScore]]:
        numbers: dict[str, int] = {}
        prompts = [numbers.setdefault(repr(job.prompt), len(numbers)) for job in jobs]
        items = [job.index for job in jobs]
        scores: dict[str, dict[str, SetScore]] = {row: {} for row in rows}
        for one in self.chosen:
            compared = None
            if folder is not None and one.measure.compares:
                features = _read(self._folder(one) / "folder.npy", one.features, len(folder.files))
                assert features is not None
                compared = features, folder.words
            base = self._load(one, REFERENCE, items)
            for row in rows:
                mine, other = (base, None) if row == REFERENCE else (self._load(one, row, items), base)
                score = score_set(one, mine, other, prompts, compared)
                if score is not None:
                    scores[row][one.measure.name] = score
        return scores


def _read(file: Path, features: int, samples: int | None = None) -> np.ndarray | None:
    """None where the file is missing, damaged, or of other features."""
    shape = (features,) if samples is None else (samples, features)
    try:
        array = np.load(file)
    except (OSError, ValueError, EOFError):
        return None
    return array if array.shape == shape else None


def _of_file(one: ChosenSet, file: Path) -> np.ndarray:
    try:
        if file.suffix.lower() in CLIPS:
            import imageio

            with imageio.get_reader(file) as reader:
                sample = np.stack([np.asarray(frame)[..., :3] for frame in reader])
        else:
            with Image.open(file) as image:
                sample = np.asarray(image.convert("RGB"))[None]
        return one.extract(sample)
    except (OSError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
        raise InputError(f"--against: {str(file)!r} cannot be used: {error}") from None

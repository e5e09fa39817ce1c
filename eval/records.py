"""Lines of JSON that survive being killed at any moment: one event a line, on disk when `append` returns."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffaccel.errors import InputError


def out_of_room(file: Path, error: OSError) -> InputError:
    """What a write that failed means for the user."""
    return InputError(
        f"cannot write {str(file)!r}: {error.strerror or error}. What was finished is kept: make room and run the same "
        "command again"
    )


class Records:
    """The records of one process.

    Args:
        file: where they are appended; need not exist.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def append(self, record: dict[str, Any]) -> None:
        """Add one.

        Raises:
            InputError: it cannot be written; the file is then as it was.
        """
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        size = self.file.stat().st_size if self.file.exists() else 0
        try:
            with self.file.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if self.file.exists():
                os.truncate(self.file, size)
            raise out_of_room(self.file, error) from None

    def cut(self) -> None:
        """Drop a last line that was cut off while it was written, so that the next one starts clean."""
        if not self.file.exists():
            return
        tail = self.file.read_bytes().rpartition(b"\n")[2]
        if tail:
            os.truncate(self.file, self.file.stat().st_size - len(tail))

    def read(self) -> tuple[list[dict[str, Any]], int]:
        """All whole records, and how many lines are damaged otherwise."""
        if not self.file.exists():
            return [], 0
        found, damaged = [], 0
        for line in self.file.read_bytes().split(b"\n")[:-1]:
            try:
                record = json.loads(line)
                found.append(record)
            except ValueError:  # a bad disk, or an editor
                damaged += 1
        return found, damaged

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drop what is not wanted, and damaged lines, in one step."""
        lines = [json.dumps(r, allow_nan=False).encode() + b"\n" for r in self.read()[0] if wanted(r)]
        partial = self.file.with_name(f"{self.file.name}.partial")
        try:
            with partial.open("wb") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.file)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise out_of_room(self.file, error) from None

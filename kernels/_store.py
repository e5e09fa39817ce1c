"""What is remembered about this machine: JSON files in a cache folder, and the versions their entries hold for.

The folder is ``$DIFFACCEL_CACHE``, else ``$XDG_CACHE_HOME/diffaccel``, else ``~/.cache/diffaccel``.
"""

import json
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def folder() -> Path:
    """Where the files lie; it need not exist. Raises ``RuntimeError`` where there is no home directory."""
    if chosen := os.environ.get("DIFFACCEL_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffaccel"


def write(path: Path, data: Any) -> None:
    """Write JSON. The file is replaced whole, so that a reader, or one who interrupts, never sees half of it.

    Raises:
        OSError: not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            temporary = file.name
            json.dump(data, file, indent=1, sort_keys=True)
        os.replace(temporary, path)
    except BaseException:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise


@lru_cache(maxsize=2)
def versions(cuda: bool) -> str:
    """What a measurement depends on besides the device: torch, triton, diffaccel and, on CUDA, the driver."""
    parts = [f"torch {torch.__version__}", f"triton {_version('triton')}", f"diffaccel {_version('diffaccel')}"]
    return ", ".join([*parts, f"driver {driver()}"] if cuda else parts)


def driver() -> str:
    """Version of NVIDIA's driver; ``"unknown"`` where its tool is missing."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return next(iter(done.stdout.split()), "unknown") if done.returncode == 0 else "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"

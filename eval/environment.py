"""What a run ran on, to be kept beside its results."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import distributions
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """JSON-ready: machine, packages, command and time."""
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        "command": sys.argv,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "packages": dict(sorted({d.name: d.version for d in distributions() if d.name}.items())),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()

"""Pipelines: load one, generate with it, run batches that can be resumed. Import as ``diffaccel.pipelines``."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffaccel.pipelines.bundled import BUNDLED, Bundled

if TYPE_CHECKING:
    from diffaccel.pipelines.batch import Job, Result, run_jobs
    from diffaccel.pipelines.loading import load
    from diffaccel.pipelines.wrapped import Wrapped

__all__ = ["BUNDLED", "Bundled", "Job", "Result", "Wrapped", "load", "run_jobs"]

_LAZY = {"Job": "batch", "Result": "batch", "run_jobs": "batch", "Wrapped": "wrapped", "load": "loading"}


def __getattr__(name: str) -> Any:
    """Import torch and diffusers when they are first needed: the command line starts without them."""
    if name in _LAZY:
        return getattr(import_module(f"diffaccel.pipelines.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'diffaccel.pipelines' has no attribute {name!r}")

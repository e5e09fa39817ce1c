"""A pipeline without its own progress bar, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Without the pipeline's own progress bar inside the block; a bare denoiser has none."""
    if not hasattr(pipe, "set_progress_bar_config"):
        yield
        return
    had = pipe.__dict__.get("_progress_bar_config")
    pipe.set_progress_bar_config(**{**(had or {}), "disable": True})
    try:
        yield
    finally:
        if had is None:
            pipe.__dict__.pop("_progress_bar_config", None)
        else:
            pipe._progress_bar_config = had

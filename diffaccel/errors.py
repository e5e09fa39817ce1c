"""The exceptions of diffaccel. Each names the wrong value and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DiffAccelError(Exception):
    """Base class: anything diffaccel refuses to do. The command line turns it into exit code 2."""


class PlanError(DiffAccelError, ValueError):
    """A plan that is malformed, does not fit this model, or conflicts with itself. Raised before anything changes."""


class ModelError(DiffAccelError, ValueError):
    """A model argument that cannot be loaded or holds no denoiser."""


class InputError(DiffAccelError, ValueError):
    """A prompt, image, setting of the call or output path that cannot be used. Raised before anything is written."""


class MissingPackageError(DiffAccelError, ImportError):
    """An optional package that the asked-for feature needs. The message holds the pip command."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'cache'?"`` for the closest of ``known``, or the list of all when none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"

"""Candidates that failed ``diffaccel selftest`` on this machine; `_candidates.choose` leaves them out.

Kept in ``disabled.json`` of the cache folder by device and versions: after an update they get another chance. One that
fails with a dtype is left out with that dtype only.
"""

import json
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch

from diffaccel.kernels import _store

_FORMAT = 2
# Which candidates failed: operator -> "candidate dtype", such as "triton float16" -> reason.
Disabled = dict[str, dict[str, str]]


def disabled_file() -> Path:
    """Where failures are kept."""
    return _store.folder() / "disabled.json"


def disabled(device_name: str, cuda: bool) -> Disabled:
    """What failed on the device of that name with the versions that run now."""
    try:
        path = disabled_file()
        stamp = path.stat().st_mtime_ns
    except (OSError, RuntimeError):
        return {}
    machines = _read(path, stamp)
    return machines.get(_machine(device_name, cuda), {}) if machines else {}


def every_machine() -> dict[str, Disabled]:
    """What failed, by device and versions in words; of this machine and of others that share the folder."""
    path = disabled_file()
    return (_read(path, path.stat().st_mtime_ns) or {}) if path.exists() else {}


def failure(failed: Mapping[str, str], candidate: str, dtype: torch.dtype | str | None) -> str | None:
    """Why ``candidate`` failed with ``dtype`` (None: with any), by one operator's failures; None if it did not."""
    if dtype is not None:
        return failed.get(_with(candidate, dtype))
    return next((reason for name, reason in failed.items() if name.split()[0] == candidate), None)


def disable(device_name: str, cuda: bool, operator: str, candidate: str, dtype: torch.dtype | str, reason: str) -> None:
    """Remember a failure. Raises ``OSError`` where the cache folder is not writable."""
    here = disabled(device_name, cuda)
    _write(device_name, cuda, {**here, operator: {**here.get(operator, {}), _with(candidate, dtype): reason}})


def enable(device_name: str, cuda: bool, operator: str, candidate: str, dtype: torch.dtype | str) -> None:
    """Forget a failure, after the candidate has passed. Raises ``OSError``."""
    here, passed = disabled(device_name, cuda), _with(candidate, dtype)
    if passed in here.get(operator, {}):
        rest = {name: reason for name, reason in here[operator].items() if name != passed}
        _write(device_name, cuda, {**here, operator: rest})


def _with(candidate: str, dtype: torch.dtype | str) -> str:
    return f"{candidate} {str(dtype).removeprefix('torch.')}"


def _machine(device_name: str, cuda: bool) -> str:
    return f"{device_name}, {_store.versions(cuda)}"


def _write(device_name: str, cuda: bool, here: Disabled) -> None:
    path = disabled_file()
    machines = {
        **every_machine(),
        _machine(device_name, cuda): {name: failed for name, failed in here.items() if failed},
    }
    _store.write(path, {"format": _FORMAT, "machines": {name: here for name, here in machines.items() if here}})


@lru_cache(maxsize=4)
def _read(path: Path, stamp: int) -> dict[str, Disabled] | None:
    """Every machine's failures; None, and a warning, if the file is damaged. ``stamp``: when it was written."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["format"] != _FORMAT:
            raise ValueError(f"format {stored['format']!r}, expected {_FORMAT}")
        return {
            str(machine): {
                str(operator): {str(candidate): str(reason) for candidate, reason in failed.items()}
                for operator, failed in here.items()
            }
            for machine, here in stored["machines"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"{path} cannot be read ({type(error).__name__}: {error}) and is ignored: kernels that failed a self-test "
            "here are used again. Run `diffaccel selftest`, which writes it anew.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None

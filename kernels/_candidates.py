"""Which implementation of an operator runs here: checked and timed on first use, then remembered.

An operator names its candidates and builds, on demand, a `Trial`: fresh random data at the shape in question, one
callable per candidate and a function that measures the error of a result. `choose` drops the wrong ones, times the rest
in turn and takes the fastest. The answer is kept for the process and in ``kernels.json`` of the cache folder
(`_store`). Candidates that failed ``diffaccel selftest`` here are left out.
``DIFFACCEL_KERNELS="operator=candidate;..."`` decides by hand.
"""

import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffaccel.kernels import _store
from diffaccel.kernels._disabled import disabled, failure

BASELINE = "baseline"
# A candidate earlier in the list wins over one that is faster by less than this.
MARGIN = 0.05
# Where a median exceeds the fastest run by this factor, somebody else is using the machine: the choice holds for this
# process but is not written to disk.
_NOISY = 1.5
_FORMAT = 1


@dataclass(frozen=True)
class Trial:
    """What `choose` needs to judge the candidates of one operator at one shape.

    runs: candidate name -> the operator on the trial's data. error: result -> relative error against the reference.
    tolerance: candidate name -> the largest error allowed. baseline: what the operator replaces; timed, never chosen.
    """

    runs: dict[str, Callable[[], Tensor]]
    error: Callable[[Tensor], float]
    tolerance: dict[str, float]
    baseline: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class Choice:
    """What runs for an operator at a shape class, and why.

    seconds: fastest run per candidate and of the baseline. error: relative error per candidate, inf if it raised.
    source: "measured" in this process, "cache" (disk), "override" (environment) or "default" (measuring not allowed).
    """

    operator: str
    shape: str
    device: str
    name: str
    seconds: dict[str, float] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    source: str = "measured"

    @property
    def speedup(self) -> float | None:
        """Time of the baseline over the time of what runs; None where either was not timed."""
        if BASELINE not in self.seconds or self.name not in self.seconds:
            return None
        return self.seconds[BASELINE] / self.seconds[self.name]


_choices: dict[tuple, Choice] = {}
_warned: set[tuple[str, ...]] = set()


def choose(
    operator: str,
    shape: Sequence[object],
    device: torch.device,
    names: Sequence[str],
    trial: Callable[[], Trial],
    default: str,
    budget: float = 0.05,
) -> str:
    """Name of the candidate to run for ``operator`` at ``shape`` on ``device``.

    Args:
        shape: The shape class: sizes (tokens as `token_bucket`), the activations' dtype, what else changes the answer.
        names: The candidates that exist here, preferred first among equals.
        trial: Builds the data and callables; called only if nothing is known about this shape.
        default: Taken, and not remembered, where timing is not allowed (see `may_measure`) and nothing is known.
        budget: Seconds of timing over all candidates; each is timed at least four times.
    """
    key = (operator, *shape, device, *names, torch.get_num_threads(), os.environ.get("DIFFACCEL_KERNELS", ""))
    if (known := _choices.get(key)) is not None and (known.source != "default" or not may_measure(device)):
        return known.name
    choice = _decide(operator, shape, device, names, trial, default, budget)
    _choices[key] = choice
    return choice.name


def choices(operator: str | None = None) -> list[Choice]:
    """Every choice of this process, for the report."""
    return [c for c in _choices.values() if operator in (None, c.operator)]


def remembered() -> list[Choice]:
    """Every choice on disk, for whatever device, thread count and versions it was made."""
    found = []
    for key, stored in _read_cache().items():
        with suppress(KeyError, TypeError, ValueError):
            operator, shape, device, *_ = key.split("|")
            kept = stored["name"], dict(stored["seconds"]), dict(stored["error"])  # type: ignore[index]
            found.append(Choice(operator, shape, device, *kept, "cache"))
    return found


def forget() -> None:
    """Drop the choices of this process (not those on disk)."""
    _choices.clear()
    _warned.clear()


def may_measure(device: torch.device) -> bool:
    """False where nothing real runs: while compiling, under fake tensors, on meta, during CUDA graph capture."""
    if torch.compiler.is_compiling() or device.type == "meta":
        return False
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        return False
    return not (device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


@lru_cache(maxsize=16)
def has_triton(device: torch.device, capability: tuple[int, int]) -> bool:
    """Whether Triton kernels that need this compute capability run on ``device``."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= capability


def token_bucket(tokens: int, cap: int = 4096) -> int:
    """``tokens`` rounded up to a power of two, at most ``cap``: beyond, the ranking of candidates no longer changes."""
    return min(1 << max(tokens - 1, 0).bit_length(), cap)


def override(operator: str) -> str | None:
    """The candidate that ``DIFFACCEL_KERNELS`` asks for. Raises ``ValueError`` on a malformed value."""
    for item in filter(None, (part.strip() for part in os.environ.get("DIFFACCEL_KERNELS", "").split(";"))):
        name, sign, candidate = item.partition("=")
        if not sign or not name.strip() or not candidate.strip():
            raise ValueError(f"DIFFACCEL_KERNELS: expected 'operator=candidate;...', got {item!r}")
        if name.strip() == operator:
            return candidate.strip()
    return None


def worst_row_error(result: Tensor, reference: Tensor) -> float:
    """Largest ||result - reference|| / ||reference|| over rows [..., N], in float64; a row of zeros must be reproduced.

    By row, because saturation ruins single rows, which an average over the tensor hides. NaN counts as infinite.
    """
    result, reference = result.double(), reference.double()
    error = (result - reference).norm(dim=-1) / reference.norm(dim=-1).clamp(min=1e-30)
    return float(error.nan_to_num(nan=float("inf")).max())


def warn_once(*message: str) -> None:
    """One warning per process for each text."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(" ".join(message), RuntimeWarning, stacklevel=3)


def device_name(device: torch.device) -> str:
    """What the choice depends on, in words: processor, instruction set and its limits, threads; or the GPU."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (cuda {torch.version.cuda})"
    return device.type if device.type != "cpu" else f"{_cpu_name()}, {torch.get_num_threads()} threads"


@lru_cache(maxsize=1)
def _cpu_name() -> str:
    model, flags = platform.processor() or platform.machine(), set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                model = value.strip()
            elif name.strip() == "flags":
                flags = set(value.split()) & {"avx_vnni", "avx512_vnni", "amx_int8", "amx_bf16", "avx512_bf16"}
            if model and flags:
                break
    except OSError:
        pass
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA")
    parts = [model, torch.backends.cpu.get_cpu_capability(), *sorted(flags), *([f"oneDNN <= {limit}"] if limit else [])]
    return " ".join(parts)


def _decide(
    operator: str,
    shape: Sequence[object],
    device: torch.device,
    names: Sequence[str],
    trial: Callable[[], Trial],
    default: str,
    budget: float,
) -> Choice:
    where = (operator, " ".join(map(str, shape)), device_name(device))
    asked = override(operator)
    if asked is not None and asked in names:
        return Choice(*where, asked, source="override")
    if asked is not None:
        warn_once(
            f"DIFFACCEL_KERNELS asks for {operator}={asked}, which does not exist here ({', '.join(names)} do);",
            "the fastest of those is used.",
        )
    names = _allowed(operator, shape, names, default, device)
    if not may_measure(device):
        return Choice(*where, default if default in names else names[0], source="default")
    cache_key = "|".join([*where, ",".join(names), _store.versions(device.type == "cuda")])
    stored = _read_cache().get(cache_key)
    if isinstance(stored, dict) and stored.get("name") in names:
        try:
            return Choice(*where, stored["name"], dict(stored["seconds"]), dict(stored["error"]), "cache")
        except (KeyError, TypeError, ValueError):
            pass
    with torch.no_grad():
        measured, quiet = _measure(operator, names, trial(), device, budget)
    choice = Choice(*where, **measured)
    if quiet:
        _write_cache(cache_key, choice)
    return choice


def _allowed(
    operator: str, shape: Sequence[object], names: Sequence[str], default: str, device: torch.device
) -> list[str]:
    """``names`` without those that failed the self-test on ``device`` with this dtype; one warning for each."""
    failed = disabled(device_name(device), device.type == "cuda").get(operator, {})
    dtype = next((part for part in shape if isinstance(part, torch.dtype)), None)
    reasons = {name: reason for name in names if (reason := failure(failed, name, dtype)) is not None}
    for name, reason in reasons.items():
        warn_once(
            f"{operator}: candidate {name} failed `diffaccel selftest` on {device_name(device)} and is not used",
            f"({reason}). After an update of the driver, torch, triton or diffaccel it is tried again; run "
            "`diffaccel selftest` then.",
        )
    return [name for name in names if name not in reasons] or [default]


def _measure(
    operator: str, names: Sequence[str], trial: Trial, device: torch.device, budget: float
) -> tuple[dict[str, Any], bool]:
    """Check every candidate, time the correct ones and the baseline -> fields of `Choice`, was the machine quiet."""
    error: dict[str, float] = {}
    for name in names:
        try:
            error[name] = trial.error(trial.runs[name]())
        except Exception as reason:  # a compiler raises anything; a candidate that fails is one fewer
            error[name] = float("inf")
            why = f"{type(reason).__name__}: {reason}"
            warn_once(f"{operator}: candidate {name} failed on {device_name(device)} and is not used: {why}")
            continue
        if error[name] > trial.tolerance[name]:
            warn_once(
                f"{operator}: candidate {name} is wrong on {device_name(device)} and is not used",
                f"(relative error {error[name]:.2g}, allowed {trial.tolerance[name]:.2g}).",
            )
    runs = {name: trial.runs[name] for name in names if error[name] <= trial.tolerance[name]}
    if not runs:
        raise RuntimeError(f"{operator}: no candidate is correct on {device_name(device)}: {error}")
    if trial.baseline is not None:
        trial.baseline()
        runs[BASELINE] = trial.baseline
    times: list[list[float]] = []  # [round][run]; in turn, so that a busy moment hits all of them
    end = time.perf_counter() + budget
    while len(times) < 4 or (time.perf_counter() < end and len(times) < 25):
        times.append([seconds_of(run, device) for run in runs.values()])
    # The fastest run, because interference only adds: on two shared cores medians of the same kernel differed by 10x.
    columns = dict(zip(runs, zip(*times, strict=True), strict=True))
    seconds = {name: min(column) for name, column in columns.items()}
    quiet = all(statistics.median(column) < _NOISY * min(column) for column in columns.values())
    candidates = [name for name in seconds if name != BASELINE]
    limit = min(seconds[name] for name in candidates) * (1 + MARGIN)
    return {"name": next(n for n in candidates if seconds[n] <= limit), "seconds": seconds, "error": error}, quiet


def seconds_of(run: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of one call; on CUDA until its work there is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def cache_file() -> Path:
    """Where choices are kept between processes."""
    return _store.folder() / "kernels.json"


def _read_cache() -> dict[str, object]:
    """The entries on disk; empty if there are none, or if the file is damaged or of another format."""
    try:
        stored = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: no home directory
        return {}
    if not isinstance(stored, dict) or stored.get("format") != _FORMAT or not isinstance(stored.get("choices"), dict):
        return {}
    return stored["choices"]


def _write_cache(key: str, choice: Choice) -> None:
    """Add one entry; skipped where the folder is not writable."""
    kept = {name: value for name, value in asdict(choice).items() if name in ("name", "seconds", "error")}
    with suppress(OSError, RuntimeError):
        _store.write(cache_file(), {"format": _FORMAT, "choices": {**_read_cache(), key: kept}})

"""Runs the self-test in a process that may crash, and remembers which candidates failed.

The worker, ``python -m diffaccel.kernels.selftest_run``, prints a line of JSON before and after each case. Where it
dies, or hangs, the case that it had begun is at fault, and another worker goes on behind it: an illegal memory access
ends every CUDA process that makes one.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import IO, Any

import torch

from diffaccel.kernels._candidates import device_name
from diffaccel.kernels._disabled import disable, enable
from diffaccel.kernels.selftest import Case, Result, examine

# A case that takes longer hangs: the slowest on paper is attention over 75600 tokens, 0.7 s a run on an RTX 4090.
TIMEOUT = 300.0
WORKER = (sys.executable, "-m", "diffaccel.kernels.selftest_run")
_MARK = "@selftest "


@dataclass(frozen=True)
class Plan:
    """What the worker is about to do: on which device, in words, and the cases, of which results hold the outcome."""

    device: str
    cuda: bool
    cases: tuple[Result, ...]


def run(device: str, pattern: str = "*", begin: Callable[[Plan], None] = lambda plan: None) -> Iterator[Result]:
    """Yield each case's result as it comes; failing candidates are disabled at once, passing ones enabled at the end.

    Args:
        device: ``"cuda"``, ``"cuda:1"`` or ``"cpu"``, where Triton's kernels are interpreted.
        pattern: glob over the cases' names, such as ``"int8_linear triton*"``.
        begin: called once, before the first case.

    Raises:
        RuntimeError: the worker could not start.
    """
    results: list[Result] = []
    plan: Plan | None = None
    while plan is None or len(results) < len(plan.cases):
        done, begun = len(results), False
        with _Worker(device, pattern, skip=done) as worker:
            for message in worker:
                if "cases" in message and plan is None:
                    plan = Plan(message["device"], device.startswith("cuda"), tuple(map(_result, message["cases"])))
                    begin(plan)
                begun = "begin" in message
                if "result" in message:
                    results.append(_result(message["result"]))
                    yield _remember(results[-1], plan)
        if plan is None:
            raise RuntimeError(f"the self-test cannot run on {device}: {worker.last_words()}")
        # A worker that ended between two cases had a reason that lies in the first: its GPU context was gone.
        if len(results) < len(plan.cases) and (begun or len(results) == done):
            fate = "took too long" if worker.hung else "crashed"
            results.append(replace(plan.cases[len(results)], checks={"runs": f"{fate}: {worker.last_words()}"}))
            yield _remember(results[-1], plan)
    if pattern == "*":
        for what in _outcomes(results, failed=False) - _outcomes(results, failed=True):
            _write(enable, plan, *what)


def _remember(result: Result, plan: Plan | None) -> Result:
    """Disable what a failure disables: at once, so that whoever interrupts keeps what was found."""
    assert plan is not None, "a result came before the list of cases"
    for operator, candidate in result.disables if result.failures else ():
        check, reason = next(iter(result.failures.items()))
        _write(disable, plan, operator, candidate, result.dtype, f"{check}: {reason}; {result.shape}")
    return result


def _write(change: Callable[..., None], plan: Plan, *what: str) -> None:
    try:
        change(plan.device, plan.cuda, *what)
    except OSError as error:
        warnings.warn(f"which kernels failed here cannot be remembered: {error}", RuntimeWarning, stacklevel=2)


def _outcomes(results: list[Result], failed: bool) -> set[tuple[str, str, str]]:
    """(operator, candidate, dtype) of what failed, or of what passed."""
    return {(*pair, r.dtype) for r in results if bool(r.failures) == failed and not r.skipped for pair in r.disables}


def _result(fields: dict[str, Any]) -> Result:
    return Result(**{**fields, "disables": tuple(tuple(pair) for pair in fields["disables"])})


class _Worker:
    """The process; iterating yields its messages until it ends, or until it has been silent for too long."""

    def __init__(self, device: str, pattern: str, skip: int) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        if device == "cpu":
            environment["TRITON_INTERPRET"] = "1"
        self.hung = False
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115, closed below
        self._process = subprocess.Popen(
            [*WORKER, "--device", device, "--cases", pattern, "--skip", str(skip)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        assert self._process.stdout is not None
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            try:
                line = self._lines.get(timeout=TIMEOUT)
            except queue.Empty:
                self.hung = True
                return
            if line is None:
                self._process.wait()
                return
            if line.startswith(_MARK):
                yield json.loads(line.removeprefix(_MARK))

    def last_words(self) -> str:
        """The last line on stderr, or the exit code."""
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        return lines[-1][:300] if lines else f"exit code {self._process.returncode}"

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._lines.put(line)
        self._lines.put(None)


def work(device: torch.device, cases: list[Case], skip: int) -> None:
    """Announce ``cases`` and run all but the first ``skip``."""
    plan = [asdict(case.result()) for case in cases]
    _say({"device": device_name(device), "cases": plan})
    for case in cases[skip:]:
        _say({"begin": case.name})
        _say({"result": asdict(examine(case, device))})
        if device.type == "cuda":
            torch.cuda.synchronize()  # raises, and ends the worker, where the case broke the GPU's context
            torch.cuda.empty_cache()


def _say(message: dict[str, Any]) -> None:
    print(_MARK + json.dumps(message), flush=True)


def main() -> None:
    """The worker."""
    parser = argparse.ArgumentParser(prog="python -m diffaccel.kernels.selftest_run", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cases", default="*", help="glob over the cases' names")
    parser.add_argument("--skip", type=int, default=0, help="so many cases were done before")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    from diffaccel.kernels.selftest_cases import cases

    work(device, [case for case in cases(device) if fnmatchcase(case.name, arguments.cases)], arguments.skip)


if __name__ == "__main__":
    main()

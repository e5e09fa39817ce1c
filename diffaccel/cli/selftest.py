"""``diffaccel selftest``: whether the kernels are right on this machine, and how fast."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffaccel.cli.console import err, note, out, quiet_libraries
from diffaccel.errors import InputError

if TYPE_CHECKING:
    from diffaccel.kernels.selftest import Result
    from diffaccel.kernels.selftest_run import Plan

EXAMPLES = """
[bold]Examples[/]

diffaccel selftest

diffaccel selftest --device cuda:1 --json selftest.json

diffaccel selftest --cases "int8_linear triton*"
"""


def selftest(
    device: Annotated[
        str | None, typer.Option(help="cuda, cuda:1, ... or cpu; default: CUDA where there is one.")
    ] = None,
    cases: Annotated[str, typer.Option(help="Glob over 'operator candidate dtype shape'.")] = "*",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every result to this file.")] = None,
) -> None:
    """Run every kernel at the shapes of real models: against float64, twice, compiled, captured in a CUDA graph, timed.

    A kernel that fails is not used on this machine until it has passed there, and the exit code is 1. On the CPU the
    library's kernels run at smaller shapes, and those for the GPU in Triton's interpreter, which takes minutes.
    """
    quiet_libraries()
    import torch

    from diffaccel.kernels.selftest_run import run

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.partition(":")[0] not in ("cuda", "cpu"):
        raise InputError(f"--device must be cpu, cuda or cuda:<number>, got {device!r}")
    plans: list[Plan] = []
    results: list[Result] = []
    try:
        for result in run(device, cases, plans.append):
            results.append(result)
            out.print(_line(result, f"{len(results):>3}/{len(plans[0].cases)}"), soft_wrap=True)
    except RuntimeError as error:
        raise InputError(str(error)) from error
    except KeyboardInterrupt:
        note(f"{len(results)} cases ran; failures among them are remembered")
        raise
    if not plans or not results:
        raise InputError(f"no case matches {cases!r}; --cases '*' runs all, and their names can be seen there")
    failed = [result for result in results if result.failures]
    out.print()
    out.print(_block(plans[0].device, results, failed), soft_wrap=True, highlight=False, markup=False)
    if json_file is not None:
        _write(json_file, plans[0].device, results)
    if failed:
        raise typer.Exit(1)


def _line(result: Result, count: str) -> str:
    """One case: what it was, how exact, how fast."""
    name = f"{result.operator:<23}{result.candidate:<10}{result.dtype:<9}{result.shape:<52}"
    if result.skipped:
        return f"[dim]{count} skipped {name} {result.skipped}[/]"
    if result.failures:
        return f"[bold red]{count} FAILED[/]  {name} {_reasons(result)}"
    parts = [f"error {result.error:.1e} of {result.tolerance:.1e}"]
    if result.seconds is not None:
        parts.append(f"{result.seconds * 1e3:.3f} ms")
    if result.seconds is not None and result.dense_seconds is not None:
        parts.append(f"{result.dense_seconds / result.seconds:.2f}x dense")
    if result.peak_bytes is not None:
        parts.append(f"{result.peak_bytes / 2**20:.0f} MiB")
    return f"{count} [green]fine[/]    {name} {', '.join(parts)}"


def _reasons(result: Result) -> str:
    return "; ".join(f"{check}: {reason}" for check, reason in result.failures.items())


def _block(device: str, results: list[Result], failed: list[Result]) -> str:
    """What a user pastes into an issue."""
    skipped = sum(bool(result.skipped) for result in results)
    lines = [
        f"diffaccel selftest: {len(results)} cases, {len(failed)} failed, {skipped} skipped",
        f"on {device}",
        ", ".join(f"{name} {version}" for name, version in _versions().items()),
    ]
    for r in failed:
        lines.append(f"failed: {r.operator} {r.candidate} {r.dtype} {r.shape}: {_reasons(r)}")
    disabled = sorted({f"{operator} {candidate} {r.dtype}" for r in failed for operator, candidate in r.disables})
    if disabled:
        lines.append(f"not used here until `diffaccel selftest` passes: {', '.join(disabled)}")
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    from diffaccel.cli.machine import describe_machine

    facts = describe_machine()
    kept = {name: facts["versions"][name] for name in ("diffaccel", "torch", "python", "system")}
    return kept | {"triton": facts["optional packages"]["triton"]}


def _write(file: Path, device: str, results: list[Result]) -> None:
    data: dict[str, Any] = {"device": device, "versions": _versions(), "cases": [asdict(result) for result in results]}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {str(file)!r}: {error.strerror or error}") from None
    err.print(f"wrote {file}", style="dim", soft_wrap=True)

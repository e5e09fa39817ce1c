"""``diffaccel doctor``: what this machine has, and what that means for diffaccel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffaccel.cli.arguments import Json
from diffaccel.cli.console import err, out, print_json, quiet_libraries
from diffaccel.errors import MissingPackageError

if TYPE_CHECKING:
    from diffaccel.kernels.ahead_of_time import Row

EXAMPLES = """
[bold]Examples[/]

diffaccel doctor

diffaccel doctor --json > machine.json

diffaccel doctor --kernels
"""


def doctor(
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="Compile the GPU kernels, for the GPUs here or, without one, for all known."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show versions, processor, GPUs, compiler, optional packages and caches. Paste its output into bug reports.

    With --kernels instead: what the GPU's compiler makes of every kernel (this needs no GPU, but minutes the first
    time); which implementations were chosen on this machine so far; and which failed the self-test.
    """
    quiet_libraries()
    if kernels:
        _kernels(as_json)
        return
    from diffaccel.cli.machine import describe_machine

    facts = describe_machine()
    if as_json:
        print_json(facts)
        return
    from rich.table import Table

    for section, content in facts.items():
        table = Table(
            title=section, title_justify="left", show_header=False, box=None, title_style="bold", padding=(0, 2, 0, 0)
        )
        for name, value in content.items():
            table.add_row(name, _text(value))
        out.print(table)
        out.print()


def _kernels(as_json: bool) -> None:
    from dataclasses import asdict
    from importlib.util import find_spec

    from diffaccel.kernels._candidates import remembered
    from diffaccel.kernels._disabled import every_machine
    from diffaccel.kernels.ahead_of_time import report

    if find_spec("triton") is None:
        raise MissingPackageError("the GPU kernels are written in Triton: pip install triton")
    with err.status("compiling the kernels"):
        rows = report(targets=_targets())
    chosen = remembered()
    failed = every_machine()
    if as_json:
        print_json({"compiled": [asdict(row) for row in rows], "chosen": [asdict(c) for c in chosen], "failed": failed})
        return
    out.print(_compiled(rows))
    wrong = sum(bool(row.problems) for row in rows)
    out.print(f"{len(rows)} kernels compiled, {wrong or 'none'} with a problem\n")
    for choice in chosen:
        speed = f", {choice.speedup:.2f}x dense" if choice.speedup else ""
        out.print(f"{choice.operator} {choice.shape} on {choice.device}: {choice.name}{speed}", soft_wrap=True)
    for machine, operators in failed.items():
        for operator, candidates in operators.items():
            for candidate, reason in candidates.items():
                out.print(f"not used on {machine}: {operator} {candidate}, {reason}", style="red", soft_wrap=True)


def _targets() -> list[int]:
    """Compute capabilities of the GPUs here, as far as they are known; without any, all."""
    import torch

    from diffaccel.kernels.ahead_of_time import SHARED_KIB

    here = {
        10 * major + minor for major, minor in map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    }
    return sorted(here & set(SHARED_KIB)) or list(SHARED_KIB)


def _compiled(rows: list[Row]) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("kernel", "chip", "registers", "shared KiB", "tensor cores", "verdict"):
        table.add_column(name, justify="right" if name in ("registers", "shared KiB") else "left")
    for row in rows:
        figures = (f"sm_{row.target}", str(row.registers), f"{row.shared / 1024:.0f}", " ".join(row.multiply))
        table.add_row(row.specimen, *figures, row.verdict, style="bold red" if row.problems else None)
    return table


def _text(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)

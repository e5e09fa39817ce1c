"""``diffaccel doctor``: what this machine has, and what that means for diffaccel."""

from __future__ import annotations

from diffaccel.cli.arguments import Json
from diffaccel.cli.console import out, print_json, quiet_libraries

EXAMPLES = """
[bold]Examples[/]

diffaccel doctor

diffaccel doctor --json > machine.json
"""


def doctor(as_json: Json = False) -> None:
    """Show versions, processor, GPUs, compiler, optional packages and caches. Paste its output into bug reports."""
    quiet_libraries()
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


def _text(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)

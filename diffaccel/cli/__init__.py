"""The command line, ``diffaccel``. Commands import torch only when they run, so that ``--help`` is quick."""

from __future__ import annotations

import sys

import typer

from diffaccel.cli import bench, compare, distill, doctor, evaluate, generate, inspect, prune, selftest, tune
from diffaccel.cli.console import fail
from diffaccel.errors import DiffAccelError

app = typer.Typer(
    name="diffaccel",
    help="Make diffusers pipelines faster and smaller, and measure what that costs in quality.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate", epilog=generate.EXAMPLES)(generate.generate)
app.command("tune", epilog=tune.EXAMPLES)(tune.tune)
app.command("compare", epilog=compare.EXAMPLES)(compare.compare)
app.command("eval", epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command("prune", epilog=prune.EXAMPLES)(prune.prune)
app.command("distill", epilog=distill.EXAMPLES)(distill.distill)
app.command("inspect", epilog=inspect.EXAMPLES)(inspect.inspect)
app.add_typer(bench.app, name="bench")
app.command("doctor", epilog=doctor.EXAMPLES)(doctor.doctor)
app.command("selftest", epilog=selftest.EXAMPLES)(selftest.selftest)


def main() -> None:
    """Run the command line. What diffaccel refuses becomes one red line and exit code 2; Ctrl-C exit code 130."""
    try:
        app()
    except DiffAccelError as error:
        fail(str(error))
        sys.exit(2)
    except SystemExit as stopped:  # typer's answer to Ctrl-C is 130 and no word
        if stopped.code == 130:
            fail("interrupted; what was finished is kept, and a command that writes outputs goes on from there")
        raise

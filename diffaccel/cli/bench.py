"""``diffaccel bench``: how fast this machine's kernels are at sizes of your choice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from diffaccel.cli.arguments import Device, Dtype, Json
from diffaccel.cli.console import print_json, quiet_libraries
from diffaccel.errors import InputError

if TYPE_CHECKING:
    from diffaccel.kernels.attention_bench import Setting

EXAMPLES = """
[bold]Examples[/]

diffaccel bench attention

diffaccel bench attention --tokens 4096,16384 --densities 0.25,0.125

diffaccel bench attention --tokens 75600 --heads 40 --head-size 128 --device cuda
"""

app = typer.Typer(help="Time kernels on this machine beside the libraries' own.", no_args_is_help=True)


@app.command("attention", epilog=EXAMPLES)
def attention(
    tokens: Annotated[str, typer.Option(help="Lengths, separated by commas.")] = "1024,4096",
    densities: Annotated[str, typer.Option(help="Kept shares of blocks, separated by commas.")] = "0.5,0.25,0.125",
    heads: Annotated[int, typer.Option(min=1)] = 8,
    head_size: Annotated[int, typer.Option(min=1)] = 64,
    block_size: Annotated[int, typer.Option(min=16, help="Tokens in a block.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Calls of each way, in turn; medians are printed.")] = 9,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Block-sparse beside dense attention, with the bound: random blocks and a random order for each head."""
    lengths = _numbers("--tokens", tokens, 1, 2**24)
    shares = _numbers("--densities", densities, 0, 1)
    quiet_libraries()
    import torch

    from diffaccel.kernels.attention_bench import Setting, measure

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = getattr(torch, dtype or ("bfloat16" if device.startswith("cuda") else "float32"), None)
    if kind not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"--dtype must be float32, bfloat16 or float16, got {dtype!r}")
    setting = Setting(
        tokens=[int(n) for n in lengths],
        densities=shares,
        heads=heads,
        head_size=head_size,
        block_size=block_size,
        dtype=kind,
        device=device,
        repeats=repeats,
    )
    if as_json:
        print_json([{**vars(row), "gain": row.gain, "share_of_bound": row.share} for row in measure(setting)])
        return
    for line in table(setting):
        print(line, flush=True)


def table(setting: Setting) -> Iterator[str]:
    """The measurement as lines of markdown, each as soon as it is known."""
    import torch

    from diffaccel.kernels.attention_bench import measure

    order = "a random order for each head" if setting.reorder else "tokens in their own order"
    yield (
        f"torch {torch.__version__}, {setting.device}, {torch.get_num_threads()} threads, {setting.dtype}, "
        f"batch {setting.batch}, {setting.heads} heads of {setting.head_size}, blocks of {setting.block_size}, "
        f"{setting.pattern} masks, {order}; median {'CPU ' if setting.cpu_time else ''}time of {setting.repeats} "
        "calls\n"
    )
    yield "| tokens | density | way | dense ms | ms | gain | share of the bound | error |"
    yield "|--:|--:|---|--:|--:|--:|--:|--:|"
    for row in measure(setting):
        yield (
            f"| {row.tokens} | {row.density:.3f} | {row.way} | {row.dense_ms:.1f} | {row.ms:.1f} | {row.gain:.2f}x "
            f"| {row.share:.0%} | {row.error:.1e} |"
        )


def _numbers(option: str, text: str, low: float, high: float) -> list[float]:
    """Raises InputError on anything but numbers in (low, high], or from 1 on."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(low < n <= high or n == low == 1 for n in numbers):
        raise InputError(f"{option} must be numbers above {low:g} up to {high:g}, separated by commas, got {text!r}")
    return numbers

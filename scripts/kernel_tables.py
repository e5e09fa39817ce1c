"""Writes docs/kernels.md: what the GPU's compiler makes of every kernel, and what the kernels could gain on paper.

Needs Triton and no GPU; minutes. ``--roofline`` leaves the first table as it is, ``--rows`` takes what was compiled by
``python -m diffaccel.kernels.ahead_of_time --json FILE``.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path

from diffaccel.kernels import roofline
from diffaccel.kernels.ahead_of_time import SHARED_KIB, Row, read_rows, report

PAGE = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"
_HEADING = "## Compiled ahead of time"
_INTRODUCTION = f"""# The GPU kernels, without a GPU

Written by `python scripts/kernel_tables.py`. Nothing on this page was measured on a GPU: `diffaccel selftest` does that
on yours.

{_HEADING}

Registers per thread · KiB of shared memory per block · tensor-core instructions found. *Older*: not the instruction
made for the chip, but one that still runs there. `diffaccel doctor --kernels` prints the same; CI compiles a sixth of
the table and fails where it has become worse.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--roofline", action="store_true", help="leave the table of compiled kernels as it is")
    parser.add_argument("--rows", type=Path, nargs="+", help="files with the rows, instead of compiling")
    arguments = parser.parse_args()
    if arguments.roofline:
        compiled = compiled_part()
    else:
        rows = [row for file in arguments.rows for row in read_rows(file)] if arguments.rows else report()
        compiled = "\n".join(compiled_table(rows))
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join([_INTRODUCTION, compiled, "", *roofline_tables()]) + "\n", encoding="utf-8")


def compiled_table(rows: Iterable[Row]) -> list[str]:
    """One line a specimen, one column a compute capability."""
    cells: dict[str, dict[int, str]] = {}
    for row in rows:
        cells.setdefault(row.specimen, {})[row.target] = cell(row)
    head = ["| kernel |" + "".join(f" sm_{target} |" for target in SHARED_KIB), "|---|" + "---|" * len(SHARED_KIB)]
    lines = (f"| {name} |" + "".join(f" {of.get(target, '')} |" for target in SHARED_KIB) for name, of in cells.items())
    return [*head, *lines]


def cell(row: Row) -> str:
    """A row in short; what is wrong comes first."""
    if row.problems:
        return f"**{row.verdict}**"
    instructions = " ".join(row.multiply) + (" (older)" if row.older else "")
    return " · ".join(filter(None, [str(row.registers), f"{row.shared / 1024:.0f} K", instructions]))


def committed() -> dict[tuple[str, int], str]:
    """(specimen, target) -> cell, of the committed page."""
    found = {}
    for line in compiled_part().splitlines()[2:]:
        name, *cells = (text.strip() for text in line.strip("|").split("|"))
        found |= {(name, target): text for target, text in zip(SHARED_KIB, cells, strict=True) if text}
    return found


def compiled_part() -> str:
    """The table of compiled kernels on the committed page."""
    page = PAGE.read_text(encoding="utf-8").split(_HEADING)[1]
    found = re.search(r"^\|.*?(?=\n\n)", page, re.DOTALL | re.MULTILINE)
    assert found is not None, f"{PAGE} has no table"
    return found.group()


def roofline_tables() -> list[str]:
    """Linear layers and attention on each GPU."""
    gpus = roofline.GPUS
    peaks = [
        f"| {g.name} | {_tera(g.bf16)} | {_tera(g.int8)} | {_tera(g.fp8)} | {g.bandwidth / 1e9:.0f} | {g.source} |"
        for g in gpus
    ]
    return [
        "## Roofline",
        "",
        "A bound, not a forecast: the time is at least max(operations / peak, bytes / bandwidth), every tensor counted",
        "once. The gain is the ratio of two such bounds. 8-bit layers include the kernel that quantises the input,",
        "which a normalisation before it can do in passing. What is faster on a card is measured there, at first use.",
        "",
        "| GPU | bf16, TFLOPS | int8, TOPS | fp8, TFLOPS | GB/s | source |",
        "|---|--:|--:|--:|--:|---|",
        *peaks,
        "",
        "Dense rates with sums in float32 or int32.",
        "",
        "### Linear layers, batch 1",
        "",
        *_linear_table(gpus),
        "",
        "### Self-attention in bf16, gain at densities " + ", ".join(map(str, roofline.DENSITIES)),
        "",
        "Dense attention over sparse attention with its tokens reordered and put back.",
        "",
        *_attention_table(gpus),
    ]


def _linear_table(gpus: Iterable[roofline.Gpu]) -> list[str]:
    lines = [
        "| model | layers | M, N, K | GPU | bf16 | int8 | fp8 | W4A8 | W4A16 | |",
        "|---|---|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for shape in roofline.LINEARS:
        for gpu in gpus:
            seconds = roofline.linear_seconds(shape, gpu, "bf16")
            assert seconds is not None
            gains = (_gain(roofline.linear_gain(shape, gpu, form)) for form in ("int8", "fp8", "w4a8", "w4a16"))
            start = f"| {shape.model} | {shape.where} | {shape.M}, {shape.N}, {shape.K} | {gpu.name} "
            lines.append(f"{start}| {_time(seconds)} | {' | '.join(gains)} | {roofline.linear_remark(shape, gpu)} |")
    return lines


def _attention_table(gpus: Iterable[roofline.Gpu]) -> list[str]:
    lines = ["| model | attention | H, N, D | GPU | dense | gain | |", "|---|---|---|---|--:|---|---|"]
    for shape in roofline.ATTENTIONS:
        for gpu in gpus:
            gains = ", ".join(_gain(roofline.attention_gain(shape, gpu, d)) for d in roofline.DENSITIES)
            start = f"| {shape.model} | {shape.where} | {shape.heads}, {shape.tokens}, {shape.size} | {gpu.name} "
            dense = _time(roofline.attention_seconds(shape, gpu))
            lines.append(f"{start}| {dense} | {gains} | {roofline.attention_remark(shape, gpu)} |")
    return lines


def _tera(rate: float | None) -> str:
    return "none" if rate is None else f"{rate / 1e12:.0f}"


def _gain(gain: float | None) -> str:
    return "none" if gain is None else f"{gain:.2f}x"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds > 1e-4 else f"{seconds * 1e6:.0f} us"


if __name__ == "__main__":
    main()

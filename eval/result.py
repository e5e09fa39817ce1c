"""The outcome of a comparison as data, as JSON and as a table."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from diffaccel.eval.measures import FIDELITY, Score
from diffaccel.eval.metrics.psnr import PSNR_CAP
from diffaccel.eval.sets import SETS, SetScore
from diffaccel.eval.store import Store
from diffaccel.eval.timing import Ratio, Spread

_COLUMNS = ("steps", "loop\ns", "speed-up\n95 % interval", "PSNR dB\nmean / worst", "SSIM", "peak\nMiB", "model\nMiB")


@dataclass(frozen=True)
class Flops:
    """Operations that one call executed, a product of k terms counting 2 k, see `diffaccel.eval.flops`.

    Attributes:
        total: of the whole call.
        denoiser: of the denoisers in it.
        by_operator: of ``total``.
    """

    total: int
    denoiser: int
    by_operator: Mapping[str, int]


@dataclass(frozen=True)
class Row:
    """One way to run the pipeline, over all prompts and seeds.

    Attributes:
        name: the plan's name, ``reference``, or ``12 steps``.
        kind: ``reference``, ``plan``, ``peer`` (somebody else's acceleration), ``control`` (fewer steps, nothing else)
            or ``noise floor``.
        steps: ``num_inference_steps`` of its calls; None where the pipeline takes none.
        control_of: for a control, the plans whose cost it meets most nearly.
        loop_seconds: median over the items of the seconds in the denoising loop; None where a program of its own
            does not tell.
        call_seconds: likewise of the whole call.
        speedup: of the denoising loop against the reference timed in the same turns, with a 95 % interval. Ratios, not
            seconds, are comparable between rows: a control that joined late has the reference run beside it again.
        scores: by measure; fidelities (``psnr``, ``ssim``) are missing from the reference itself. Identical samples
            count as `PSNR_CAP` dB.
        sets: by measure of the whole row, such as ``fid``.
        identical: samples equal to the reference to the bit.
        peak_bytes: largest over the calls. On the CPU the resident set of the whole process, earlier rows' leftovers
            included, so a later row never shows less than it needs. None where a program of its own does
            not tell, as ``model_bytes``.
        model_bytes: of the denoisers' weights as they are while this row runs.
        attach_seconds: median seconds to put the acceleration on.
        notes: what a reader must know, such as fallbacks.
        stages: seconds of ``text`` (what runs before the loop), ``loop``, ``step``, ``decode`` and the whole ``call``.
        flops: operations of one call; None where they were not counted.
        joules: energy of a call; None where nothing measures it.
        reserved_bytes: on CUDA the most that torch held from the driver, what is cached included; else None.
        report: the acceleration's own report of its last turn, whose counts include the warm-up; ``{}`` where it makes
            none.
    """

    name: str
    kind: str
    steps: int | None
    control_of: tuple[str, ...]
    loop_seconds: float | None
    call_seconds: float
    speedup: Ratio
    scores: Mapping[str, Score]
    identical: int
    peak_bytes: int | None
    model_bytes: int | None
    attach_seconds: float = 0.0
    notes: tuple[str, ...] = ()
    report: Mapping[str, Any] = field(default_factory=dict, repr=False)
    sets: Mapping[str, SetScore] = field(default_factory=dict)
    stages: Mapping[str, Spread] = field(default_factory=dict)
    flops: Flops | None = None
    joules: Spread | None = None
    reserved_bytes: int | None = None

    @property
    def psnr(self) -> Score | None:
        """None for the reference."""
        return self.scores.get("psnr")

    def numbers(self) -> dict[str, Score | SetScore]:
        """By measure, whether of samples or of the row."""
        return {**self.scores, **self.sets}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        scores = {name: score.to_dict() for name, score in self.scores.items()}
        sets = {name: score.to_dict() for name, score in self.sets.items()}
        costs = {
            "stages": {name: asdict(spread) for name, spread in self.stages.items()},
            "flops": None if self.flops is None else asdict(self.flops),
            "joules": None if self.joules is None else asdict(self.joules),
        }
        return {**self.__dict__, "speedup": self.speedup.to_dict(), "scores": scores, "sets": sets, **costs}


@dataclass(frozen=True)
class Result:
    """What `diffaccel.eval.compare.compare` measured. ``rich.print(result)`` shows the table.

    Attributes:
        rows: the reference first, then plans, controls and the noise floor.
        prompts, seeds: every prompt ran with every seed.
        conditions: pipeline, arguments of the calls, device, threads, versions.
        restored: afterwards the pipeline gave the reference output to the bit.
        notes: about the comparison as a whole.
        store: the folder with the outputs.
        load_seconds: of loading the pipeline, once a sitting; None where nobody told.
    """

    rows: tuple[Row, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    conditions: Mapping[str, Any]
    restored: bool
    notes: tuple[str, ...] = ()
    store: Store | None = field(default=None, repr=False, compare=False)
    load_seconds: Spread | None = None

    @property
    def folder(self) -> Path | None:
        return self.store.folder if self.store else None

    def row(self, name: str) -> Row:
        """The row of this name.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}; rows: {', '.join(r.name for r in self.rows)}")

    def control_for(self, plan: str) -> Row | None:
        """The row of fewer steps at the cost of ``plan``; None where none was run."""
        return next((r for r in self.rows if plan in r.control_of), None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "rows": [row.to_dict() for row in self.rows],
            "prompts": list(self.prompts),
            "seeds": list(self.seeds),
            "conditions": dict(self.conditions),
            "restored": self.restored,
            "notes": list(self.notes),
            "load_seconds": None if self.load_seconds is None else asdict(self.load_seconds),
        }

    def save(self, file: str | os.PathLike[str]) -> Path:
        """Write `to_dict` as JSON."""
        path = Path(file)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(json.dumps(self.to_dict(), indent=1))
        os.replace(partial, path)
        return path

    def table(self) -> Table:
        """One line per row; controls are indented under the plan they belong to."""
        table = Table(
            box=box.SIMPLE_HEAD, padding=0, pad_edge=False, title=self._title(), title_justify="left", title_style=""
        )
        table.add_column("", overflow="fold", min_width=9)
        for name in _COLUMNS:
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.in_order():
            table.add_row(*_cells(row), style=_style(row))
        return table

    def quality(self) -> Table | None:
        """One line per row, the measures beside PSNR and SSIM; None where the run has none."""
        names = list(dict.fromkeys(name for row in self.rows for name in row.numbers() if name not in FIDELITY))
        if not names:
            return None
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, title="Mean [95 % interval]")
        table.add_column("", overflow="fold", min_width=9)
        for name in names:
            table.add_column(name, justify="right")
        for row in self.in_order():
            cells = (score_text(row.numbers().get(name)).replace(" [", "\n[", 1) for name in names)
            table.add_row(row.name, *cells, style=_style(row))
        return table

    def in_order(self) -> list[Row]:
        """Each plan followed by its controls; what belongs to none comes last."""
        ordered: list[Row] = []
        for row in self.rows:
            if row.kind != "control":
                ordered += [row, *(c for c in self.rows if row.name in c.control_of and c not in ordered)]
        return ordered + [row for row in self.rows if row not in ordered]

    def costs(self) -> Table:
        """Where each row's time goes, what it computes, and what it draws."""
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, title="Medians of a call, in seconds")
        table.add_column("", overflow="fold", min_width=9)
        for name in COSTS:
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.in_order():
            table.add_row(row.name, *cost_cells(row, p90=False), style=_style(row))
        return table

    def set_legends(self) -> list[str]:
        """What each measure of whole rows is, of how many samples, and what its interval is worth."""
        found = {name: score for row in self.rows for name, score in row.sets.items()}
        lines = []
        for name, s in found.items():
            to = f" to {s.against} ({s.reference})" if s.reference else ""
            lines.append(
                f"{name}: {SETS[name].words} of the row's {s.samples} samples{to}, features of {s.extractor}; the "
                "interval leaves prompts out and belongs to the number of so many samples, compare no other count."
            )
        return lines

    def _title(self) -> str:
        c = self.conditions
        count = (
            f"{len(self.prompts)} prompts, seed{'s' if len(self.seeds) > 1 else ''} {', '.join(map(str, self.seeds))}"
        )
        return f"{c.get('pipeline', '')}: {count}, {c.get('device', '')}, {c.get('threads', '')} threads"

    def __rich__(self) -> Group:
        notes = [f"{row.name}: {note}" for row in self.rows for note in row.notes]
        legend = (
            "Speed-up: denoising loop against the reference, medians paired by prompt, 95 % interval. "
            "PSNR (mean / mean of the worst tenth) and SSIM against the reference of the same seed; "
            f"identical counts as {PSNR_CAP:g} dB. Dim rows are controls: fewer steps at the cost of the plan above."
        )
        restored = "afterwards the pipeline gave the reference output to the bit"
        broken = "AFTERWARDS THE PIPELINE DID NOT GIVE THE REFERENCE OUTPUT"
        lines = [legend, *self.set_legends(), restored if self.restored else broken, *self.notes, *notes]
        tables = [table for table in (self.table(), self.quality()) if table is not None]
        return Group(*tables, *(Text(line, style="dim") for line in lines))


def mebibytes(count: int | None, digits: int) -> str:
    """``-`` where it is not known."""
    return "-" if count is None else f"{count / 2**20:.{digits}f}"


COSTS = ("text", "step", "decode", "call", "operations", "denoiser's", "energy")


def cost_cells(row: Row, *, p90: bool = True) -> tuple[str, ...]:
    """The text below each of `COSTS`: medians in seconds, with the 90th percentile or without."""
    stages = (row.stages.get(name) for name in COSTS[:4])
    seconds = ("-" if s is None else f"{s.median:.3g}{f' / {s.p90:.3g}' if p90 else ''}" for s in stages)
    counts = ("-", "-") if row.flops is None else (_with_prefix(row.flops.total), _with_prefix(row.flops.denoiser))
    return (*seconds, *counts, "-" if row.joules is None else f"{row.joules.median:.3g} J")


def _with_prefix(number: float) -> str:
    """``16.4 G``."""
    power = min(6, max(0, (len(str(int(number))) - 1) // 3))
    return f"{number / 1000**power:.3g} {' kMGTPE'[power]}".rstrip()


def _style(row: Row) -> str:
    return "dim" if row.kind in ("control", "noise floor") else ""


def score_text(score: Score | SetScore | None, digits: int = 3) -> str:
    """A number with its interval."""
    if score is None:
        return "-"
    value = score.mean if isinstance(score, Score) else score.value
    return f"{value:.{digits}g} [{score.low:.{digits}g}, {score.high:.{digits}g}]"


def _cells(row: Row) -> tuple[str, ...]:
    ratio, psnr, ssim = row.speedup, row.psnr, row.scores.get("ssim")
    return (
        f"  {row.name}" if row.kind == "control" else row.name,
        "-" if row.steps is None else str(row.steps),
        "-" if row.loop_seconds is None else f"{row.loop_seconds:.3g}",
        "1" if row.kind == "reference" else f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]",
        "-" if psnr is None else f"{psnr.mean:.1f} / {psnr.worst_decile:.1f}",
        "-" if ssim is None else f"{ssim.mean:.4f}",
        mebibytes(row.peak_bytes, 0),
        mebibytes(row.model_bytes, 1),
    )

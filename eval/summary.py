"""From the records of a comparison to its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from diffaccel.eval.generate import Job
from diffaccel.eval.measures import Measure, Score, score
from diffaccel.eval.result import Flops, Result, Row
from diffaccel.eval.sets import SetScore
from diffaccel.eval.store import REFERENCE, Store
from diffaccel.eval.timing import Ratio, Spread, nearest, speedup


class RowSpec(Protocol):
    """What a summary needs to know of a row."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def steps(self) -> int | None: ...


def speedup_of(store: Store, name: str) -> Ratio:
    """Speed-up of the denoising loop over the items that both the row and the reference have; of the whole call where
    the row is a program that does not tell its loop."""
    field = _timed(store, name)
    base, other = (_seconds(store, row, field) for row in (REFERENCE, name))
    common = sorted(base.keys() & other.keys())
    return speedup([base[key] for key in common], [other[key] for key in common])


def matching_steps(store: Store, variants: Sequence[RowSpec], plan: str) -> int:
    """The step count whose loop takes nearest the time that ``plan``'s does, from what was measured so far.

    Counts that were run have their measured ratio; between them (and zero steps) time is taken as linear in steps.
    """
    measured = {v.steps: 1 / speedup_of(store, v.name).value for v in variants if v.kind == "control" and v.steps}
    full = next(v.steps for v in variants if v.kind == "reference")
    assert full is not None
    measured[full] = 1.0
    known = sorted({0: 0.0, **measured}.items())
    counts = range(1, max(full, *measured) + 1)
    times = np.interp(counts, [k for k, _ in known], [t for _, t in known])
    return nearest(1 / speedup_of(store, plan).value, dict(zip(counts, times.tolist(), strict=True)))


def result_of(
    store: Store,
    variants: Sequence[RowSpec],
    measures: Sequence[Measure],
    matched: Sequence[str],
    jobs: Sequence[Job],
    conditions: Mapping[str, Any],
    restored: bool,
    sets: Mapping[str, Mapping[str, SetScore]] = MappingProxyType({}),
) -> Result:
    """The rows, the plans in ``matched`` each with its control of fewer steps; ``sets`` by row and measure."""
    control_of: dict[int, list[str]] = {}
    costs = {
        v.steps: speedup_of(store, v.name).value for v in variants if v.kind in ("reference", "control") and v.steps
    }
    for plan in matched:
        control_of.setdefault(nearest(speedup_of(store, plan).value, costs), []).append(plan)
    rows = []
    for variant in variants:
        plans = control_of.get(variant.steps or -1, []) if variant.kind == "control" else []
        scores = _scores(store, variant, measures, jobs)
        rows.append(_row(store, variant, tuple(plans), scores, sets.get(variant.name, {})))
    full = variants[0].steps
    notes = [r["text"] for r in store.records("note")]
    notes += [f"{plan}: no faster than the reference, so it has no control" for plan in control_of.get(full or -1, [])]
    if store.resumed:
        notes.append("the run was interrupted and resumed")
    prompts = tuple(dict.fromkeys(job.label for job in jobs))
    seeds = tuple(dict.fromkeys(job.seed for job in jobs))
    loads = _spread([r["seconds"] for r in store.records("load")])
    return Result(tuple(rows), prompts, seeds, conditions, restored, tuple(notes), store, loads)


def _spread(values: Sequence[float | None]) -> Spread | None:
    """Of what is known."""
    known = [v for v in values if v is not None]
    return Spread.of(known) if known else None


def _stages(items: Sequence[Mapping[str, Any]]) -> dict[str, Spread]:
    """Where the time of a row's calls goes; a stage that none of them has is missing."""
    found = {
        "text": _spread([r["text_seconds"] for r in items]),
        "loop": _spread([r["loop_seconds"] for r in items]),
        "step": _spread([s for r in items for s in r["step_seconds"]]),
        "decode": _spread([r["decode_seconds"] for r in items]),
        "call": _spread([r["seconds"] for r in items]),
    }
    return {name: spread for name, spread in found.items() if spread is not None}


def _flops(store: Store, row: str) -> tuple[Flops | None, list[str]]:
    """The count, and what a reader must know of it."""
    records = store.records("flops", row=row)
    if not records:
        return None, []
    record = records[0]
    if "failed" in record:
        return None, [f"its operations could not be counted: {record['failed']}"]
    unknown = record["uncounted"]
    notes = [f"its count of operations lacks {', '.join(unknown)}, which has no formula"] if unknown else []
    return Flops(record["total"], record["denoiser"], record["by_operator"]), notes


def _timed(store: Store, name: str) -> str:
    """The field by which a row is timed."""
    known = all(r["loop_seconds"] is not None for r in store.records("item", row=name))
    return "loop_seconds" if known else "seconds"


def _seconds(store: Store, name: str, field: str) -> dict[tuple[int, int], float]:
    return {(r["item"], r["repeat"]): r[field] for r in store.records("item", row=name)}


def _scores(store: Store, variant: RowSpec, measures: Sequence[Measure], jobs: Sequence[Job]) -> dict[str, Score]:
    """Of each measure that the row has, from the first time that each item was run."""
    prompts: dict[str, int] = {}
    of_item = {job.index: prompts.setdefault(repr(job.prompt), len(prompts)) for job in jobs}
    items, base = _first(store, variant.name), _first(store, REFERENCE)
    scores = {}
    for measure in measures:
        if measure.fidelity and variant.name == REFERENCE:
            continue
        if any(measure.name not in record["scores"] for record in items.values()):
            continue  # a program of its own shows no latents
        values = [_value(items[i], measure) for i in items]
        paired = None if measure.fidelity or variant.name == REFERENCE else [_value(base[i], measure) for i in items]
        scores[measure.name] = score(measure, values, [of_item[i] for i in items], paired)
    return scores


def _first(store: Store, row: str) -> dict[int, dict[str, Any]]:
    """The first record of each item of a row."""
    return {r["item"]: r for r in reversed(store.records("item", row=row))}


def _value(record: Mapping[str, Any], measure: Measure) -> float:
    value = record["scores"][measure.name]
    return measure.cap if value is None else value


def _median(records: Sequence[Mapping[str, Any]], field: str) -> float:
    return float(np.median([r[field] for r in records]))


def _row(
    store: Store,
    variant: RowSpec,
    control_of: tuple[str, ...],
    scores: Mapping[str, Score],
    sets: Mapping[str, SetScore],
) -> Row:
    items = store.records("item", row=variant.name)
    turns = store.records("row", row=variant.name)
    first = list(_first(store, variant.name).values())
    report: dict[str, Any] = next((r["report"] for r in reversed(store.records("report", row=variant.name))), {})
    notes = [*report.get("notes", []), *(n for t in report.get("techniques", {}).values() for n in t["notes"])]
    flops, more = _flops(store, variant.name)
    notes += more
    notes += dict.fromkeys(n for turn in turns for n in turn.get("notes", []))
    if _timed(store, variant.name) == "seconds":
        notes.append("it does not tell its loop: its speed-up is that of the whole call")
    digests = {r["item"]: r["digest"] for r in first}
    if any(r["digest"] != digests[r["item"]] for r in items):
        notes.append("its output differs from repeat to repeat")
    return Row(
        name=variant.name,
        kind=variant.kind,
        steps=variant.steps,
        control_of=control_of,
        loop_seconds=None if _timed(store, variant.name) == "seconds" else _median(items, "loop_seconds"),
        call_seconds=_median(items, "seconds"),
        speedup=speedup_of(store, variant.name),
        scores=scores,
        sets=sets,
        identical=len(first) if variant.kind == "reference" else sum(r["identical"] for r in first),
        peak_bytes=max((r["peak_bytes"] for r in items if r["peak_bytes"] is not None), default=None),
        model_bytes=turns[-1]["model_bytes"],
        attach_seconds=_median(turns, "attach_seconds"),
        notes=tuple(notes),
        report=report,
        stages=_stages(items),
        flops=flops,
        joules=_spread([r["joules"] for r in items]),
        reserved_bytes=max((r["reserved_bytes"] for r in items if r["reserved_bytes"] is not None), default=None),
    )

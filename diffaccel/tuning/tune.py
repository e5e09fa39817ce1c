"""`tune`: the fastest plan within a stated budget, found by measurement."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from diffaccel.denoiser import find_denoisers
from diffaccel.errors import PlanError
from diffaccel.eval.generate import Job, steps_of
from diffaccel.eval.measures import Chosen, measures_of
from diffaccel.eval.settings import Request, plain
from diffaccel.eval.store import Store
from diffaccel.eval.timing import speedup
from diffaccel.inspection.quiet import quiet
from diffaccel.key import plan_key
from diffaccel.pipelines.tasks import makes_video
from diffaccel.plan import Plan
from diffaccel.tuning.budget import Budget
from diffaccel.tuning.calibrations import Calibrations
from diffaccel.tuning.live import Live
from diffaccel.tuning.page import write_page
from diffaccel.tuning.result import Tuning, write_plans
from diffaccel.tuning.search import Search, Split
from diffaccel.tuning.space import Family, compose, families_for
from diffaccel.tuning.trials import Trials, prompts_of

FORMAT = 1
_BESIDE = 6
"""Items on which the plan and the original take turns in the end."""


def tune(
    model: Any,
    prompts: Sequence[str | Mapping[str, Any]],
    budget: Budget,
    *,
    calls: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (0,),
    minutes: float | None = None,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Plan:
    """The best plan within ``budget`` for this pipeline on this device, see `diffaccel.tuning.budget.Budget`.

    Args:
        model: a diffusers pipeline, or what `diffaccel.pipelines.load` returns (its default arguments then apply).
        prompts: texts, or arguments of the call by name; 16 or so. Half of them choose the plan, the others confirm it.
        budget: what the plan has to keep to.
        calls: further arguments of every call, such as ``num_inference_steps``. A plan is tuned for these.
        seeds: of the generators; every prompt runs with each.
        minutes: time for trials, over all sittings, after which the best that is confirmed by then is taken; None for
            as long as it takes.
        folder: where the plan, the frontier, every trial and a page go; a tuning that was interrupted goes on there and
            loses at most the run in flight. None: only the plan is kept.
        seed: of the split of the prompts. With the same seed and the same trials on record the result is the same.
        progress: whether to show a live table.

    Returns:
        The plan. Where nothing but the original surely keeps to the budget, the empty plan, and a warning.

    Raises:
        InputError: a prompt, seed or measure that cannot be used, or a folder with something else.
        PlanError: a budget without a limit, fewer than 4 prompts, or a pipeline that is accelerated already.
        ModelError: no denoiser in ``model``.
    """
    found = run(
        model, prompts, budget, calls=calls, seeds=seeds, minutes=minutes, folder=folder, seed=seed, progress=progress
    )
    if found.best is None:
        warnings.warn(f"diffaccel: {found.verdict}; the plan is empty", stacklevel=2)
    return found.plan


def run(
    model: Any,
    prompts: Sequence[str | Mapping[str, Any]],
    budget: Budget,
    *,
    calls: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (0,),
    minutes: float | None = None,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
    families: Sequence[Family] | None = None,
) -> Tuning:
    """`tune`, with all that was found.

    Args:
        families: what to choose from; None for all that fits, see `diffaccel.tuning.space.families_for`.
    """
    if not isinstance(budget, Budget):
        raise PlanError(f"tune needs a Budget, such as Budget(psnr=36), got {budget!r:.200}")
    if minutes is not None and not (isinstance(minutes, int | float) and minutes > 0):
        raise PlanError(f"minutes must be a number above 0, or None, got {minutes!r}")
    pipe = getattr(model, "pipe", model)
    calls = {**getattr(model, "defaults", {}), **(calls or {})}
    Request(pipe, {}, prompts, seeds, calls, (), 1, 1, False).check()
    bundled = str(getattr(model, "name", "")).startswith("bundled:")
    jobs = [Job(i, prompt, s) for i, (prompt, s) in enumerate(product(prompts, seeds))]
    split = Split.of(prompts_of(jobs), seed)
    measures = _measures(budget, prompts, bundled=bundled, video=makes_video(pipe))
    denoisers = find_denoisers(pipe)
    store = Store(folder, _settings(pipe, prompts, seeds, calls, budget, seed, families))
    tuned_for = {"calls": plain(calls), "scheduler": type(getattr(pipe, "scheduler", None)).__name__}
    key = {**plan_key(denoisers), "tuned": tuned_for}
    try:
        with quiet(pipe), Live(budget, minutes, visible=progress) as live:
            notes: list[str] = []
            if families is None:
                of_search = [jobs[i] for i in split.search]
                calibrations = Calibrations(pipe, of_search, calls, store, live.aside)
                families, notes = families_for(denoisers, budget, calibrations)
            trials = Trials(pipe, jobs, calls, store, measures, live.doing)

            def watch(search: Search) -> None:
                live.show(search, trials.seconds)
                write_plans(store, search.best, search.frontier(), budget, key)

            search = Search(trials, budget, families, split, None if minutes is None else minutes * 60, watch)
            best = search.run()
            points = search.frontier()
            plan = write_plans(store, best, points, budget, key)
            measured, predicted = None, None
            if best is not None and best.choice:
                items = (*split.search, *split.confirm)[:_BESIDE]
                measured = speedup(*trials.beside(best.name, compose(best.choice), items))
                predicted = 1 / search.predicted_cost(best.choice)
            restored = trials.is_restored()
        found = Tuning(
            plan,
            budget,
            best,
            points,
            measured,
            predicted,
            len(store.records("item")),
            trials.seconds,
            restored,
            dict(search.alone),
            tuple(dict.fromkeys([*notes, *search.notes])),
        )
        if folder is not None:
            write_page(found, store, pipe, denoisers, steps_of(pipe, calls))
    finally:
        store.release()
    return found


def _measures(budget: Budget, prompts: Sequence[Any], *, bundled: bool, video: bool) -> list[Chosen]:
    """Those that the budget speaks of, computed as it says or by default."""
    given = {text.partition("=")[0]: text for text in budget.measures}
    names = []
    for limit in budget.of_quality:
        name = limit.measure
        if name == "perceptual":
            name = "shapes_perceptual" if bundled else "lpips"
        names.append(given.get(name, name))
    return measures_of([n for n in dict.fromkeys(names) if n not in ("psnr", "ssim")], prompts, video=video)


def _settings(
    pipe: Any,
    prompts: Sequence[Any],
    seeds: Sequence[int],
    calls: Mapping[str, Any],
    budget: Budget,
    seed: int,
    families: Sequence[Family] | None,
) -> dict[str, Any]:
    """What must be equal for trials to belong together."""
    base = Request(pipe, {}, prompts, seeds, calls, (), 1, 1, False).settings()
    kept = ("pipeline", "components", "prompts", "seeds", "calls", "steps", "device", "dtype", "threads", "versions")
    return {
        "format": FORMAT,
        "tuning": budget.to_dict(),
        "seed": seed,
        "families": {f.name: list(f.strengths) for f in families or ()} or "all that fit",
        **{name: base[name] for name in kept},
    }


def check(
    model: Any,
    folder: str | os.PathLike[str],
    prompts: Sequence[str | Mapping[str, Any]],
    *,
    calls: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (0,),
) -> tuple[bool, str]:
    """Whether a tuned plan keeps its budget on these prompts with these calls: quick, for other sizes or step counts.

    Args:
        model: as in `tune`.
        folder: of the plan.
        prompts: some that were not tuned on.
        calls: as in `tune`, such as another ``num_inference_steps``. seeds: likewise.

    Returns:
        Whether it surely does, and what was measured, in words.

    Raises:
        PlanError: no tuned plan there, or one of another model.
    """
    plan = Plan.load(Path(folder))
    tuned = (plan.key or {}).get("tuned")
    if not isinstance(tuned, Mapping) or "budget" not in tuned:
        raise PlanError(f"{folder} holds no tuned plan to check; diffaccel.tune writes those")
    budget = Budget.from_dict(tuned["budget"])
    pipe = getattr(model, "pipe", model)
    calls = {**getattr(model, "defaults", {}), **(calls or {})}
    Request(pipe, {}, prompts, seeds, calls, (), 1, 1, False).check()
    bundled = str(getattr(model, "name", "")).startswith("bundled:")
    jobs = [Job(i, prompt, s) for i, (prompt, s) in enumerate(product(prompts, seeds))]
    measures = _measures(budget, prompts, bundled=bundled, video=makes_video(pipe))
    store = Store(None, {"check": str(folder)})
    try:
        with quiet(pipe):
            trials = Trials(pipe, jobs, calls, store, measures)
            outcome = trials.run("tuned", plan, [job.index for job in jobs])
    finally:
        store.release()
    if outcome is None:
        raise PlanError(f"the plan in {folder} cannot be put on this pipeline: {trials.why_not('tuned')}")
    told = [f"{limit}: {outcome.estimate(limit):.4g}, surely {outcome.bound(limit):.4g}" for limit in budget.limits]
    return outcome.keeps(budget), "; ".join([f"{1 / outcome.cost:.2f}x", *told])

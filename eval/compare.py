"""`compare`: plans against the unaccelerated pipeline and against fewer steps, in speed, fidelity and memory.

All rows take turns prompt by prompt, so that a machine whose speed drifts is unfair to none. The control that every row
has to beat is the same pipeline with fewer steps at the same cost.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any

from diffaccel.denoiser import find_denoisers
from diffaccel.errors import InputError
from diffaccel.eval.feature_store import FeatureStore, Folder
from diffaccel.eval.generate import Job
from diffaccel.eval.measures import measures_of
from diffaccel.eval.peer_command import Command, Surroundings
from diffaccel.eval.peers import peers_of
from diffaccel.eval.processes import Processes
from diffaccel.eval.result import Result
from diffaccel.eval.runner import Runner, progress_bar
from diffaccel.eval.sample_rows import write_samples
from diffaccel.eval.sets import SETS, sets_of
from diffaccel.eval.settings import FEWER_STEPS, Request, conditions_of
from diffaccel.eval.store import REFERENCE, Store
from diffaccel.eval.summary import matching_steps, result_of, speedup_of
from diffaccel.eval.variants import Apply, PlanLike, Trial, Variant, apply_of, fewer
from diffaccel.eval.variants import noise_floor as floor
from diffaccel.inspection.quiet import quiet
from diffaccel.pipelines.bundled import BUNDLED
from diffaccel.pipelines.tasks import makes_video


def compare(
    model: Any,
    plans: Mapping[str, PlanLike | Apply] | Sequence[str],
    prompts: Sequence[str | Mapping[str, Any]],
    seeds: Sequence[int] = (0,),
    calls: Mapping[str, Any] | None = None,
    controls: Sequence[str | int] = (FEWER_STEPS,),
    repeats: int = 1,
    *,
    measures: Sequence[str] = (),
    against: str | os.PathLike[str] | None = None,
    peers: Sequence[str] = (),
    folder: str | os.PathLike[str] | None = None,
    turn: int = 4,
    noise_floor: bool = False,
    flops: bool = False,
    lossless: bool = False,
    load_seconds: float | None = None,
    progress: bool = True,
) -> Result:
    """Run a pipeline with each plan and without, and measure what each gains and costs.

    Every prompt runs alone (batch 1) with every seed from a CPU generator. A turn is: for each row, attach, two steps
    of warm-up, then ``turn`` prompts. The reference is generated once. Nothing stays on the pipeline, which is checked.
    Processes that ``accelerate launch`` started share the items; each returns the result of all.

    Args:
        model: a diffusers pipeline, or what `diffaccel.pipelines.load` returns (its default arguments then apply).
        plans: by row name: what `diffaccel.accelerate` takes, or a function that gets the pipeline, applies any
            acceleration and returns the context manager that takes it off. A list of presets is short for itself.
        prompts: texts, or arguments of the call by name (such as ``image`` and ``prompt``).
        seeds: of the generators.
        calls: further arguments of every call, such as ``num_inference_steps``.
        controls: ``"fewer steps"`` adds for each plan the step count whose measured loop time is nearest to the plan's;
            numbers add that many steps.
        repeats: how often every item is timed; fidelity is taken from the first.
        measures: names of `diffaccel.eval.measures.MEASURES` to report beside PSNR and SSIM, and of
            `diffaccel.eval.sets.SETS`, which are numbers of whole rows.
        against: a folder of pictures (of clips, where the pipeline makes such) that the latter compare rows with; None:
            with the reference's samples.
        peers: accelerations of others to run beside, see `diffaccel.eval.peers.peers_of`. One that cannot run on this
            pipeline becomes a note with the reason.
        folder: where results go as they come; an interrupted run goes on from there and loses at most the item in
            flight. None: a temporary folder that lives as long as the result.
        turn: prompts per row before the next row's turn. More = less attaching and warming up, drift cancels less.
        noise_floor: add the reference with another thread count: the fidelity of a run that only rounds differently.
        flops: count the operations of each row, in one more call of its first item that is not timed.
        lossless: keep every clip as frames beside the mp4, of which the outputs of a run otherwise consist.
        load_seconds: how long ``model`` took to load, to be reported beside the rest.
        progress: whether to show a bar.

    Raises:
        InputError: a prompt, seed, control or measure that cannot be used, or a folder with another comparison.
        PlanError: a plan does not fit, or the pipeline is already accelerated.
        ModelError: no denoiser in ``model``.
    """
    pipe = getattr(model, "pipe", model)
    plans = dict(plans) if isinstance(plans, Mapping) else {name: name for name in plans}
    calls = {**getattr(model, "defaults", {}), **(calls or {})}
    of_sample = [name for name in measures if name.partition("=")[0] not in SETS]
    of_row = [name for name in measures if name not in of_sample]
    request = Request(
        pipe, plans, prompts, seeds, calls, controls, repeats, turn, noise_floor, tuple(measures), tuple(peers)
    )
    request.check()
    video = makes_video(pipe)
    chosen, offered = measures_of(of_sample, prompts, video=video), peers_of(peers)
    if against is not None and not of_row:
        raise InputError(f"against={str(against)!r} is for measures of whole rows; add one of {', '.join(SETS)}")
    data = None if against is None else Folder(against, video=video)
    bundled = str(getattr(model, "name", "")).startswith("bundled:")
    sets = sets_of(
        of_row, len(prompts) * len(seeds), None if data is None else len(data.files), bundled=bundled, video=video
    )
    has_commands = any(isinstance(peer, Command) for peer in offered.values())
    settings, steps = {**request.settings(sets, data), "lossless": lossless and video}, request.steps
    for plan in plans.values():  # one that does not fit is refused now, not after the first prompts
        with apply_of(plan)(pipe):
            pass
    processes = Processes.here()
    with _opened(folder, settings, processes, lossless) as store:
        features = FeatureStore(store, sets)
        if load_seconds is not None and processes.first:
            store.append(kind="load", seconds=load_seconds)
        if data is not None and processes.first:
            features.read_folder(data, progress=progress)
        jobs = [Job(i, prompt, seed) for i, (prompt, seed) in enumerate(product(prompts, seeds))]
        own = processes.share(jobs)
        variants = [Variant(REFERENCE, "reference", nullcontext, steps)]
        variants += [Variant(name, "plan", apply_of(plan), steps) for name, plan in plans.items()]
        around = _surroundings(model, pipe, settings, store, processes) if has_commands else None
        variants += Trial(pipe, jobs[0], calls, store, processes, around).peers(offered, steps)
        variants += [fewer(n) for n in controls if isinstance(n, int)]
        if noise_floor:
            variants.append(floor(steps))
        with progress_bar(progress and processes.first) as bar, quiet(pipe):
            runner = Runner(
                pipe,
                calls,
                store,
                chosen,
                features,
                bar,
                total=len(variants) * len(own) * repeats,
                flops=flops,
                around=around,
            )
            automatic = FEWER_STEPS in controls and steps is not None
            turns = [own[i : i + turn] for i in range(0, len(own), turn)] or [[]]
            rounds = range(repeats)
            for index, these in enumerate(turns):
                runner.take_turn(variants, these, rounds)
                if automatic and index == 0:
                    late = _matching(store, variants, plans, "after the first turn", processes)
                    runner.take_turn([variants[0], *late], these, [repeats])
                    variants += late
            if automatic and (late := _matching(store, variants, plans, "at the end", processes)):
                for these in turns:
                    runner.take_turn([variants[0], *late], these, [repeats + 1])
                variants += late
            restored = all(processes.gather(not own or runner.is_restored(own[0])))
        store.reload()
        if not restored:
            warnings.warn(
                "diffaccel: after the comparison the pipeline does not give the reference output", stacklevel=2
            )
        result = result_of(
            store,
            variants,
            [c.measure for c in chosen],
            list(plans) if automatic else [],
            jobs,
            conditions_of(settings),
            restored,
            features.scores([v.name for v in variants], jobs, data, processes),
        )
        if processes.first:
            write_samples(store, jobs)
        return result


@contextmanager
def _opened(
    folder: str | os.PathLike[str] | None, settings: Mapping[str, Any], processes: Processes, lossless: bool
) -> Iterator[Store]:
    """The store, for this run alone. Process 0 opens it first; what it refuses, all refuse."""
    processes.require_folder(folder)
    store, refused = None, None
    if processes.first:
        try:
            store = Store(folder, settings, lossless=lossless)
        except InputError as error:
            refused = str(error)
    if (refused := processes.agree(refused)) is not None:
        raise InputError(refused)
    store = store or Store(folder, settings, processes.rank, lossless=lossless)
    try:
        yield store
    finally:
        store.release()


def _surroundings(
    model: Any, pipe: Any, settings: Mapping[str, Any], store: Store, processes: Processes
) -> Surroundings:
    """What programs of their own are told; the pipeline is written down for them unless it came from a folder."""
    name = str(getattr(model, "name", ""))
    folder = BUNDLED[name].path if name in BUNDLED else Path(name).expanduser()
    if not name or not (folder / "model_index.json").is_file():
        folder = store.folder / "pipeline"
        if processes.first and not (folder / "model_index.json").is_file():
            pipe.save_pretrained(folder)
        processes.agree(None)
    device = next(find_denoisers(pipe)[0].module.parameters()).device
    return Surroundings(folder.absolute(), str(device), settings["dtype"], settings["threads"])


def _matching(
    store: Store, variants: Sequence[Variant], plans: Iterable[str], when: str, processes: Processes
) -> list[Variant]:
    """Controls of nearest cost for the plans that have no row yet whose cost is theirs within what timing can tell.

    The choice is kept, so that a resumed run makes the same one. Process 0 makes it for all.
    """
    chosen = store.records("controls", when=when)
    if not chosen and processes.first:
        have = [v for v in variants if v.kind in ("control", "reference")]
        costs = [speedup_of(store, v.name).value for v in have]
        ratios = {plan: speedup_of(store, plan) for plan in plans}
        unmatched = [plan for plan, r in ratios.items() if not any(r.low <= cost <= r.high for cost in costs)]
        wanted = {matching_steps(store, variants, plan) for plan in unmatched} - {v.steps for v in have}
        store.append(kind="controls", when=when, steps=sorted(wanted))
        chosen = store.records("controls", when=when)
    return [fewer(n) for n in processes.agree(chosen[0]["steps"] if chosen else [])]

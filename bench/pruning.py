"""What pruning costs and healing gives back, on the bundled image pipeline: each row by itself, the bars at the end.

    python bench/pruning.py --folder runs/p --threads 2                 # the table: 256 prompts; hours on 2 cores
    python bench/pruning.py --folder runs/p --threads 2                 # again: goes on where it was cut off
    python bench/pruning.py --folder runs/e --rows "20%" --prompts 64   # only rows whose name contains a word
    python bench/pruning.py --folder runs/t --prompts 4 --updates 2 --heal-minutes 0.05 --depth-minutes 0.05 \\
        --guidance-minutes 0.05 --captions 2 --steps 4                  # a try of the whole of it, in minutes
    python bench/pruning.py --memory                                    # peak memory of a learning step by steps

Rows: 20 % of the denoiser's parameters removed by EcoDiff, by magnitude and at random; 20 % and 40 % by EcoDiff,
healed; two of eight blocks removed, and healed; guidance learnt in one call. Whatever is decided or learnt uses tuning
prompts and captions of the world's training scenes; the table reports held-out prompts. Checker: share of pictures that
show all that was asked for, with the 95 % interval over prompts; "lost at most" is one-sided, against the untouched
pipeline. Healing lasts as many updates as fit into the minutes asked for, by a few timed ones.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import functools
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffaccel import Distillation, Plan, Pruning, accelerate, distill, prune
from diffaccel.assets.make.world import describe, draw_scene
from diffaccel.denoiser import find_denoisers
from diffaccel.eval.compare import compare
from diffaccel.eval.result import Result
from diffaccel.pipelines.bundled import bundled
from diffaccel.pipelines.loading import load
from diffaccel.pruning.ecodiff import EcoDiff, hard_concrete
from diffaccel.pruning.groups import groups_of
from diffaccel.pruning.masks import Masks
from diffaccel.pruning.trajectory import Trajectory, frozen

MODEL = "bundled:image"
MEASURES = ("adherence", "clip", "fid")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/pruning"), help="an interrupted run goes on there")
    parser.add_argument("--prompts", type=int, default=256, help="held-out ones")
    parser.add_argument("--rows", nargs="+", help="only rows whose name contains one of these")
    parser.add_argument("--updates", type=int, default=80, help="of EcoDiff's masks")
    parser.add_argument("--mask-steps", type=int, default=10, help="denoising steps of EcoDiff's trajectories")
    parser.add_argument("--captions", type=int, default=192, help="runs of the teacher to learn from")
    parser.add_argument("--heal-minutes", type=float, default=10)
    parser.add_argument("--depth-minutes", type=float, default=20)
    parser.add_argument("--guidance-minutes", type=float, default=30)
    parser.add_argument("--steps", type=int, help="denoising steps, for a quick try")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory", action="store_true", help="only the memory of a learning step")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        print_memory()
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    make = {
        "magnitude 20%": lambda: plan_of(options, "magnitude", 0.2),
        "random 20%": lambda: plan_of(options, "random", 0.2),
        "EcoDiff 20%": lambda: plan_of(options, "ecodiff", 0.2),
        "EcoDiff 20%, healed": lambda: healed(options, "ecodiff", 0.2, options.heal_minutes),
        "EcoDiff 40%, healed": lambda: healed(options, "ecodiff", 0.4, options.heal_minutes),
        "2 of 8 blocks": lambda: plan_of(options, "hierarchy", 0.22),
        "2 of 8 blocks, healed": lambda: healed(options, "hierarchy", 0.22, options.depth_minutes),
        "guidance in one call": lambda: one_call(options),
    }
    wanted = [name for name in make if not options.rows or any(word in name for word in options.rows)]
    rows = {name: make[name]() for name in wanted}
    calls = {} if options.steps is None else {"num_inference_steps": options.steps}
    prompts = bundled(MODEL).prompts()[: options.prompts]
    # The evaluator's features have 128 dimensions: fewer pictures give no distance of distributions.
    measures = MEASURES if len(prompts) > 128 else MEASURES[:2]
    result = compare(
        *(load(MODEL, device="cpu"), rows, prompts, (0,), calls, ()),
        measures=measures,
        folder=options.folder / "pictures",
    )
    print_table(result, measures)


# --- rows ------------------------------------------------------------------------------------------------------------


class Swapped:
    """A row that runs another denoiser, and perhaps without guidance."""

    def __init__(self, folder: Path, *, guided: bool = True) -> None:
        self._folder, self._guided = folder, guided

    @contextlib.contextmanager
    def __call__(self, pipe: Any) -> Iterator[None]:
        before, cls = pipe.transformer, type(pipe)
        pipe.transformer = type(before).from_pretrained(self._folder)

        @functools.wraps(cls.__call__)
        def without_guidance(self: Any, **call: Any) -> Any:
            return cls.__call__(self, **{**call, "guidance_scale": 1.0})

        if not self._guided:
            pipe.__class__ = type(cls.__name__, (cls,), {"__call__": without_guidance})
        try:
            yield
        finally:
            pipe.transformer, pipe.__class__ = before, cls


def plan_of(options: argparse.Namespace, method: str, ratio: float) -> Plan:
    """The plan, decided on tuning prompts; one that was saved is read again."""
    folder = options.folder / f"{method}-{ratio:g}"
    if (folder / "plan" / "plan.json").exists():
        return Plan.load(folder / "plan")
    wrapped = load(MODEL, device="cpu")
    units = "block" if method == "hierarchy" else "heads neurons"
    section = Pruning(ratio=ratio, method=method, units=units)
    calls = dict(wrapped.defaults) | ({} if options.steps is None else {"num_inference_steps": options.steps})
    prompts = bundled(MODEL).tuning_prompts()[:8]
    if method == "ecodiff":
        calls["num_inference_steps"] = min(calls["num_inference_steps"], options.mask_steps)
        prompts = captions(64, seed=1)
    settings = EcoDiff(updates=options.updates)
    plan = prune(wrapped.pipe, section, prompts=prompts, folder=folder, settings=settings, notify=print, **calls)
    plan.save(folder / "plan")
    return plan


def healed(options: argparse.Namespace, method: str, ratio: float, minutes: float) -> Swapped:
    """A pruned denoiser after ``minutes`` of healing."""
    plan = plan_of(options, method, ratio)
    folder = options.folder / f"{method}-{ratio:g}" / "healed"
    if not (folder / "done").exists():
        student = load(MODEL, device="cpu")
        accelerate(student.pipe, plan).bake()
        learn(options, student.pipe, load(MODEL, device="cpu").pipe, folder, minutes, rate=5e-4, features=0.1)
    return Swapped(folder / "denoiser")


def one_call(options: argparse.Namespace) -> Swapped:
    """The denoiser after guidance was distilled into it."""
    folder = options.folder / "guidance"
    if not (folder / "done").exists():
        settings = dict(rate=1e-3, lora=32, guidance=True)
        learn(options, load(MODEL, device="cpu").pipe, None, folder, options.guidance_minutes, **settings)
    return Swapped(folder / "denoiser", guided=False)


def learn(
    options: argparse.Namespace, student: Any, teacher: Any, folder: Path, minutes: float, **settings: Any
) -> None:
    """Distil for about ``minutes``; the number of updates is found by a short training of a copy, and kept."""
    calls = dict(load(MODEL, device="cpu").defaults)
    calls |= {} if options.steps is None else {"num_inference_steps": options.steps}
    arguments = dict(teacher=teacher, prompts=captions(options.captions, seed=2), **calls)
    file = folder / "updates.json"
    if not file.exists():
        distill(twin(student), folder=folder / "probe", settings=Distillation(steps=8, **settings), runs=1, **arguments)
        with (folder / "probe" / "curve.csv").open() as curve:
            seconds = sorted(float(row["seconds"]) for row in csv.DictReader(curve))[4]
        file.write_text(json.dumps({"updates": max(2, round(60 * minutes / seconds)), "seconds": seconds}))
    updates = json.loads(file.read_text())["updates"]
    print(f"{folder}: {updates} updates")
    distill(student, folder=folder / "training", settings=Distillation(steps=updates, **settings), **arguments)
    student.transformer.save_pretrained(folder / "denoiser")
    (folder / "done").write_text("")


def twin(pipe: Any) -> Any:
    """The same pipeline with a copy of the denoiser."""
    copied = copy.copy(pipe)
    copied.transformer = copy.deepcopy(pipe.transformer)
    return copied


def captions(count: int, seed: int) -> list[str]:
    """Of scenes as in training, none of them held out."""
    rng = np.random.default_rng(seed)
    return [describe(draw_scene(rng), rng) for _ in range(count)]


# --- tables ----------------------------------------------------------------------------------------------------------


def print_table(result: Result, measures: tuple[str, ...]) -> None:
    """As markdown; and which bars are met."""
    print(f"\n| | bytes | loop | {' | '.join(measures)} | checker lost, at most |")
    print("|---" * (4 + len(measures)) + "|")
    whole = result.row("reference").model_bytes
    for row in result.rows:
        numbers = row.numbers()
        cells = [text(numbers.get(name)) for name in measures]
        lost = numbers["adherence"].drop_bound
        size = "" if not whole or not row.model_bytes else f"{row.model_bytes / whole:.2f}"
        end = "" if lost is None else f"{lost:+.3f}"
        print(f"| {row.name} | {size} | {row.speedup.value:.2f}x | {' | '.join(cells)} | {end} |")
    names = {row.name for row in result.rows}
    ecodiff = result.row("EcoDiff 20%").scores["adherence"] if "EcoDiff 20%" in names else None
    print()
    for name in ("magnitude 20%", "random 20%"):
        if ecodiff and name in names:
            other = result.row(name).scores["adherence"]
            verdict(f"EcoDiff above {name}, intervals apart", ecodiff.low > other.high)
    limits = {"EcoDiff 20%, healed": 0.04, "EcoDiff 40%, healed": 0.08, "2 of 8 blocks, healed": 0.05}
    for name, limit in (limits | {"guidance in one call": 0.04}).items():
        if name in names:
            bound = result.row(name).scores["adherence"].drop_bound
            verdict(f"{name}: checker loses at most {limit:.0%}", bound is not None and bound <= limit)
    for name, least in (("2 of 8 blocks", 1.25), ("guidance in one call", 1.8)):
        if name in names:
            verdict(f"{name}: denoising loop at least {least}x", result.row(name).speedup.value >= least)


def verdict(text: str, met: bool) -> None:
    print(f"- {'met' if met else '**not met**'}: {text}")


def text(score: Any) -> str:
    if score is None:
        return ""
    return f"{getattr(score, 'mean', getattr(score, 'value', 0.0)):.3f} ({score.low:.3f} to {score.high:.3f})"


# --- memory ----------------------------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """The largest number of bytes of tensors that were made and alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self._now, self.bytes = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(key)
                self._now += storage.nbytes()
                self.bytes = max(self.bytes, self._now)
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        return result

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


def print_memory() -> None:
    """The peak of one gradient through the trajectory at 5 and at 50 steps."""
    wrapped = load(MODEL, device="cpu")
    (denoiser,) = find_denoisers(wrapped.pipe)
    groups = groups_of(denoiser)
    logits = {g.key: torch.full((g.units,), 3.0, requires_grad=True) for g in groups}

    def sample(step: int) -> dict[str, Tensor]:
        return {key: hard_concrete(value, torch.full(value.shape, 0.5), 0.5) for key, value in logits.items()}

    peaks = {}
    for steps in (5, 50):
        call: dict[str, Any] = dict(wrapped.defaults) | {"num_inference_steps": steps}
        trajectory = Trajectory(wrapped.pipe, denoiser.module, call)
        with frozen(wrapped.pipe), Masks(denoiser.module, groups) as masks, Peak() as peak:
            found = trajectory.masked({"prompt": bundled(MODEL).example}, 0, masks, sample)
            sum(t.square().sum() for t in found).backward()
        peaks[steps] = peak.bytes
        print(f"{steps} steps: {peak.bytes / 2**20:.1f} MiB of tensors at most")
    verdict(f"memory at 50 steps within 1.2x of 5: {peaks[50] / peaks[5]:.3f}x", peaks[50] <= 1.2 * peaks[5])


if __name__ == "__main__":
    main()

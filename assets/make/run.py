"""Makes every bundled asset, stage by stage: ``python assets/make/run.py``, or ``make assets``.

What is finished is skipped, what was interrupted goes on from its last checkpoint. README.md beside this file has the
stages, how long each takes, and the next command.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from diffaccel.assets.make.assemble import ASSETS, NAMES
from diffaccel.assets.make.denoise import TRAININGS
from diffaccel.assets.make.latents import Latents, encode_shards
from diffaccel.assets.make.loop import Loop, Training, native_bfloat16
from diffaccel.assets.make.recipes import FULL, SMOKE, Recipe
from diffaccel.assets.make.restore import installed_steps, record_before, restore
from diffaccel.assets.make.text import TextTraining
from diffaccel.assets.make.vae import VaeTraining

WORK = Path(os.environ.get("DIFFACCEL_MAKE", "~/.cache/diffaccel-make")).expanduser()


@dataclass(frozen=True)
class Stage:
    """``run(seconds)`` works for about that long at most and says whether the stage is finished."""

    name: str
    run: Callable[[float], bool]


def stages(work: Path, recipe: Recipe, bfloat16: bool) -> list[Stage]:
    """All stages in an order in which each finds what it needs."""

    def train(make: Callable[[], Training], name: str, seconds: float) -> bool:
        return Loop(make(), work / name, bfloat16=bfloat16).run(seconds)

    def result(name: str) -> Path:
        return work / name / "result"

    def vae(kind: str) -> Training:
        return VaeTraining(kind, recipe.image_vae if kind == "image" else recipe.video_vae)

    def denoiser(kind: str) -> Training:
        phases = recipe.denoisers[kind]
        source = "video" if kind == "video" else "image"
        sets = [Latents(work / f"latents-{source}-{phase.size}") for phase in phases]
        training = TRAININGS[kind](kind, phases, result(f"text-{kind}"), sets)
        begin = installed_steps(kind, training)
        if begin and not (work / training.name / "checkpoint.pt").exists():
            training.go_on(ASSETS / NAMES[kind], begin)
            record_before(kind, work / training.name)
        return training

    def evaluator() -> Training:
        from diffaccel.assets.make.evaluator import EvaluatorTraining  # open_clip takes seconds to import

        return EvaluatorTraining(recipe.evaluator_steps, recipe.evaluator_batch)

    def assemble(seconds: float) -> bool:
        from diffaccel.assets.make.assemble import assemble_all

        return assemble_all(work)

    def measure(seconds: float) -> bool:
        from diffaccel.assets.make.measure import measure_all

        return measure_all(work, recipe.measure_prompts, seconds)

    def trained(name: str, make: Callable[[], Training]) -> Stage:
        return Stage(name, partial(train, make, name))

    def encoded(kind: str, size: int) -> Stage:
        name = f"latents-{kind}-{size}"
        count = recipe.latents[kind, size]

        def run(seconds: float) -> bool:
            return encode_shards(kind, size, count, result(f"vae-{kind}"), work / name, seconds, bfloat16)

        return Stage(name, run)

    texts = [trained(f"text-{kind}", partial(TextTraining, kind, recipe.text_steps)) for kind in TRAININGS]
    return [
        trained("vae-image", partial(vae, "image")),
        trained("vae-video", partial(vae, "video")),
        *texts,
        trained("evaluator", evaluator),
        *(encoded(kind, size) for kind, size in recipe.latents),
        *(trained(f"denoiser-{kind}", partial(denoiser, kind)) for kind in TRAININGS),
        Stage("assemble", assemble),
        Stage("measure", measure),
    ]


def scaled(recipe: Recipe, scale: float) -> Recipe:
    """``recipe`` with ``scale`` times the steps and samples."""

    def times(number: int) -> int:
        return max(1, round(number * scale))

    return replace(
        recipe,
        text_steps=times(recipe.text_steps),
        image_vae=replace(
            recipe.image_vae, joint=times(recipe.image_vae.joint), decoder=times(recipe.image_vae.decoder)
        ),
        video_vae=replace(
            recipe.video_vae, joint=times(recipe.video_vae.joint), decoder=times(recipe.video_vae.decoder)
        ),
        latents={key: times(count) for key, count in recipe.latents.items()},
        denoisers={k: tuple(replace(p, steps=times(p.steps)) for p in v) for k, v in recipe.denoisers.items()},
        evaluator_steps=times(recipe.evaluator_steps),
    )


def run_all(
    work: Path,
    recipe: Recipe,
    *,
    only: Sequence[str] = (),
    minutes: float = float("inf"),
    bfloat16: bool | None = None,
) -> bool:
    """Runs the stages that are not done, of those whose names begin with one of ``only``, if any is given.

    Returns:
        True if none of them is left.

    Raises:
        SystemExit: no stage has such a name, or another process is at one of them.
    """
    end = time.monotonic() + 60 * minutes
    bfloat16 = native_bfloat16() if bfloat16 is None else bfloat16
    everything = stages(work, recipe, bfloat16)
    for prefix in only:
        if not any(stage.name.startswith(prefix) for stage in everything):
            names = ", ".join(stage.name for stage in everything)
            raise SystemExit(f"no stage begins with {prefix!r}; there are {names}")
    for stage in everything:
        if only and not stage.name.startswith(tuple(only)):
            continue
        if (work / stage.name / "done.json").exists():
            print(f"{stage.name}: done")
            continue
        if time.monotonic() > end:
            print(f"{stage.name}: not begun, no time left")
            return False
        with _alone(work / stage.name):
            finished = stage.run(end - time.monotonic())
        if not finished:
            print(f"{stage.name}: not finished, the same command goes on with it")
            return False
    return True


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps a second process out of ``folder``; the system lets go of the lock when this one ends or is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another process works on {folder.name}; choose other stages with --stage") from None
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", nargs="*", default=(), help="only stages whose names begin with one of these")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after about so long")
    parser.add_argument("--scale", type=float, default=1.0, help="times the steps and samples of the recipe")
    parser.add_argument("--phases", type=int, help="only the first so many of each denoiser")
    parser.add_argument("--threads", type=int, default=1, help="of torch; more were not faster on small shapes")
    parser.add_argument("--work", type=Path, default=WORK, help="checkpoints and results [~/.cache/diffaccel-make]")
    parser.add_argument("--smoke", action="store_true", help="two steps of everything")
    parser.add_argument(
        "--from-assets",
        action="store_true",
        help="take VAEs and text encoders from assets/ where their stage is not done",
    )
    parser.add_argument("--install", action="store_true", help="in the end, put what is assembled into assets/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = SMOKE if options.smoke else scaled(FULL, options.scale)
    if options.phases is not None:
        recipe = replace(recipe, denoisers={k: v[: options.phases] for k, v in recipe.denoisers.items()})
    if options.from_assets:
        restore(options.work)
    run_all(options.work, recipe, only=options.stage, minutes=options.minutes)
    if options.install:
        from diffaccel.assets.make.assemble import install_all

        install_all(options.work)


if __name__ == "__main__":
    main()

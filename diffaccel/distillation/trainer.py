"""The training loop: on accelerate, resumable to the step with the same result, its curve on disk as it goes."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffaccel.checkpoint import load_state, save_state
from diffaccel.denoiser import Denoiser
from diffaccel.distillation.losses import Features, distance, features_distance, shared_modules
from diffaccel.distillation.settings import Distillation
from diffaccel.distillation.states import State, collate, load_run
from diffaccel.latents import output_tensors

COLUMNS = ("step", "loss", "output", "features", "attention", "task", "rate", "seconds")
_PROBED = 8  # batches on which guided rates are measured

Show = Callable[[int, float], None]


class Trainer:
    """Teaches one denoiser from recorded calls.

    Nothing random is carried from step to step, so a run that was killed and goes on from its checkpoint ends with the
    same weights as one that was not (float32, one process, one machine).

    Args:
        student: what is trained; in evaluation mode, as it stays.
        teacher: what is called beside it, for the distance to its features; None where outputs suffice.
        files: of recorded runs.
        recorded: the identity that they carry.
        folder: gets ``curve.csv``, ``state.safetensors`` and ``samples``.
        sample: makes a picture of the student at a step and returns it, for `Distillation.sample_every`.
        show: is told each step and its loss.
    """

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser | None,
        files: Sequence[Path],
        recorded: str,
        settings: Distillation,
        folder: Path,
        *,
        trained: Sequence[nn.Parameter],
        sample: Callable[[int], Any] | None = None,
        show: Show = lambda step, loss: None,
    ) -> None:
        self._student, self._teacher, self._settings, self._folder = student, teacher, settings, folder
        self._trained, self._sample, self._show = list(trained), sample, show
        self._load = lru_cache(maxsize=64)(lambda file: load_run(file, recorded))
        self._places = [(file, i) for file in files for i in range(len(self._load(file)))]
        told = [recorded, len(self._places), asdict(settings), [tuple(p.shape) for p in self._trained]]
        self._identity = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
        self._accelerator = Accelerator(cpu=next(student.module.parameters()).device.type == "cpu")
        self._hooks: dict[str, tuple[Features, Features]] = {}

    def run(self) -> None:
        """Train to the end, from the last checkpoint if there is one, and leave the averaged weights in the student.

        Raises:
            InputError: ``folder`` holds the training of something else.
        """
        settings, accelerator = self._settings, self._accelerator
        file = self._folder / "state.safetensors"
        factors = self._factors() if settings.guided_rates and not file.exists() else torch.ones(len(self._trained))
        groups = [{"params": [p], "factor": 1.0} for p in self._trained]
        # The fused and foreach forms sum in other orders on other machines; one tensor at a time does not.
        optimizer = torch.optim.AdamW(groups, lr=settings.rate, weight_decay=settings.decay, foreach=False)
        average = [p.detach().clone() for p in self._trained]
        done, more = load_state(file, self._identity, self._trained, optimizer)
        if more:
            factors = more["factors"]
            average = [more[f"average.{i}"].to(p.device) for i, p in enumerate(self._trained)]
        for group, factor in zip(optimizer.param_groups, factors.tolist(), strict=True):
            group["factor"] = factor
        module, optimizer = accelerator.prepare(self._student.module, optimizer)
        model: Any = self._student.module
        checkpointing = settings.checkpointing and hasattr(model, "enable_gradient_checkpointing")
        if checkpointing:
            model.enable_gradient_checkpointing()
        curve = _Curve(self._folder / "curve.csv", done) if accelerator.is_main_process else None
        self._watch_features()
        try:
            for step in range(done, settings.steps):
                started = time.perf_counter()
                rate = settings.rate * _height(step, settings)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["factor"]
                losses = self._losses(module, self._batch(step))
                accelerator.backward(losses["loss"])
                accelerator.clip_grad_norm_(self._trained, settings.clip)
                optimizer.step()
                optimizer.zero_grad()
                self._move(average, step)
                values = {name: float(accelerator.reduce(v.detach(), "mean")) for name, v in losses.items()}
                if curve is not None:
                    curve.add({"step": step + 1, **values, "rate": rate, "seconds": time.perf_counter() - started})
                self._show(step + 1, values["loss"])
                last = step + 1 == settings.steps
                if accelerator.is_main_process and (last or (step + 1) % settings.save_every == 0):
                    kept = {f"average.{i}": a for i, a in enumerate(average)} | {"factors": factors}
                    plain = getattr(optimizer, "optimizer", optimizer)
                    save_state(file, self._identity, step + 1, self._trained, plain, kept)
                if settings.sample_every and (last or (step + 1) % settings.sample_every == 0):
                    self._draw(step + 1)
        finally:
            for pair in self._hooks.values():
                for features in pair:
                    features.remove()
            if checkpointing:
                model.disable_gradient_checkpointing()
        with torch.no_grad():
            for parameter, value in zip(self._trained, average, strict=True):
                parameter.copy_(value)

    # --- one step ----------------------------------------------------------------------------------------------------

    def _batch(self, step: int) -> State:
        """The states of a step: every epoch goes through all of them in an order of its own."""
        size = self._settings.batch * self._accelerator.num_processes
        first = step * size + self._accelerator.process_index * self._settings.batch
        places = [self._place(first + i) for i in range(self._settings.batch)]
        state = collate([self._load(file)[i] for file, i in places])
        device = next(self._student.module.parameters()).device
        moved = pytree.tree_map_only(Tensor, lambda t: t.to(device), [state.arguments, state.targets, state.answers])
        return State(moved[0], moved[1], state.timestep, moved[2])

    def _place(self, position: int) -> tuple[Path, int]:
        epoch, index = divmod(position, len(self._places))
        return self._places[_order(self._settings.seed, epoch, len(self._places))[index]]

    def _losses(self, module: nn.Module, state: State) -> dict[str, Tensor]:
        settings = self._settings
        device_type = next(self._student.module.parameters()).device.type
        cast = torch.autocast(device_type, torch.bfloat16) if settings.precision == "bf16" else nullcontext()
        with cast:
            found = output_tensors(module(**_for(self._student.module, state.arguments)))
            if self._teacher is not None and self._hooks:
                with torch.no_grad():
                    self._teacher.module(**state.arguments)
        zero = found[0].new_zeros((), dtype=torch.float32)
        parts = {"output": distance(found, state.targets), "features": zero, "attention": zero, "task": zero}
        for name, (ours, theirs) in self._hooks.items():
            parts[name] = features_distance(ours.take(), theirs.take()).to(zero.device)
        if settings.task and state.answers:
            parts["task"] = distance(found, state.answers)
        loss = zero
        for name, value in parts.items():
            if weight := getattr(settings, name):
                loss = loss + weight * value
        return {"loss": loss, **parts}

    def _move(self, average: list[Tensor], step: int) -> None:
        """The running average follows; at first faster, so that it is not the beginning that is averaged."""
        decay = min(self._settings.average, (1 + step) / (10 + step)) if self._settings.average else 0.0
        with torch.no_grad():
            for kept, parameter in zip(average, self._trained, strict=True):
                kept.lerp_(parameter, 1 - decay)

    # --- beside it ---------------------------------------------------------------------------------------------------

    def _watch_features(self) -> None:
        if self._teacher is None:
            return
        for name, kind in (("features", "blocks"), ("attention", "attention")):
            if getattr(self._settings, name):
                ours, theirs = shared_modules(self._student, self._teacher, kind)
                self._hooks[name] = Features(ours), Features(theirs)

    def _factors(self) -> Tensor:
        """By trained weight, a factor on its rate: the median reaction of the loss over that of its block, at most 1.

        The reaction is the mean of |gradient x weight| over a few batches (HierarchicalPrune's SGDistill goes by the
        sensitivity of blocks too).
        """
        blocks = [name for name, _ in self._student.blocks]
        names = {id(p): n for n, p in self._student.module.named_parameters()}
        owners = [next((b for b in blocks if names[id(p)].startswith(b + ".")), "") for p in self._trained]
        sums, counts = dict.fromkeys(owners, 0.0), dict.fromkeys(owners, 0)
        for step in range(_PROBED):
            loss = self._losses(self._student.module, self._batch(step))["loss"]
            gradients = torch.autograd.grad(loss, self._trained, allow_unused=True)
            for owner, parameter, gradient in zip(owners, self._trained, gradients, strict=True):
                if gradient is not None:
                    sums[owner] += float((gradient * parameter.detach()).abs().sum())
                    counts[owner] += parameter.numel()
        reactions = {owner: sums[owner] / max(counts[owner], 1) for owner in sums}
        median = sorted(reactions.values())[len(reactions) // 2]
        return torch.tensor([min(1.0, median / max(reactions[owner], 1e-30)) for owner in owners])

    def _draw(self, step: int) -> None:
        if self._sample is None or not self._accelerator.is_main_process:
            return
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            picture = self._sample(step)
        folder = self._folder / "samples"
        folder.mkdir(exist_ok=True)
        picture.save(folder / f"step-{step:06d}.png")


def _for(module: nn.Module, arguments: Any) -> Any:
    """What a teacher of 16 bits was asked, as a student of 32 bits takes it."""
    weight = next(p for p in module.parameters() if p.is_floating_point())

    def widened(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor

    return pytree.tree_map_only(Tensor, widened, arguments) if weight.dtype == torch.float32 else arguments


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    number = int.from_bytes(hashlib.sha256(repr((seed, epoch)).encode()).digest()[:7], "big")
    return torch.randperm(count, generator=torch.Generator().manual_seed(number)).tolist()


def _height(step: int, settings: Distillation) -> float:
    warm = min(1.0, (step + 1) / max(settings.warmup, 1))
    return warm * (0.55 + 0.45 * math.cos(math.pi * step / settings.steps))


class _Curve:
    """``curve.csv``, a line a step, written as it goes; what a killed run wrote beyond its checkpoint is dropped."""

    def __init__(self, file: Path, done: int) -> None:
        rows: list[dict[str, str]] = []
        if file.exists() and done:
            with file.open(newline="") as old:
                rows = [
                    r for r in csv.DictReader(old) if r["step"].isdigit() and int(r["step"]) <= done and r["seconds"]
                ]
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        with partial.open("w", newline="") as new:
            writer = csv.DictWriter(new, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(partial, file)
        self._file = file

    def add(self, row: dict[str, Any]) -> None:
        with self._file.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)

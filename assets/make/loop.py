"""The training loop of every stage: resumable to the step, with checkpoints, a learning curve and a record.

Nothing random is carried from step to step: the generators of step k are seeded by (stage, seed, k), so a run that was
killed and goes on from its last checkpoint ends with the same weights as one that was not (on one machine, one thread).
"""

from __future__ import annotations

import csv
import json
import os
import platform
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from torch import Tensor, nn

from diffaccel.assets.make.muon import Muon
from diffaccel.assets.make.plain_attention import PlainAttention

Metrics = dict[str, float]


BEFORE = "before.json"  # beside a checkpoint: the record of what the training went on from


@dataclass(frozen=True)
class Rates:
    """Learning rates at the schedule's height 1, and what goes with them.

    Args:
        muon: for the matrices.
        adam: for all else.
        slow: factor on ``adam`` for the modules in ``Training.slow``.
        momentum: of Muon.
        betas: of AdamW.
        clip: largest norm of the whole gradient.
        average: decay of the running average of the weights, which is what is kept in the end.
    """

    muon: float
    adam: float
    slow: float = 0.3
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 2.0
    average: float = 0.995


class Training(ABC):
    """One stage: what is trained, on what, for how long. Everything it draws comes from the generators of the step."""

    name: str
    steps: int
    begin: int = 0  # the step that the initial weights have reached
    seed: int = 0
    rates: Rates
    modules: dict[str, nn.Module]
    slow: tuple[str, ...] = ()

    @abstractmethod
    def loss(self, step: int, rng: np.random.Generator) -> tuple[Tensor, Metrics]:
        """The loss of step ``step`` and what else the curve should show. torch's own generator is seeded too."""

    @abstractmethod
    def finish(self, folder: Path) -> dict[str, Any]:
        """Called with the averaged weights in place: saves the result into ``folder``, returns facts worth keeping."""

    def height(self, step: int) -> float:
        """The schedule, times every rate: warm-up over 50 steps, then a cosine to zero."""
        return min(1.0, (step + 1) / 50) * max(0.01, 0.5 + 0.5 * float(np.cos(np.pi * step / self.steps)))

    def is_matrix(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether Muon steps ``parameter``; AdamW has the rest."""
        return False


def native_bfloat16() -> bool:
    """Whether this machine multiplies bfloat16 matrices by instructions of its own (AMX, AVX512-BF16, or a GPU).

    Elsewhere bfloat16 is slower than float32: 5x on an AVX2 processor, against 10x faster with AMX and 2x with
    AVX512-BF16.
    """
    cpu = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.cuda.is_available() or bool(cpu)


class Loop:
    """Runs one ``Training`` in ``folder``.

    Args:
        training: fresh, with initial weights.
        folder: where checkpoint, curve and result go; what is already there is gone on from.
        bfloat16: autocast of the forward pass and Muon's iteration. Weights stay float32.
        checkpoint_seconds: at most so much work is lost when the process is killed.
        curve_steps: steps per line of the learning curve.
    """

    def __init__(
        self,
        training: Training,
        folder: Path,
        *,
        bfloat16: bool,
        checkpoint_seconds: float = 180.0,
        curve_steps: int = 25,
    ) -> None:
        self.training, self.folder, self.bfloat16 = training, folder, bfloat16
        self.checkpoint_seconds, self.curve_steps = checkpoint_seconds, curve_steps
        self.step, self.wall, self.processor = training.begin, 0.0, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        rates, modules = training.rates, training.modules
        named = {f"{m}.{n}": p for m, module in modules.items() for n, p in module.named_parameters()}
        named = {name: p for name, p in named.items() if p.requires_grad}
        matrices = {name: p for name, p in named.items() if training.is_matrix(name, p)}
        rest = {name: p for name, p in named.items() if name not in matrices}
        slow = [p for name, p in rest.items() if name.split(".")[0] in training.slow]
        fast = [p for name, p in rest.items() if name.split(".")[0] not in training.slow]
        self.parameters = list(named.values())
        self.muon = Muon(matrices.values(), rates.momentum, torch.bfloat16 if bfloat16 else torch.float32)
        groups = [{"params": fast, "part": 1.0}, {"params": slow, "part": rates.slow}]
        self.adam = torch.optim.AdamW([g for g in groups if g["params"]], betas=rates.betas, weight_decay=0.0)
        self.average = {k: v.detach().clone() for k, v in self._floats().items()}
        if self.checkpoint.exists():
            self._load()

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def run(self, seconds: float = float("inf")) -> bool:
        """Trains until all steps are done or ``seconds`` have passed; True if the stage is finished."""
        training, start, saved = self.training, time.monotonic(), time.monotonic()
        marks = time.monotonic(), time.process_time()
        seen: list[Metrics] = []
        for module in training.modules.values():
            module.train()
        while self.step < training.steps:
            if time.monotonic() - start > seconds:
                self._save()
                return False
            seen.append(self._one_step())
            self.step += 1
            now = time.monotonic(), time.process_time()
            self.wall, self.processor = self.wall + now[0] - marks[0], self.processor + now[1] - marks[1]
            marks = now
            if self.step % self.curve_steps == 0 or self.step == training.steps:
                self._write_curve(seen)
                seen = []
            if time.monotonic() - saved >= self.checkpoint_seconds:
                self._save()
                saved = time.monotonic()
        self._save()
        self._finish()
        return True

    def _one_step(self) -> Metrics:
        training, rates = self.training, self.training.rates
        seeds = [zlib.crc32(training.name.encode()), training.seed, self.step]
        rng = np.random.default_rng(seeds)
        torch.manual_seed(int(rng.integers(2**62)))
        for parameter in self.parameters:
            parameter.grad = None
        attention = PlainAttention() if self.bfloat16 else nullcontext()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16), attention:
            loss, metrics = training.loss(self.step, rng)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, rates.clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"{training.name}: the gradient of step {self.step} is not finite; lower the rates"
            )
        height = training.height(self.step)
        for group in self.adam.param_groups:
            group["lr"] = rates.adam * height * group["part"]
        self.adam.step()
        self.muon.step(rates.muon * height)
        decay = min(rates.average, 1 - 1 / (self.step / 5 + 2))
        torch._foreach_lerp_(list(self.average.values()), list(self._floats().values()), 1 - decay)
        return {"loss": float(loss.detach()), "gradient": float(norm), "height": height, **metrics}

    def _floats(self) -> dict[str, Tensor]:
        states = {f"{m}.{k}": v for m, mod in self.training.modules.items() for k, v in mod.state_dict().items()}
        return {k: v.detach() for k, v in states.items() if v.is_floating_point()}

    def _save(self) -> None:
        """Atomic: a killed process leaves the checkpoint before or the new one, never half of one."""
        state = {
            "step": self.step,
            "steps": self.training.steps,
            "wall": self.wall,
            "processor": self.processor,
            "modules": {name: module.state_dict() for name, module in self.training.modules.items()},
            "average": self.average,
            "adam": self.adam.state_dict(),
            "muon": self.muon.state(),
        }
        part = self.checkpoint.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self.checkpoint)

    def _load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        if state["steps"] != self.training.steps:
            raise ValueError(
                f"{self.checkpoint} belongs to a run of {state['steps']} steps, not {self.training.steps}: the "
                f"schedule depends on the number; ask for {state['steps']} again, or delete {self.folder}"
            )
        self.step, self.wall, self.processor = state["step"], state["wall"], state["processor"]
        for name, module in self.training.modules.items():
            module.load_state_dict(state["modules"][name])
        self.average = state["average"]
        self.adam.load_state_dict(state["adam"])
        self.muon.load(state["muon"])
        curve = self.folder / "curve.csv"
        if curve.exists():  # what was written after this checkpoint happens again
            head, *lines = curve.read_text().splitlines()
            kept = [line for line in lines if int(line.split(",")[0]) <= self.step]
            curve.write_text("\n".join([head, *kept]) + "\n")

    def _write_curve(self, seen: list[Metrics]) -> None:
        row = {name: f"{float(np.mean([m[name] for m in seen if name in m])):.5g}" for name in seen[-1]}
        row = {"step": str(self.step), "wall_s": f"{self.wall:.0f}", **row}
        curve = self.folder / "curve.csv"
        fresh = not curve.exists()
        with curve.open("a", newline="") as file:
            writer = csv.DictWriter(file, row.keys())
            if fresh:
                writer.writeheader()
            writer.writerow(row)
        print(f"{self.training.name}: " + " ".join(f"{k} {v}" for k, v in row.items()), flush=True)

    def _finish(self) -> None:
        modules = self.training.modules
        for name, module in modules.items():
            averaged = {k.removeprefix(f"{name}."): v for k, v in self.average.items() if k.startswith(f"{name}.")}
            module.load_state_dict({**module.state_dict(), **averaged})
            module.eval()
        with torch.no_grad():
            facts = self.training.finish(self.folder / "result")
        wall, processor = minutes_before(self.folder)
        facts = self._conditions() | facts
        write_record(self.folder, self.training.name, self.wall + wall * 60, self.processor + processor * 60, facts)

    def _conditions(self) -> dict[str, Any]:
        t = self.training
        count = sum(p.numel() for p in self.parameters)
        return {"steps": t.steps, "seed": t.seed, "parameters": count, "bfloat16": self.bfloat16}


def minutes_before(folder: Path) -> tuple[float, float]:
    """Wall and processor minutes of the sittings that what is installed came from, see `restore.record_before`."""
    file = folder / BEFORE
    record = json.loads(file.read_text()) if file.exists() else {}
    return record.get("wall_minutes", 0.0), record.get("processor_minutes", 0.0)


def write_record(folder: Path, name: str, wall: float, processor: float, facts: Mapping[str, Any]) -> None:
    """``done.json``: what made the result, and that it is complete."""
    record = {
        "stage": name,
        "wall_minutes": round(wall / 60, 2),
        "processor_minutes": round(processor / 60, 2),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": {m.__name__: m.__version__ for m in (torch, diffusers, transformers, np)},
        **facts,
    }
    write_text(folder / "done.json", json.dumps(record, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes ``path`` whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)

"""What calibration keeps of the denoiser's outputs along true trajectories, and what it tells about skipped steps.

With v_i the output at step i, the table of inner products <v_i, v_j> (the Gram matrix) of a few prompts gives the
error of every forecast that is linear in earlier outputs, whatever was computed before, and how the errors of several
skipped steps add up or cancel. Between the timesteps that were measured v is interpolated by cubics, so that one table
serves other step counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from diffaccel.plan import Artefacts

_PREFIX = "caching"


@dataclass(frozen=True)
class Trajectory:
    """One branch of one denoiser.

    Attributes:
        timesteps: in the order of the run, [T].
        gram: of each prompt the inner products of the outputs, over the mean square of an output, [P, T, T].
    """

    timesteps: tuple[float, ...]
    gram: np.ndarray

    def at(self, timesteps: Sequence[float]) -> Trajectory:
        """The same for another schedule; itself for its own."""
        wanted = tuple(timesteps)
        if wanted == self.timesteps:
            return self
        last = {t: i for i, t in enumerate(self.timesteps)}  # a second-order scheduler repeats some: the later counts
        knots = sorted(last)
        rows = [last[t] for t in knots]
        weights = np.stack([_cubic(knots, t) for t in wanted])
        return Trajectory(wanted, weights @ self.gram[:, rows][:, :, rows] @ weights.T)

    def error(self, coefficients: Mapping[int, float]) -> float:
        """Mean square of a combination of outputs, by step, over that of an output."""
        steps = list(coefficients)
        c = np.array([coefficients[i] for i in steps])
        squares = c @ self.gram[:, steps][:, :, steps] @ c
        return max(float(squares.mean()), 0.0)

    def slope(self, i: int, j: int, k: int) -> float:
        """The a for which v_j + a (v_j - v_k) comes nearest to v_i, cautiously: a standard deviation of the prompts
        below their mean, and never back."""
        g = self.gram
        rise = g[:, j, j] - 2 * g[:, j, k] + g[:, k, k]
        along = (g[:, i, j] - g[:, i, k]) - (g[:, j, j] - g[:, j, k])
        best = along / np.maximum(rise, 1e-12)
        return max(float(best.mean() - best.std()), 0.0)

    def slope_at(self, at: float, last: float, before: float) -> float:
        """The same by timesteps, which need not be in the table."""
        return self.at((at, last, before)).slope(0, 1, 2)


def _cubic(knots: Sequence[float], t: float) -> np.ndarray:
    """Weights of Lagrange's cubic through the four knots around ``t``; outside of all, the nearest end."""
    t = min(max(t, knots[0]), knots[-1])
    first = int(np.clip(np.searchsorted(knots, t) - 2, 0, max(len(knots) - 4, 0)))
    near = range(first, min(first + 4, len(knots)))
    weights = np.zeros(len(knots))
    for i in near:
        weights[i] = np.prod([(t - knots[m]) / (knots[i] - knots[m]) for m in near if m != i])
    return weights


@dataclass(frozen=True)
class Trajectories:
    """What a plan holds for one denoiser.

    Attributes:
        branches: by name.
        timesteps: where the sensitivity is known, falling or rising, [P].
        sensitivity: root mean square error of the pipeline's result for a relative error of 1 of a step's output, by
            unit of the timestep that the step covers, [P].
        correction: by how many dB whole runs were worse than expected.
    """

    branches: Mapping[str, Trajectory]
    timesteps: tuple[float, ...]
    sensitivity: tuple[float, ...]
    correction: float

    def branch(self, name: str) -> Trajectory:
        """That of a branch; of a name that was not measured, the first one's."""
        return self.branches.get(name) or next(iter(self.branches.values()))

    @property
    def schedule(self) -> tuple[float, ...]:
        """The timesteps of the runs that were measured."""
        return next(iter(self.branches.values())).timesteps

    def weights(self, timesteps: Sequence[float]) -> np.ndarray:
        """Error of the result for a relative error of 1 of each step's output, [T]."""
        order = np.argsort(self.timesteps)
        knots, logs = np.array(self.timesteps)[order], np.log(np.array(self.sensitivity)[order])
        return np.exp(np.interp(timesteps, knots, logs)) * spans(timesteps)


def spans(timesteps: Sequence[float]) -> np.ndarray:
    """How far each step goes in units of the timestep, to the next other value or as far as the one before, [T]."""
    t = np.asarray(timesteps, dtype=float)
    if len(t) == 1:
        return np.ones(1)
    moves = np.abs(np.diff(t))
    moves = np.append(moves, min(abs(t[-1]), moves[-1]) or moves[-1])
    return np.maximum(moves, 1e-6 * max(moves.max(), 1e-6))


def trajectories_of(artefacts: Artefacts, component: str) -> Trajectories | None:
    """What a plan holds for one denoiser; None: it was not measured."""
    prefix = f"{_PREFIX}.{component}."
    branches = {
        name.removeprefix(prefix).removesuffix(".gram"): Trajectory(
            tuple(artefacts[name.removesuffix("gram") + "steps"].tolist()), artefacts[name].double().numpy()
        )
        for name in artefacts
        if name.startswith(prefix) and name.endswith(".gram")
    }
    if not branches:
        return None
    timesteps, sensitivity = artefacts[f"{prefix}sensitivity"].tolist()
    return Trajectories(branches, tuple(timesteps), tuple(sensitivity), float(artefacts[f"{prefix}correction"]))


def artefacts_of(component: str, found: Trajectories) -> dict[str, torch.Tensor]:
    """The inverse of `trajectories_of`."""
    prefix = f"{_PREFIX}.{component}."
    tensors = {
        f"{prefix}sensitivity": torch.tensor([found.timesteps, found.sensitivity], dtype=torch.float64),
        f"{prefix}correction": torch.tensor(found.correction, dtype=torch.float64),
    }
    for name, branch in found.branches.items():
        tensors[f"{prefix}{name}.steps"] = torch.tensor(branch.timesteps, dtype=torch.float64)
        tensors[f"{prefix}{name}.gram"] = torch.from_numpy(branch.gram.copy())
    return tensors

"""Measures what a static schedule needs: trajectories, what an error at each step does to the result, and whether the
sum of it all is right.

For each prompt: one run as it is; some runs in which one step is forecast instead of computed, for which the steps
before are replayed; and runs with schedules, whose PSNR is compared with what was expected of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from diffaccel.caching.decisions import Decisions, noise_level
from diffaccel.caching.lags import LagRecorder
from diffaccel.caching.modules import chosen
from diffaccel.caching.root import CachedRoot
from diffaccel.caching.section import StepCache
from diffaccel.caching.trajectory import Trajectories, Trajectory, artefacts_of, spans
from diffaccel.clock import Call
from diffaccel.errors import PlanError
from diffaccel.latents import output_like, output_tensors, skeleton
from diffaccel.root import Compute, Wrapper
from diffaccel.technique import Context

Run = Callable[[], Tensor]
"""Runs the pipeline on one prompt, each time with the same noise: its result, floats in [0, 1]."""

PROBES = 8
"""Steps at which it is measured what an error does to the result."""

SHARES = (0.35, 0.5, 0.65)
"""Of computed steps, of the schedules that are tried."""

LENGTH = 1 + PROBES + len(SHARES)
"""Runs for each prompt."""

_LEAST = 1e-9  # mean square error below which two results count as equal


@dataclasses.dataclass
class _Step:
    """A recorded call; ``template`` is its output without values."""

    step: int
    timestep: float
    template: Any
    outputs: list[Tensor]


class _Recorder:
    """Keeps the outputs of all denoisers' calls in one run."""

    def __init__(self) -> None:
        self.calls: dict[tuple[str, str, int], _Step] = {}

    def wrapper(self, component: str) -> Wrapper:
        def record(call: Call, arguments: Mapping[str, Any], compute: Compute) -> Any:
            output = compute()
            outputs = [v.detach().clone() for v in output_tensors(output)]
            if outputs and call.timestep is not None:
                step = _Step(call.step, call.timestep, skeleton(output), outputs)
                self.calls[component, call.branch, call.step] = step
            return output

        return record

    def lines(self) -> dict[tuple[str, str], list[_Step]]:
        """The calls by component and branch, in order."""
        found: dict[tuple[str, str], list[_Step]] = {}
        for key in sorted(self.calls, key=lambda k: k[2]):
            found.setdefault(key[:2], []).append(self.calls[key])
        return found


class _Probe:
    """Replays a recorded run up to one step, holds the outputs before for that step, and computes the rest."""

    def __init__(self, recorded: Mapping[tuple[str, str, int], _Step], step: int) -> None:
        self._recorded, self._step = recorded, step

    def wrapper(self, component: str) -> Wrapper:
        def probe(call: Call, arguments: Mapping[str, Any], compute: Compute) -> Any:
            source = min(call.step, self._step - 1)
            known = self._recorded.get((component, call.branch, source))
            if call.step > self._step or known is None:
                return compute()
            return output_like(known.template, [v.clone() for v in known.outputs])

        return probe


def measure(context: Context, section: StepCache, runs: Sequence[Run]) -> dict[str, Tensor]:
    """The artefacts of every denoiser.

    Args:
        context: of a pipeline with everything attached but caching.
        section: what is calibrated for.
        runs: one for each prompt.

    Raises:
        PlanError: the prompts' runs have different timesteps.
    """
    recorders, references = [], []
    for run in runs:
        recorder = _Recorder()
        with _wrapped(context, recorder.wrapper):
            references.append(run())
        recorders.append(recorder)
    lines = [recorder.lines() for recorder in recorders]
    branches: dict[str, dict[str, Trajectory]] = {}
    for component, branch in lines[0] if lines else ():
        own = [line[component, branch] for line in lines if (component, branch) in line]
        if len({tuple(step.timestep for step in run) for run in own}) > 1:
            raise PlanError("a schedule is calibrated for one list of timesteps, and these prompts' calls have several")
        trajectory = _trajectory(own)
        branches.setdefault(component, {})[branch] = trajectory
    found = {
        component: Trajectories(by_branch, *_sensitivity(component, lines, recorders, runs, references, context), 0.0)
        for component, by_branch in branches.items()
    }
    correction = _correction(context, section, found, runs, references)
    artefacts: dict[str, Tensor] = {}
    for component, known in found.items():
        artefacts |= artefacts_of(component, dataclasses.replace(known, correction=correction))
    return artefacts


def measure_lags(context: Context, section: StepCache, runs: Sequence[Callable[[], Any]]) -> dict[str, Tensor]:
    """SmoothCache's artefacts of every denoiser."""
    sites = chosen(context.denoisers, section.sites)
    recorders = {}
    for denoiser in context.denoisers:
        recorder = LagRecorder(denoiser, sites.get(denoiser.component, ()), section.max_skips, context)
        recorders[denoiser.component] = recorder
    with _wrapped(context, recorders.get):
        for run in runs:
            run()
    return {name: tensor for recorder in recorders.values() for name, tensor in recorder.artefacts()}


def _trajectory(runs: Sequence[Sequence[_Step]]) -> Trajectory:
    """The Gram matrices of runs of one branch."""
    grams = []
    for run in runs:
        gram = np.zeros((len(run), len(run)))
        for i, one in enumerate(run):
            for j, other in enumerate(run[: i + 1]):
                gram[i, j] = gram[j, i] = sum(
                    float((a.float() * b.float()).sum(dtype=torch.float64))
                    for a, b in zip(one.outputs, other.outputs, strict=True)
                )
        grams.append(gram / gram.diagonal().mean())
    return Trajectory(tuple(step.timestep for step in runs[0]), np.stack(grams))


def _sensitivity(
    component: str,
    lines: Sequence[Mapping[tuple[str, str], Sequence[_Step]]],
    recorders: Sequence[_Recorder],
    runs: Sequence[Run],
    references: Sequence[Tensor],
    context: Context,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Timesteps, and the error of the result there for a relative error of 1, by unit of timestep."""
    first = next(line for (name, _), line in lines[0].items() if name == component)
    places = sorted({round(p) for p in np.linspace(1, len(first) - 1, PROBES)} - {0})
    if not places:  # one step: nothing can be skipped
        return (first[0].timestep,), (1.0,)
    reach = spans([step.timestep for step in first])
    logs = np.zeros(len(places))
    for recorder, line, run, reference in zip(recorders, lines, runs, references, strict=True):
        own = [steps for (name, _), steps in line.items() if name == component]
        for n, place in enumerate(places):
            with _wrapped(context, _Probe(recorder.calls, own[0][place].step).wrapper):
                changed = mean_square(run(), reference)
            relative = float(np.mean(_relative_squares(own, own[0][place].step)))
            logs[n] += 0.5 * math.log(max(changed, _LEAST) / max(relative, 1e-12)) - math.log(reach[place])
    values = np.exp(logs / len(runs))
    return tuple(first[place].timestep for place in places), tuple(values.tolist())


def _relative_squares(branches: Sequence[Sequence[_Step]], step: int) -> list[float]:
    """Of each branch the mean square change of its output from the step before, over that of its outputs."""
    found = []
    for steps in branches:
        by_step = {s.step: s.outputs for s in steps}
        if step not in by_step or step - 1 not in by_step:  # a branch that guidance leaves out there
            continue
        pairs = zip(by_step[step], by_step[step - 1], strict=True)
        change = sum(float((a.float() - b.float()).square().sum()) for a, b in pairs)
        size = sum(float(v.float().square().sum()) for outputs in by_step.values() for v in outputs) / len(by_step)
        found.append(change / max(size, 1e-30))
    return found


def _correction(
    context: Context,
    section: StepCache,
    found: Mapping[str, Trajectories],
    runs: Sequence[Run],
    references: Sequence[Tensor],
) -> float:
    """By how many dB schedules are worse than expected, on the mean of those tried."""
    excesses = []
    for share in SHARES:
        tried = dataclasses.replace(section, policy="schedule", psnr=None, share=share, forecast=_known(section))
        decisions = {
            name: Decisions(
                tried,
                context.clock,
                noise_level(context.pipeline),
                {},
                known,
                [other for component, other in found.items() if component != name],
            )
            for name, known in found.items()
        }
        caches = {name: CachedRoot(tried, d) for name, d in decisions.items()}
        for run, reference in zip(runs, references, strict=True):
            with _wrapped(context, caches.get):
                error = mean_square(run(), reference)
            expected = [10 ** (-d.chosen.psnr / 10) for d in decisions.values() if d.chosen is not None]
            if sum(expected) > 0 and error > _LEAST:
                excesses.append(10 * math.log10(error / sum(expected)))
    return float(np.mean(excesses)) if excesses else 0.0


def _known(section: StepCache) -> str:
    """The section's forecast, or another whose errors trajectories tell."""
    return section.forecast if section.forecast in ("hold", "linear", "fitted") else "fitted"


@contextmanager
def _wrapped(context: Context, wrapper: Callable[[str], Wrapper | None]) -> Iterator[None]:
    """A wrapper around every denoiser's calls, outermost."""
    added = []
    for denoiser in context.denoisers:
        if (one := wrapper(denoiser.component)) is not None:
            added.append((context.root(denoiser).wrappers, one))
            added[-1][0].append(one)
    try:
        yield
    finally:
        for wrappers, one in added:
            wrappers.remove(one)


def mean_square(a: Tensor, b: Tensor) -> float:
    """Mean square difference of two results."""
    return float((a - b).square().mean())


def result_of(output: Any) -> Tensor:
    """A pipeline's result as floats, of pictures in [0, 1]: what its output class holds first."""
    first = next(iter(output.values())) if isinstance(output, Mapping) else output
    first = first[0] if isinstance(first, tuple) else first
    parts = [_floats(leaf) for leaf in pytree.tree_leaves(first)]
    return torch.cat([part.flatten() for part in parts])


def _floats(leaf: Any) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf.detach().float().cpu()
    array = np.asarray(leaf)
    return torch.from_numpy(array.astype(np.float32)) / (255 if array.dtype == np.uint8 else 1)

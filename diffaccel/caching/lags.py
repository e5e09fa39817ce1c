"""SmoothCache's schedules: for each kind of module how far its outputs move over 1, 2, ... steps, measured once.

An output is used again as long as the measured error of that, relative L1, mean over the modules of its kind, is at
most a threshold (arXiv:2411.10510, sec. 3). Between the measured timesteps and lags the errors are interpolated, so
that one calibration serves other step counts.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffaccel.caching.sites import SiteHook
from diffaccel.clock import Call
from diffaccel.denoiser import Denoiser, Site
from diffaccel.hooks import install
from diffaccel.latents import output_tensors
from diffaccel.plan import Artefacts
from diffaccel.root import Compute
from diffaccel.technique import Context


@dataclass(frozen=True)
class Lags:
    """Of one kind of module in one denoiser.

    Attributes:
        timesteps: in the order of the run, [T].
        errors: of using the output of 1, 2, ... K steps before, [T, K]; infinite where there is no such step.
    """

    timesteps: tuple[float, ...]
    errors: np.ndarray

    def schedule(
        self, timesteps: Sequence[float], threshold: float, most: int, protected: Callable[[int], bool]
    ) -> frozenset[int]:
        """The computed steps of a run: from each the longest run of skipped ones within the threshold, at most
        ``most``, and none that is ``protected``."""
        order = np.argsort(self.timesteps)
        knots = np.array(self.timesteps)[order]
        places = np.interp(timesteps, knots, order.astype(float))
        computed, step = set(), 0
        while step < len(timesteps):
            computed.add(step)
            end = step + 1
            while (
                end < len(timesteps)
                and end - step <= most
                and not protected(end)
                and self._error(places[step], places[end]) <= threshold
            ):
                end += 1
            step = end
        return frozenset(computed)

    def _error(self, last: float, now: float) -> float:
        """Of an output from one place of the measured run at another."""
        lag = max(now - last, 0.0)
        near = np.floor(now).astype(int), np.ceil(now).astype(int)
        ends = [
            np.interp(lag, np.arange(len(self.errors[row]) + 1), [0, *self.errors[row]], right=np.inf) for row in near
        ]
        share = now - near[0]
        return float(ends[0] if share == 0 else (1 - share) * ends[0] + share * ends[1])


class LagRecorder:
    """Measures one denoiser over whole runs: a wrapper of its root, with hooks on the modules."""

    def __init__(self, denoiser: Denoiser, sites: Sequence[Site], longest: int, context: Context) -> None:
        self._component, self._sites, self._longest = denoiser.component, sites, longest
        self._call: Call | None = None
        self._run = -1
        self._last: dict[tuple[str, int, int], deque[tuple[int, list[Tensor]]]] = {}
        self._seen: Counter[int] = Counter()
        self._log: dict[str, dict[tuple[int, float], list[list[float]]]] = {}
        for index, site in enumerate(sites):
            context.undo.callback(install(site.module, SiteHook(self, index), "caching"))

    def __call__(self, call: Call, arguments: Mapping[str, Any], compute: Compute) -> Any:
        if call.run != self._run:
            self._run, self._last = call.run, {}
        self._call, self._seen = call, Counter()
        try:
            return compute()
        finally:
            self._call = None

    def run(self, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """A module's call, by its hook."""
        output = compute()
        call, outputs = self._call, output_tensors(output)
        if call is not None and call.timestep is not None and outputs:
            key = (call.branch, index, self._seen[index])
            self._seen[index] += 1
            last = self._last.setdefault(key, deque(maxlen=self._longest))
            row = [float("inf")] * self._longest
            for step, earlier in last:
                if 0 < call.step - step <= self._longest:
                    row[call.step - step - 1] = _relative(outputs, earlier)
            place = (call.step, call.timestep)
            self._log.setdefault(self._sites[index].role, {}).setdefault(place, []).append(row)
            last.append((call.step, [v.detach().clone() for v in outputs]))
        return output

    def artefacts(self) -> Iterator[tuple[str, Tensor]]:
        """Named tensors: by role the timesteps and the errors (means over modules, branches and runs)."""
        for role, log in self._log.items():
            name = f"caching.{self._component}.{role}"
            steps = sorted(log)
            yield f"{name}.lag_steps", torch.tensor([t for _, t in steps], dtype=torch.float64)
            yield f"{name}.lags", torch.tensor(np.array([np.mean(log[step], axis=0) for step in steps]))


def lags_of(artefacts: Artefacts, component: str) -> dict[str, Lags]:
    """What a plan holds for one denoiser, by role."""
    prefix, found = f"caching.{component}.", {}
    for name in artefacts:
        if name.startswith(prefix) and name.endswith(".lags"):
            timesteps = artefacts[name.removesuffix("lags") + "lag_steps"].tolist()
            found[name.removeprefix(prefix).removesuffix(".lags")] = Lags(tuple(timesteps), artefacts[name].numpy())
    return found


def _relative(now: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    change = sum(float((a.float() - b.float()).abs().sum()) for a, b in zip(now, before, strict=True))
    return change / max(sum(float(b.float().abs().sum()) for b in before), 1e-30)

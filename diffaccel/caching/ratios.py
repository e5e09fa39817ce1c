"""Magnitude ratios of MagCache: how they are measured, kept in a plan, and read for another schedule.

With x the denoiser's input and v its output, the residual is r = v - x, and gamma_t is the mean over tokens of
||r_t|| / ||r_{t-1}||, t - 1 being the step before (arXiv:2506.09045, sec. 3; there r is taken around the block stack,
here around the whole denoiser). The logarithm of gamma_t is the rise of the log magnitude between two timesteps.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffaccel.clock import Call
from diffaccel.denoiser import Denoiser
from diffaccel.latents import add_leading, latent_tensors, output_tensors, partners
from diffaccel.plan import Artefacts
from diffaccel.root import Compute

_PREFIX = "caching"


class Ratios:
    """The ratios of one branch.

    Args:
        timesteps: the schedule's values in the order of the run, [T].
        gammas: gamma of each, the first one 1, [T].
    """

    def __init__(self, timesteps: Sequence[float], gammas: Sequence[float]) -> None:
        self._by_step = dict(zip(pairwise(timesteps), gammas[1:], strict=True))
        level, levels = (
            0.0,
            {},
        )  # log magnitude by timestep; a second-order scheduler repeats some: the later one counts
        for timestep, gamma in zip(timesteps, gammas, strict=True):
            level += math.log(gamma)
            levels[timestep] = level
        self._knots = sorted(levels)
        self._levels = [levels[t] for t in self._knots]
        self._margin = max((b - a for a, b in pairwise(self._knots)), default=0.0) / 2

    def between(self, earlier: float, later: float) -> float | None:
        """Gamma of the step from one timestep to the next.

        A transition that was measured gives what was measured. For another spacing each measured log ratio is spread
        evenly over the timesteps it spans, and the parts that lie between the two are added. None outside of what was
        measured (by more than half a step).
        """
        if (earlier, later) in self._by_step:
            return self._by_step[earlier, later]
        a, b = self._level(earlier), self._level(later)
        return None if a is None or b is None else math.exp(b - a)

    def _level(self, timestep: float) -> float | None:
        low, high = self._knots[0], self._knots[-1]
        if not low - self._margin <= timestep <= high + self._margin:
            return None
        timestep = min(max(timestep, low), high)
        i = bisect_left(self._knots, timestep)
        if self._knots[i] == timestep:
            return self._levels[i]
        share = (timestep - self._knots[i - 1]) / (self._knots[i] - self._knots[i - 1])
        return self._levels[i - 1] + share * (self._levels[i] - self._levels[i - 1])


def ratios_of(artefacts: Artefacts, component: str) -> dict[str, Ratios]:
    """The ratios that a plan holds for one denoiser, by branch."""
    found = {}
    for name in artefacts:
        prefix, _, rest = name.partition(f"{_PREFIX}.{component}.")
        if not prefix and rest.endswith(".ratios"):
            branch = rest.removesuffix(".ratios")
            timesteps = artefacts[f"{_PREFIX}.{component}.{branch}.timesteps"]
            found[branch] = Ratios(timesteps.tolist(), artefacts[name].tolist())
    return found


class Recorder:
    """Measures the ratios of one denoiser over whole runs. A wrapper of its root."""

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser
        self._last: dict[str, list[Tensor]] = {}  # residuals of the step before, by branch
        self._run = -1
        self._log: dict[str, dict[tuple[int, float], list[Tensor]]] = {}

    def __call__(self, call: Call, arguments: Mapping[str, Any], compute: Compute) -> Any:
        if call.run != self._run:
            self._run, self._last = call.run, {}
        inputs = [x.detach().clone() for x in latent_tensors(arguments)]  # the forward may write into its input
        output = compute()
        outputs = output_tensors(output)
        pairs = zip(outputs, partners(outputs, inputs), strict=True)
        residuals = [v.float() if i is None else add_leading(v, inputs[i], -1) for v, i in pairs]
        if call.timestep is not None and residuals:
            last = self._last.get(call.branch)
            gamma = torch.ones(()) if last is None else self._gamma(residuals, last)
            self._log.setdefault(call.branch, {}).setdefault((call.step, call.timestep), []).append(gamma)
            self._last[call.branch] = residuals
        return output

    def artefacts(self) -> Iterator[tuple[str, Tensor]]:
        """Named tensors: per branch the timesteps and the ratios (their geometric mean over runs)."""
        for branch, log in self._log.items():
            name = f"{_PREFIX}.{self._denoiser.component}.{branch}"
            steps = sorted(log)
            yield f"{name}.timesteps", torch.tensor([t for _, t in steps], dtype=torch.float64)
            gammas = [torch.stack([g.cpu() for g in log[step]]).log().mean().exp() for step in steps]
            yield f"{name}.ratios", torch.stack(gammas).to(torch.float64)

    def _gamma(self, new: list[Tensor], old: list[Tensor]) -> Tensor:
        ratios = [self._norms(a) / self._norms(b).clamp_min(1e-12) for a, b in zip(new, old, strict=True)]
        return torch.cat([r.flatten() for r in ratios]).mean().clamp_min(1e-12)

    def _norms(self, residual: Tensor) -> Tensor:
        """Norm of each token's vector; the channels are the dimension that has the config's width."""
        config = self._denoiser.config
        widths = [config.get(n) for n in ("out_channels", "in_channels", "num_channels_latents", "in_dim")]
        usual = [d for d in ((-1,) if residual.ndim == 3 else (1, 2, -1, 0)) if residual.shape[d] in widths]
        channels = usual[0] if usual else (-1 if residual.ndim == 3 else 1)
        return torch.linalg.vector_norm(residual, dim=channels)

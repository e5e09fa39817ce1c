"""EcoDiff (arXiv:2412.02852): which units go is learnt, by masks through the whole sampling trajectory.

Every unit has a number from which a *hard concrete* mask between 0 and 1 is drawn. The masks are to leave the final
latents what they were, while the share of the network that they keep is pushed down to what the ratio asks for.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffaccel.checkpoint import load_state, save_state
from diffaccel.denoiser import Denoiser
from diffaccel.errors import PlanError
from diffaccel.pruning.groups import Group
from diffaccel.pruning.masks import Masks
from diffaccel.pruning.scores import Scores
from diffaccel.pruning.trajectory import Trajectory, frozen

_TEMPERATURE, _STRETCH = 0.83, 0.1  # of the hard concrete distribution, as in EcoDiff's code


@dataclass(frozen=True)
class EcoDiff:
    """How masks are learnt.

    Args:
        updates: how often the masks are changed.
        accumulate: trajectories for each change.
        rate: learning rate (Adam).
        weight: of the regulariser beside the relative distance of the final latents.
        start: where the numbers begin; 3 is almost 1 as a mask.
        ahead: how far around it, at most, they begin, in the order of what the units of a group add (Wanda's score):
            in a few updates, gradients alone do not tell thousands of neurons apart. 0 begins with all alike, as the
            paper does.
        noise: how far masks are spread about their numbers: EcoDiff's ``masking_eps``, the larger the less.
        seed: of the noise of masks and pictures.
        save_every: updates after which the state is written, where there is a folder.
    """

    updates: int = 100
    accumulate: int = 4
    rate: float = 0.1
    weight: float = 1.0
    start: float = 3.0
    ahead: float = 1.0
    noise: float = 0.5
    seed: int = 0
    save_every: int = 5

    def __post_init__(self) -> None:
        for name in ("updates", "accumulate", "save_every"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise PlanError(f"EcoDiff.{name} must be a whole number from 1, got {getattr(self, name)!r}")
        for name in ("rate", "noise"):
            if not getattr(self, name) > 0:
                raise PlanError(f"EcoDiff.{name} must be above 0, got {getattr(self, name)!r}")


def hard_concrete(logits: Tensor, uniform: Tensor, noise: float) -> Tensor:
    """Masks in [0, 1], exactly 0 and 1 included, from ``uniform`` numbers in (0, 1)."""
    drawn = (uniform + noise).log() - (1 - uniform + noise).log()
    soft = ((drawn + logits) / _TEMPERATURE).sigmoid()
    return (soft * (1 + 2 * _STRETCH) - _STRETCH).clamp(0, 1)


def learn(
    model: Any,
    denoiser: Denoiser,
    groups: Sequence[Group],
    requests: Sequence[Mapping[str, Any]],
    call: Mapping[str, Any],
    settings: EcoDiff,
    folder: str | os.PathLike[str] | None,
    notify: Callable[[str], None],
    *,
    target: float = 0.8,
    each: Mapping[str, float] | None = None,
    prior: Scores | None = None,
) -> Scores:
    """The numbers of all units: the lower, the sooner a unit goes.

    Args:
        model: the pipeline, or the denoiser itself.
        requests: of the trajectories, taken in turn, each time with other noise.
        target: share of what ``groups`` cost that is to stay; the regulariser pushes down to it, not further.
        each: the cost of a unit, by group key; by default its parameters.
        prior: scores by which units begin ahead of others of their group; see `EcoDiff.ahead`.
        folder: where the state is kept; one that was cut off goes on there as if it had not been.

    Raises:
        PlanError: no gradient comes through the pipeline.
        InputError: ``folder`` holds the state of something else.
    """
    logits = {g.key: _start(g, settings, prior).requires_grad_() for g in groups}
    costs = {g.key: each[g.key] if each else float(g.parameters_each) for g in groups}
    total = sum(costs[g.key] * g.units for g in groups)
    optimizer = torch.optim.Adam(list(logits.values()), lr=settings.rate)
    file = None if folder is None else Path(folder) / f"{denoiser.component}.masks.safetensors"
    identity = _identity(denoiser, groups, requests, call, settings, target)
    done = 0 if file is None else load_state(file, identity, list(logits.values()), optimizer)[0]
    trajectory = Trajectory(model, denoiser.module, call)
    device = next(denoiser.module.parameters()).device
    with frozen(model), Masks(denoiser.module, groups) as masks:
        for update in range(done, settings.updates):
            optimizer.zero_grad()
            distance_sum = 0.0
            for k in range(settings.accumulate):
                run = update * settings.accumulate + k
                which, seed = run % len(requests), settings.seed + run
                masks.set(dict.fromkeys(logits))
                wanted = trajectory.plain(requests[which], seed)

                def sample(step: int, run: int = run) -> dict[str, Tensor]:
                    generator = torch.Generator().manual_seed(_mixed(settings.seed, run, step))
                    drawn = {key: torch.rand(value.shape, generator=generator) for key, value in logits.items()}
                    return {k: hard_concrete(v, drawn[k], settings.noise).to(device) for k, v in logits.items()}

                found = trajectory.masked(requests[which], seed, masks, sample)
                distance = _distance(found, wanted)
                distance_sum += float(distance.detach())
                (distance / settings.accumulate).backward()
            kept = sum((costs[key] * value.sigmoid().sum() for key, value in logits.items()), torch.zeros(())) / total
            (settings.weight * (kept - target).relu()).backward()
            optimizer.step()
            notify(
                f"{denoiser.component}: update {update + 1} of {settings.updates}, distance "
                f"{distance_sum / settings.accumulate:.3f}, keeps {float(kept.detach()):.1%}"
            )
            last = update + 1 == settings.updates
            if file is not None and (last or (update + 1) % settings.save_every == 0):
                save_state(file, identity, update + 1, list(logits.values()), optimizer)
    return {key: value.detach().clone() for key, value in logits.items()}


def _start(group: Group, settings: EcoDiff, prior: Scores | None) -> Tensor:
    start = torch.full((group.units,), settings.start)
    if prior is None or group.key not in prior or group.units == 1:
        return start
    rank = prior[group.key].argsort(stable=True).argsort(stable=True) / (group.units - 1)
    return start + settings.ahead * (2 * rank - 1)


def _distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Relative Euclidean distance."""
    square = sum(((a.float() - b.float()).square().sum() for a, b in zip(found, wanted, strict=True)), torch.zeros(()))
    size = sum(float(b.float().square().sum()) for b in wanted)
    return (square / max(size, 1e-30) + 1e-12).sqrt()


def _mixed(*numbers: int) -> int:
    """A seed for a tuple of numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "big")


def _identity(
    denoiser: Denoiser,
    groups: Sequence[Group],
    requests: Sequence[Mapping[str, Any]],
    call: Mapping[str, Any],
    settings: EcoDiff,
    target: float,
) -> str:
    units = [(g.key, g.units) for g in groups]
    chosen = {
        n: v for n, v in asdict(settings).items() if n not in ("updates", "save_every")
    }  # one may go on for longer
    told = [denoiser.component, units, list(requests), dict(call), chosen, target]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=_of_value).encode()).hexdigest()[:16]


def _of_value(value: Any) -> str:
    return f"{tuple(value.shape)} {float(value.double().sum())}" if isinstance(value, Tensor) else str(value)

"""Evolutionary search over what goes, without gradients (EEP, arXiv:2407.00945, for experts; here for any units)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from diffaccel.denoiser import Denoiser
from diffaccel.latents import output_tensors
from diffaccel.pruning.groups import Group
from diffaccel.pruning.masks import Masks
from diffaccel.pruning.scores import Scores, activation_scores, change
from diffaccel.recording import Recorded

_POPULATION, _PARENTS, _GENERATIONS = 12, 4, 8


def evolve(
    denoiser: Denoiser,
    groups: Sequence[Group],
    calls: Sequence[Recorded],
    decide: Callable[[Scores], dict[str, Tensor]],
    seed: int,
    notify: Callable[[str], None],
) -> dict[str, Tensor]:
    """The best set of units to keep that was found.

    An individual says how much each group as a whole matters, which is what shares the budget among groups; within a
    group, units go in the order of what they put out. It is fit when ``calls``, masked accordingly, give what they
    gave. The fittest have children: logarithms are mixed from two parents, and disturbed.

    Args:
        decide: from scores to what stays within the budget.
    """
    generator = torch.Generator().manual_seed(seed)
    narrow = [g for g in groups if g.stand_in is None]
    within = activation_scores(denoiser, narrow, calls) | {g.key: torch.ones(1) for g in groups if g.stand_in}
    base = {g.key: s / s.mean().clamp(min=1e-30) * g.parameters_each for g in groups for s in [within[g.key]]}
    with torch.no_grad(), Masks(denoiser.module, groups) as masks:
        whole = [output_tensors(call.run(denoiser.module)) for call in calls]

        def fitness(kept: Mapping[str, Tensor]) -> float:
            stays = {g.key: torch.zeros(g.units).index_fill(0, kept[g.key], 1.0) for g in groups if g.key in kept}
            masks.set({g.key: stays.get(g.key) for g in groups})
            pairs = zip(calls, whole, strict=True)
            return sum(change(output_tensors(call.run(denoiser.module)), before) for call, before in pairs)

        def born(genes: Tensor) -> tuple[float, Tensor, dict[str, Tensor]]:
            kept = decide({g.key: base[g.key] * genes[i].exp() for i, g in enumerate(groups)})
            return fitness(kept), genes, kept

        first = [torch.zeros(len(groups)), *torch.randn(_POPULATION - 1, len(groups), generator=generator)]
        population = sorted((born(genes) for genes in first), key=lambda one: one[0])
        for generation in range(_GENERATIONS):
            parents = population[:_PARENTS]
            children = []
            for _ in range(_POPULATION - _PARENTS):
                a, b = torch.randint(_PARENTS, (2,), generator=generator).tolist()
                mix = torch.rand(len(groups), generator=generator) < 0.5
                disturbed = torch.randn(len(groups), generator=generator) * 0.5 * 0.8**generation
                children.append(born(torch.where(mix, parents[a][1], parents[b][1]) + disturbed))
            population = sorted([*parents, *children], key=lambda one: one[0])
            notify(f"{denoiser.component}: generation {generation + 1}, change of the output {population[0][0]:.4f}")
    return population[0][2]

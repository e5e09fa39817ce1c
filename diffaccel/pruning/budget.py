"""From scores to what goes: the units that matter least for what they cost, until the budget is met."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from diffaccel.errors import PlanError
from diffaccel.pruning.groups import Group

_LEAST = 0.1  # share of a group that stays, where it is not cut whole


@dataclass(frozen=True)
class Costs:
    """What units cost, in one currency.

    Attributes:
        each: by group key, the cost of a unit.
        total: of the whole denoiser, with what cannot be cut.
    """

    each: Mapping[str, float]
    total: float


def choose(
    groups: Sequence[Group], scores: Mapping[str, Tensor], costs: Costs, ratio: float, multiple: int, scope: str
) -> dict[str, Tensor]:
    """The indices that stay, for every group that loses units.

    Args:
        groups: what may be cut.
        scores: by group key, how much each unit matters [units]; only their order and ratios count.
        ratio: share of ``costs.total`` that is to go.
        multiple: kept neurons are a multiple of this.
        scope: ``global`` or ``layer``.

    Raises:
        PlanError: the groups do not cost that much.
    """
    order = {g.key: scores[g.key].argsort(stable=True) for g in groups}
    target = ratio * costs.total
    if scope == "layer":
        gone = _same_share(groups, costs, target, multiple)
    else:
        gone = _least_first(groups, scores, order, costs, target, multiple)
    reached = sum(costs.each[g.key] * gone[g.key] for g in groups)
    if reached < target - _tolerance(groups, costs, multiple):
        raise PlanError(
            f"a ratio of {ratio:g} cannot be cut: what may go comes to {reached / costs.total:.1%}; lower it, or name "
            "more units"
        )
    return {g.key: order[g.key][gone[g.key] :].sort().values for g in groups if gone[g.key]}


def _steps(group: Group, multiple: int) -> list[int]:
    """How many units may be gone, ascending from none."""
    if group.stand_in is not None:
        return [0, group.units]
    step = multiple if group.kind == "neurons" else 1
    least = max(1, -(-int(group.units * _LEAST) // step) * step)
    kept = range(group.units // step * step, least - 1, -step)
    return sorted({0, *(group.units - k for k in kept)})


def _least_first(
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    order: Mapping[str, Tensor],
    costs: Costs,
    target: float,
    multiple: int,
) -> dict[str, int]:
    """Greedily by score per cost, a step of a group at a time."""
    steps = {g.key: _steps(g, multiple) for g in groups}
    sums = {g.key: torch.cat([torch.zeros(1), scores[g.key][order[g.key]].float().cumsum(0)]) for g in groups}
    gone, reached = {g.key: 0 for g in groups}, 0.0
    queue: list[tuple[float, int, int]] = []

    def push(i: int, step: int) -> None:
        key = groups[i].key
        if step < len(steps[key]):
            before, after = steps[key][step - 1], steps[key][step]
            lost = float(sums[key][after] - sums[key][before])
            heapq.heappush(queue, (lost / max(costs.each[key] * (after - before), 1e-30), i, step))

    for i in range(len(groups)):
        push(i, 1)
    while queue and reached < target:
        _, i, step = heapq.heappop(queue)
        key = groups[i].key
        cost = costs.each[key] * (steps[key][step] - steps[key][step - 1])
        if reached + cost > target and reached + cost - target > target - reached:
            continue  # nearer without it; a cheaper one may still fit
        gone[key] = steps[key][step]
        reached += cost
        push(i, step + 1)
    return gone


def _same_share(groups: Sequence[Group], costs: Costs, target: float, multiple: int) -> dict[str, int]:
    """The same share of every group, found by bisection."""

    def at(share: float) -> dict[str, int]:
        return {g.key: min(_steps(g, multiple), key=lambda n: (abs(n - share * g.units), n)) for g in groups}

    def cost(gone: Mapping[str, int]) -> float:
        return sum(costs.each[g.key] * gone[g.key] for g in groups)

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(at(middle)) >= target else (middle, high)
    return min((at(low), at(high)), key=lambda gone: abs(cost(gone) - target))


def _tolerance(groups: Sequence[Group], costs: Costs, multiple: int) -> float:
    """The cost of the largest step: nearer one need not come."""
    return max(
        (costs.each[g.key] * max(b - a for a, b in pairwise(s)) for g in groups if len(s := _steps(g, multiple)) > 1),
        default=0.0,
    )

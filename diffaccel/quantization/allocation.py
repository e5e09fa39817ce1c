"""Which site gets which scheme at which steps: an integer program over measured sensitivities, under a budget.

    minimise  sum over sites, candidates, ranges of  x[s, c, r] * error[s, c, r] * shows[r]
    with      sum over candidates of x[s, c, r] = 1,   cost(x) <= budget

(MixDQ, arXiv:2405.17873, integer programming of bit-widths; here with the steps as a part of it, as the plans of
ViDiT-Q have them, arXiv:2406.02540.) Costs are bytes, average bits, bit operations or seconds of a call. A site that
changes its candidate over the steps stores the wider one, which contains the narrower (see `stored`).

`closed_form` is the fast alternative for bits alone (BAQ, arXiv:2506.05664): where halving the step quarters the
error, the best width of a site exceeds the average by half the binary logarithm of its sensitivity over their geometric
mean.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import coo_matrix
from torch import Tensor

from diffaccel.errors import PlanError
from diffaccel.quantization.section import Quantize
from diffaccel.quantization.sensitivities import Sensitivities, subset
from diffaccel.sites import SitePattern

BUDGETS = ("bytes", "bits", "operations", "seconds")
_TIME_LIMIT = 60.0
_GAP = 1e-4


@dataclass(frozen=True)
class Allocation:
    """A choice for every site and range, and what it comes to.

    Args:
        sensitivities: what it was made from.
        choice: index of the candidate, int64 [sites, ranges].
    """

    sensitivities: Sensitivities
    choice: Tensor

    @property
    def sections(self) -> list[Quantize]:
        """What a plan's ``quantization`` takes: one section for each candidate and run of ranges."""
        s = self.sensitivities
        groups: defaultdict[tuple[int, float, float], list[str]] = defaultdict(list)
        for name, row in zip(s.sites, self.choice.tolist(), strict=True):
            begin = 0
            for r in range(1, len(row) + 1):
                if r == len(row) or row[r] != row[begin]:
                    groups[row[begin], s.ranges[begin][0], s.ranges[r - 1][1]].append(name)
                    begin = r
        return [_at(s.candidates[c], " ".join(names), (a, b)) for (c, a, b), names in sorted(groups.items())]

    def cost(self, kind: str) -> float:
        """What it takes of a kind of budget.

        ``bytes`` as a share of what they were, ``operations`` of those with 16 by 16 bits, average ``bits`` of a weight
        over weights and steps, ``seconds`` of the linears in a call, averaged over the steps.
        """
        _check_kind(kind)
        s = self.sensitivities
        if kind == "bytes":
            return float(_stored(s, self.choice).sum() / s.before.sum())
        per = _per_choice(s, kind)
        return float(sum(per[i, c, r] for i, row in enumerate(self.choice.tolist()) for r, c in enumerate(row)))

    @property
    def error(self) -> float:
        """Predicted energy of the error in the final latents over theirs (of a denoiser call, with one range)."""
        s = self.sensitivities
        value = _objective(s, s.error)
        return float(sum(value[i, c, r] for i, row in enumerate(self.choice.tolist()) for r, c in enumerate(row)))

    def __str__(self) -> str:
        from diffaccel.quantization.heatmap import as_text

        return as_text(self)


def allocate(
    sensitivities: Sensitivities,
    *,
    budget: float,
    kind: str = "bytes",
    text_weight: float = 0.0,
    constant: bool = False,
) -> Allocation:
    """The best choice within the budget.

    Args:
        budget: see `Allocation.cost`.
        kind: of the budget: bytes, bits, operations or seconds.
        text_weight: how much the error in what the text changes counts beside that of the output; 0 not at all.
        constant: whether a site keeps one candidate over all steps.

    Raises:
        PlanError: an unknown kind, or a budget that not even the cheapest choice meets (the message says what that is).
    """
    _check_kind(kind)
    s = sensitivities
    error = s.error if not text_weight else s.error + text_weight * s.text.nan_to_num(0.0)
    choice = _solve(s, _objective(s, error), {kind: budget}, constant=constant)
    return Allocation(s, choice)


def ambiguous(sensitivities: Sensitivities, *, budget: float, kind: str = "bytes", margin: float = 0.05) -> list[str]:
    """Sites whose choice a slightly smaller or larger budget changes: those worth measuring again, in the ``full`` way.

    >>> exact = measure(pipe, candidates, requests, sites=" ".join(ambiguous(rough, budget=0.2)),
    ...                 way="full", in_the_end=False)  # doctest: +SKIP
    >>> allocate(sharpen(rough, exact), budget=0.2)  # doctest: +SKIP

    Raises:
        PlanError: as `allocate`.
    """
    choices = [allocate(sensitivities, budget=budget, kind=kind).choice]
    for share in (1 - margin, 1 + margin):
        with suppress(PlanError):  # the smaller budget may be too small
            choices.append(allocate(sensitivities, budget=budget * share, kind=kind).choice)
    changes = torch.stack([c != choices[0] for c in choices]).any(0).any(-1)
    return [name for name, changed in zip(sensitivities.sites, changes.tolist(), strict=True) if changed]


def allocate_in_groups(
    sensitivities: Sensitivities, *, bits: float, text: str = "cross.* ff.*", ratio: float = 1.0
) -> Allocation:
    """MixDQ's split: sites that carry the text's content and the rest are allocated apart, each by its own measure.

    With r the weights of the first group over those of the second and k = ``ratio`` of their average bits, the second
    gets bits * (1 + r) / (k r + 1) and the first k times as many. The first is judged by what the text changes in the
    output, the second by the output. Which k is best is for the pictures to say: try several, keep the best.

    Raises:
        PlanError: a group is empty, or its share of the bits is more or less than the candidates can give.
    """
    s = sensitivities
    pattern = SitePattern(text)
    first = torch.tensor(
        [pattern.matches(role, *name.split(".", 1)) for role, name in zip(s.roles, s.sites, strict=True)]
    )
    if not first.any() or first.all():
        raise PlanError(f"text={text!r} must name some of the sites, but not all: it names {int(first.sum())}")
    r = float(s.weights[first].sum() / s.weights[~first].sum())
    rest = bits * (1 + r) / (ratio * r + 1)
    choice = torch.zeros(len(s.sites), len(s.ranges), dtype=torch.int64)
    for mask, share, error in ((first, ratio * rest, s.text.where(~s.text.isnan(), s.error)), (~first, rest, s.error)):
        part = subset(s, mask)
        choice[mask] = _solve(part, _objective(part, error[mask]), {"bits": share}, constant=False)
    return Allocation(s, choice)


def closed_form(sensitivities: Sensitivities, *, bits: float) -> Allocation:
    """BAQ's widths, each rounded to the nearest candidate, shifted together until the average is within the budget.

    Raises:
        PlanError: fewer bits than the narrowest candidate has.
    """
    s = sensitivities
    widths = torch.tensor([_bits(c) for c in s.candidates], dtype=torch.float64)
    # c_i of error_i = c_i 4^-b, per weight, from the coarsest candidate
    sensitivity = (_objective(s, s.error)[:, 0] / (s.weights[:, None] * s.lengths)).clamp(min=1e-300).log2() / 2
    best: Tensor | None = None
    low, high = bits - 64 - float(sensitivity.max()), bits + 64 - float(sensitivity.min())
    for _ in range(100):
        middle = (low + high) / 2
        choice = (sensitivity[..., None] + middle - widths).abs().argmin(-1)
        average = float((widths[choice] * s.weights[:, None] * s.lengths).sum() / s.weights.sum())
        if average <= bits + 1e-9:
            best, low = choice, middle
        else:
            high = middle
    if best is None:
        raise PlanError(f"bits={bits:g} is less than the narrowest candidate has ({float(widths.min()):.3g})")
    return Allocation(s, best)


def _at(candidate: Quantize, sites: str, steps: tuple[float, float]) -> Quantize:
    return replace(candidate, sites=sites, steps=steps)


def _bits(candidate: Quantize) -> int:
    return candidate.form().scheme.bits


def _objective(s: Sensitivities, error: Tensor) -> Tensor:
    """[sites, candidates, ranges]; a range in which nothing was measured takes the mean of the others."""
    error = torch.where(error.isnan(), error.nanmean(-1, keepdim=True), error).nan_to_num(0.0)
    return error * s.shows


def _per_choice(s: Sensitivities, kind: str) -> Tensor:
    """What each choice adds to a cost that simply adds up, [sites, candidates, ranges]."""
    if kind == "seconds":
        return s.seconds[..., None] * s.lengths
    schemes = [c.form().scheme for c in s.candidates]
    widths = torch.tensor([x.bits for x in schemes], dtype=torch.float64)
    if kind == "bits":
        return (s.weights / s.weights.sum())[:, None, None] * widths[:, None] * s.lengths
    of_inputs = torch.tensor([16.0 if x.activations == "float" else 8.0 for x in schemes], dtype=torch.float64)
    return (s.macs / s.macs.sum())[:, None, None] * (widths * of_inputs / 256)[:, None] * s.lengths


def _families(s: Sensitivities) -> list[int]:
    """For each candidate the number of its family: candidates that are stored in one weight (see `prepare`)."""
    families: dict[object, int] = {}
    numbers = []
    for candidate in s.candidates:
        form = candidate.form()
        integer = form.scheme.weights == "int8" or form.scheme.group is not None
        integer &= not form.conditioning.learnt
        key: object = (form.conditioning, integer) if integer else form
        numbers.append(families.setdefault(key, len(families)))
    return numbers


def _stored(s: Sensitivities, choice: Tensor) -> Tensor:
    """Bytes of each site: of every family that it uses, the largest."""
    families = torch.tensor(_families(s))
    total = torch.zeros(len(s.sites), dtype=torch.float64)
    for family in families.unique():
        mine = families == family
        sizes = torch.where(mine, s.bytes, 0.0)
        total += sizes.gather(1, choice).amax(1)
    return total


def _solve(s: Sensitivities, objective: Tensor, budgets: Mapping[str, float], *, constant: bool) -> Tensor:
    """HiGHS on x[s, c, r] in {0, 1}, and for bytes y[s, f] >= bytes[s, c] x[s, c, r] for c of family f."""
    S, C, R = objective.shape
    families = _families(s)
    F = max(families) + 1
    index = np.arange(S * C * R).reshape(S, C, R)
    stored = S * C * R + np.arange(S * F).reshape(S, F)
    rows: list[tuple[dict[int, float], float, float]] = []  # coefficients, least, most
    for i in range(S):
        rows += [({int(index[i, c, r]): 1.0 for c in range(C)}, 1.0, 1.0) for r in range(R)]
        if constant:
            rows += [
                ({int(index[i, c, 0]): 1.0, int(index[i, c, r]): -1.0}, 0.0, 0.0) for c in range(C) for r in range(1, R)
            ]
    for kind, budget in budgets.items():
        if kind == "bytes":
            scale = float(s.before.sum())
            sizes = (s.bytes / scale).tolist()
            rows += [
                ({int(stored[i, families[c]]): 1.0, int(index[i, c, r]): -sizes[i][c]}, 0.0, math.inf)
                for i in range(S)
                for c in range(C)
                for r in range(R)
            ]
            rows.append(({int(j): 1.0 for j in stored.flat}, -math.inf, budget))
            least = float(_stored(s, s.bytes.argmin(1, keepdim=True)).sum()) / scale
        else:
            per = _per_choice(s, kind)
            least = float(per.amin(1).sum())
            shares = (per / max(budget, 1e-300)).flatten().tolist()  # of the budget: HiGHS' tolerance is absolute
            rows.append((dict(enumerate(shares)), -math.inf, 1.0))
        if budget < least * (1 - 1e-9):
            raise PlanError(f"a budget of {budget:g} {kind} is too small: the cheapest choice takes {least:.4g}")
    entries = [(n, j, v) for n, (row, _, _) in enumerate(rows) for j, v in row.items()]
    n, j, v = zip(*entries, strict=True)
    total = S * C * R + S * F
    matrix = coo_matrix((v, (n, j)), shape=(len(rows), total))
    weights = np.zeros(total)
    weights[: S * C * R] = objective.flatten().numpy() / max(float(objective.max()), 1e-300)
    whole = np.zeros(total)
    whole[: S * C * R] = 1
    upper = np.full(total, np.inf)
    upper[: S * C * R] = 1
    result = milp(
        weights,
        integrality=whole,
        bounds=(np.zeros(total), upper),
        constraints=LinearConstraint(matrix.tocsr(), [r[1] for r in rows], [r[2] for r in rows]),
        options={"time_limit": _TIME_LIMIT, "mip_rel_gap": _GAP},
    )
    if result.x is None:
        raise PlanError(f"no allocation was found within {budgets}: {result.message}")
    return torch.from_numpy(result.x[: S * C * R].reshape(S, C, R).argmax(1))


def _check_kind(kind: str) -> None:
    if kind not in BUDGETS:
        raise PlanError(f"a budget is of {', '.join(BUDGETS)}, got {kind!r}")

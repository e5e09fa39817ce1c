"""Which options go together: an integer program over what each does alone.

    minimise  sum of x[i] log(cost[i])            (or of x[i] away[i], where the plan nearest to the original is wanted)
    with      sum of x[i] over the options of a knob <= 1
              sum of x[i] loss[l, i] <= allowed[l]        for every limit l
              x[i] + x[j] <= 1                            for options that exclude each other
              and none of the choices that were tried already

Factors of time multiply, since a technique that leaves out calls and one that makes a call cheaper do not know of each
other; so their logarithms add up. Errors of independent changes add up as energies (`Limit.loss`). Both are only
nearly so: what is chosen is then measured.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import LinearConstraint, milp

_TIME_LIMIT = 20.0


@dataclass(frozen=True)
class Program:
    """What is known of the options, each by itself.

    Args:
        knob: of each option, [options].
        cost: time of the loop over that without, > 0, [options].
        loss: by limit, [limits, options].
        allowed: [limits].
        away: how far from the original each leads, on a scale that adds up, [options].
        excluded: pairs of options that cannot go together.
        least_gain: speed-up that is asked for, 1 for none.
    """

    knob: Sequence[str]
    cost: Sequence[float]
    loss: np.ndarray
    allowed: np.ndarray
    away: Sequence[float]
    excluded: Collection[tuple[int, int]] = ()
    least_gain: float = 1.0

    def solve(self, *, fastest: bool = True, without: Collection[frozenset[int]] = ()) -> frozenset[int] | None:
        """The best choice of options, or None where there is none left within the limits.

        Args:
            fastest: the least time, else the nearest to the original.
            without: choices that do not count.
        """
        count = len(self.knob)
        if not count:
            return None if frozenset() in without else frozenset()
        logs = np.log(np.asarray(self.cost, np.float64))
        away = np.asarray(self.away, np.float64)
        objective = logs if fastest else away / max(float(away.max()), 1e-12)
        rows, upper = [], []
        for name in dict.fromkeys(self.knob):
            rows.append([float(k == name) for k in self.knob])
            upper.append(1.0)
        for row, most in zip(self.loss, self.allowed, strict=True):
            scale = abs(float(most)) or 1.0
            rows.append((row / scale).tolist())
            upper.append(float(most) / scale)
        if self.least_gain > 1:
            rows.append(logs.tolist())
            upper.append(-float(np.log(self.least_gain)))
        for i, j in self.excluded:
            rows.append([float(k in (i, j)) for k in range(count)])
            upper.append(1.0)
        for choice in without:
            rows.append([1.0 if i in choice else -1.0 for i in range(count)])
            upper.append(len(choice) - 1.0)
        found = milp(
            objective,
            constraints=LinearConstraint(np.array(rows), -np.inf, np.array(upper)),
            integrality=np.ones(count),
            bounds=(0, 1),
            options={"time_limit": _TIME_LIMIT},
        )
        if found.x is None:
            return None
        return frozenset(int(i) for i in np.flatnonzero(found.x > 0.5))

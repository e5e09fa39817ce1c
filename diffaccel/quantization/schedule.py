"""Which form of a site runs at which steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from diffaccel.plan import in_steps
from diffaccel.quantization.scheme import Form

Steps = tuple[float, float]
Piece = tuple[Steps, Form | None]
Schedule = tuple[Piece, ...]
"""Adjoining ranges from 0 to 1 with their forms; None where the layer runs as it was."""


def schedule_of(matches: Sequence[tuple[Steps, Form]]) -> Schedule:
    """What sections say about one site, in order; at every step the last one that covers it wins."""
    borders = sorted({0.0, 1.0, *(border for steps, _ in matches for border in steps)})
    pieces: list[Piece] = []
    for begin, end in pairwise(borders):
        form = next((form for steps, form in reversed(matches) if steps[0] <= begin and end <= steps[1]), None)
        if pieces and pieces[-1][1] == form:
            pieces[-1] = ((pieces[-1][0][0], end), form)
        else:
            pieces.append(((begin, end), form))
    return tuple(pieces)


class Phase:
    """Which form runs now: shared by sites with the same schedule, decided outside the blocks.

    Attributes:
        active: index among the forms of the sites, or -1 for the layer as it was.
    """

    def __init__(self, pieces: Sequence[tuple[Steps, int]]) -> None:
        self.pieces = tuple(pieces)
        self.active = self.pieces[0][1]

    def at(self, progress: float) -> None:
        """Set what runs at ``progress`` in [0, 1]."""
        self.active = next(index for steps, index in self.pieces if in_steps(progress, steps))

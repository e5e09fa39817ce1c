"""The search: each option alone on a few prompts, then what the integer program thinks best together, measured whole.

1. Every family from mild to strong, by itself, until it is hopeless.
2. The program chooses; the choice runs on a few prompts, and on all of the search's unless it is hopeless. What the
   prediction was wrong by corrects the next ones. Where nothing better is left, strengths between known ones are tried.
3. Other budgets than the one asked for, once each, so that there is a frontier.
4. What keeps to the budget is confirmed on prompts that the search has not seen, the fastest first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from diffaccel.errors import PlanError
from diffaccel.plan import Plan
from diffaccel.tuning.budget import Budget, Limit
from diffaccel.tuning.outcome import Outcome
from diffaccel.tuning.solve import Program
from diffaccel.tuning.space import Choice, Family, Option, compose, excludes, name_of
from diffaccel.tuning.trials import Trials

_HOPELESS_ALONE = 2.0  # times what may be lost: 3 dB beneath a limit, stronger settings are not tried
_HOPELESS_TOGETHER = 1.6
_NO_GAIN = 0.985  # of the time or the bytes: less is within the noise of a trial
_HARMLESS = 1e-8  # mean squared error: 80 dB, beneath the steps of 8 bits
_BETTER = 0.99
_SHARE_ALONE, _SHARE_SEARCH = 0.45, 0.8  # of the time allowed; the rest confirms
_CONFIRMATIONS = 6
_STRICTER = 0.7  # what the next to be confirmed may lose of what a refuted one lost: 1.5 dB less
_REFINEMENTS = 6
_SCREEN = 4  # items on which a setting is first tried
_NEAR = Limit("psnr", "psnr", "mean", 0.0, True)  # how near to the original, where no limit says what counts
_SHIFTS = (4.0, -4.0, 8.0, -8.0)  # dB from the budget, for the frontier


@dataclass(frozen=True)
class Point:
    """A choice that was measured as a whole."""

    choice: Choice
    outcome: Outcome

    @property
    def name(self) -> str:
        return name_of(self.choice)


@dataclass(frozen=True)
class Split:
    """Which items serve what: ``screen`` is a part of ``search``; ``confirm`` is apart."""

    screen: tuple[int, ...]
    search: tuple[int, ...]
    confirm: tuple[int, ...]

    @classmethod
    def of(cls, prompts: Sequence[int], seed: int) -> Split:
        """Half of the prompts to search with, half to confirm with, drawn by ``seed``.

        Args:
            prompts: to which prompt each item belongs.
            seed: of the draw.

        Raises:
            PlanError: fewer than 4 prompts.
        """
        known = sorted(set(prompts))
        if len(known) < 4:
            raise PlanError(
                f"tune needs 4 different prompts or more (or one with 4 seeds), got {len(known)}: half of them choose "
                "the plan, the others confirm it"
            )
        drawn = [known[int(i)] for i in np.random.default_rng(seed).permutation(len(known))]
        order = sorted(range(len(prompts)), key=lambda item: drawn.index(prompts[item]))
        first = set(drawn[: (len(known) + 1) // 2])
        search = tuple(item for item in order if prompts[item] in first)
        return cls(search[:_SCREEN], search, tuple(item for item in order if prompts[item] not in first))


class Search:
    """Looks for the best plan within a budget.

    Args:
        trials: what runs the choices.
        budget: to keep to.
        families: to choose from.
        split: of the items.
        seconds: after which nothing new is begun; None for no limit.
        watch: told of every point and of the best so far.
    """

    def __init__(
        self,
        trials: Trials,
        budget: Budget,
        families: Sequence[Family],
        split: Split,
        seconds: float | None = None,
        watch: Callable[[Search], None] = lambda search: None,
    ) -> None:
        self.points: list[Point] = []
        self.best: Point | None = None
        self.alone: dict[Option, Outcome] = {}
        self.notes: list[str] = []
        self._trials, self._budget, self._families, self._split = trials, budget, families, split
        self._seconds, self._watch = seconds, watch
        self._excluded: dict[Choice, bool] = {}
        self._tried: set[Choice] = set()
        # Share of what may be lost, by limit, that the search may still use after what confirmation has shown.
        self._strict = {limit.name: 1.0 for limit in budget.of_quality}
        self._wrong: dict[str, list[float]] = {limit.name: [] for limit in budget.of_quality}

    def run(self) -> Point | None:
        """The best point that is confirmed, or None where nothing keeps to the budget."""
        self._trials.reference(self._split.search)
        self._each_alone()
        self._together(self._budget)
        for budget in self._others():
            self._together(budget, most=1)
        self._confirm()
        return self.best

    # Each option alone

    def _each_alone(self) -> None:
        """In turns over the families, so that each has its say where time is short."""
        running = {family: iter(family.strengths) for family in self._families}
        while running and self._has_time(_SHARE_ALONE):
            for family, strengths in list(running.items()):
                strength = next(strengths, None)
                if strength is None or not self._has_time(_SHARE_ALONE) or not self._try_alone(family.option(strength)):
                    del running[family]

    def _try_alone(self, option: Option) -> bool:
        """Whether a stronger setting of its family may be of use."""
        outcome = self._run((option,), self._split.screen)
        if outcome is None:
            return False
        self.alone[option] = outcome
        self._watch(self)
        if self._budget.wants_speed:
            return not outcome.hopeless(self._budget, _HOPELESS_ALONE)
        return not outcome.keeps(self._budget, surely=False)

    # Choices

    def _together(self, budget: Budget, most: int | None = None, share: float = _SHARE_SEARCH) -> None:
        """Measure what the program chooses under ``budget``, until nothing is better, or ``most`` were measured."""
        measured, refined = 0, 0
        while self._has_time(share) and (most is None or measured < most):
            choice = self._next(budget)
            if choice is None:
                if most is not None or refined >= _REFINEMENTS or not self._refine():
                    return
                refined += 1
                continue
            self._tried.add(choice)
            measured += self._measure(choice, budget)

    def _next(self, budget: Budget) -> Choice | None:
        """The best choice by prediction that was not tried, if it is better than the best that was."""
        options = self._useful()
        indices = {option: i for i, option in enumerate(options)}
        nothing: Choice = frozenset()
        tried = [frozenset(indices[o] for o in c) for c in {*self._tried, nothing} if all(o in indices for o in c)]
        found = self._program(options, budget).solve(fastest=budget.wants_speed, without=tried)
        if found is None:
            return None
        choice = frozenset(options[i] for i in found)
        refuted = any(share < 1 for share in self._strict.values())
        best = self._best_of_search() if budget is self._budget and not refuted else None
        if best is not None and self._rank_of_prediction(choice) >= self._rank(best) * _BETTER:
            return None
        return choice

    def _program(self, options: Sequence[Option], budget: Budget) -> Program:
        quality = budget.of_quality
        loss = [[limit.loss(self.alone[o].estimate(limit)) for o in options] for limit in quality]
        allowed = [
            self._strict.get(limit.name, 1.0) * limit.loss(limit.bound) / self._correction(limit) for limit in quality
        ]
        if budget.memory is not None:  # bytes saved add up; what is allowed has to be reached
            loss.append([self.alone[o].share - 1 for o in options])
            allowed.append(budget.memory - 1)
        pairs = [(i, j) for i, j in combinations(range(len(options)), 2) if self._exclude(options[i], options[j])]
        return Program(
            [o.knob for o in options],
            [self.alone[o].cost for o in options],
            np.array(loss, np.float64).reshape(len(loss), len(options)),
            np.array(allowed, np.float64),
            [_NEAR.loss(self.alone[o].estimate(_NEAR)) for o in options],
            pairs,
            budget.speedup or 1.0,
        )

    def _exclude(self, one: Option, other: Option) -> bool:
        if one.knob == other.knob:
            return False  # the program has a row of its own for these
        pair = frozenset((one, other))
        if pair not in self._excluded:
            self._excluded[pair] = excludes(one, other)
        return self._excluded[pair]

    def _useful(self) -> list[Option]:
        """Options that gain something for certain, and those that gain a little and lose nothing."""
        small = self._budget.memory is not None
        found = []
        for option, outcome in self.alone.items():
            gains = outcome.cost < _NO_GAIN or (small and outcome.share < _NO_GAIN)
            harmless = outcome.cost < 1 and _NEAR.loss(outcome.estimate(_NEAR)) < _HARMLESS
            if gains or harmless:
                found.append(option)
        return found

    def _measure(self, choice: Choice, budget: Budget) -> bool:
        """Whether it was measured as a whole; a hopeless one is dropped after a few prompts."""
        outcome = self._run(choice, self._split.screen)
        if outcome is None:
            return False
        self._learn(choice, outcome)
        if outcome.hopeless(budget, _HOPELESS_TOGETHER):
            return False
        outcome = self._run(choice, self._split.search)
        if outcome is None:
            return False
        self.points.append(Point(choice, outcome))
        self._watch(self)
        return True

    def _learn(self, choice: Choice, outcome: Outcome) -> None:
        """How much more (or less) is lost together than the sum of what each loses."""
        if len(choice) < 2:
            return
        for limit in self._budget.of_quality:
            expected = sum(limit.loss(self.alone[o].estimate(limit)) for o in choice)
            got = limit.loss(outcome.estimate(limit))
            if expected > 0 and got > 0:
                self._wrong[limit.name].append(math.log(got / expected))

    def _correction(self, limit: Limit) -> float:
        """Factor between what is lost together and the sum; one observation of 1 stands beside those made."""
        seen = self._wrong.get(limit.name, [])
        return math.exp(sum(seen) / (len(seen) + 1))

    def _refine(self) -> bool:
        """Try a strength between known ones, in a family that the best choice stands on (with none, the fastest)."""
        best = self._best_of_search()
        anchors = list(best.choice) if best else sorted(self._useful(), key=lambda o: self.alone[o].cost)
        for anchor in sorted(anchors, key=lambda o: (not o.family.continuous, o.label)):
            known = sorted(o.strength for o in self.alone if o.family is anchor.family)
            at = known.index(anchor.strength)
            stronger = known[at + 1] if at + 1 < len(known) else None
            pairs = [(anchor.strength, stronger)] if best else [(known[at - 1] if at else None, anchor.strength)]
            for milder, harder in pairs:
                between = anchor.family.between(milder, harder)
                if between is not None:
                    self._try_alone(anchor.family.option(between))
                    return True
        return False

    def _others(self) -> Iterator[Budget]:
        """Budgets around the one asked for: in decibels of its own, or around what the best has."""
        if self._budget.psnr is None and not self.points:
            return
        for shift in _SHIFTS:
            best = self._best_of_search() or (self.points[0] if self.points else None)
            middle = self._budget.psnr
            if middle is None and best is not None:
                middle = best.outcome.estimate(_NEAR)
            if middle is not None and 0 < middle + shift <= 100:
                yield Budget(psnr=middle + shift, memory=self._budget.memory)

    # The best

    def _rank(self, point: Point) -> float:
        """Less is better: time where speed is wanted, else what is lost."""
        return self._value(point.outcome.cost, point.outcome)

    def _rank_of_prediction(self, choice: Choice) -> float:
        if self._budget.wants_speed:
            return self.predicted_cost(choice)
        return sum(_NEAR.loss(self.alone[o].estimate(_NEAR)) for o in choice)

    def _value(self, cost: float, outcome: Outcome) -> float:
        return cost if self._budget.wants_speed else _NEAR.loss(outcome.estimate(_NEAR))

    def predicted_cost(self, choice: Choice) -> float:
        """Time over the original's, from what each option costs alone."""
        return math.prod(self.alone[o].cost for o in choice)

    def _best_of_search(self) -> Point | None:
        kept = [p for p in self.points if p.outcome.keeps(self._budget, surely=False)]
        return min(kept, key=self._rank, default=None)

    def _confirm(self) -> None:
        """On prompts that chose nothing, the fastest first; by what one misses, the next is chosen stricter."""
        refuted: set[Choice] = set()
        for _ in range(_CONFIRMATIONS):
            point = self._fastest(refuted)
            if point is None:
                self._together(self._budget, most=1, share=1.0)
                point = self._fastest(refuted)
            if point is None:
                break
            if self._is_confirmed(point):
                return
            refuted.add(point.choice)
        if refuted:
            self.notes.append("what kept to the budget while searching did not surely keep to it on further prompts")

    def _fastest(self, refuted: set[Choice]) -> Point | None:
        """Of the points that keep to what the confirmation so far has left of the budget."""
        left = [p for p in self.points if p.choice not in refuted and p.outcome.keeps(self._budget, surely=False)]
        for limit in self._budget.of_quality:
            most = limit.loss(limit.bound) * self._strict[limit.name]
            left = [p for p in left if limit.loss(p.outcome.estimate(limit)) <= most]
        return min(left, key=self._rank, default=None)

    def _is_confirmed(self, point: Point) -> bool:
        fresh = self._run(point.choice, self._split.confirm)
        if fresh is None:
            return False
        whole = Point(point.choice, self._trials.outcome(point.name, (*self._split.search, *self._split.confirm)))
        self.points[self.points.index(point)] = whole
        if whole.outcome.keeps(self._budget) and fresh.keeps(self._budget, surely=False):
            self.best = whole
            self._watch(self)
            return True
        for limit in self._budget.of_quality:
            missed = max(limit.loss(whole.outcome.bound(limit)), limit.loss(fresh.estimate(limit)))
            had, allowed = limit.loss(point.outcome.estimate(limit)), limit.loss(limit.bound)
            if missed > allowed > 0:
                self._strict[limit.name] = min(self._strict[limit.name], _STRICTER * had / allowed)
        return False

    def frontier(self) -> list[Point]:
        """Measured points that none beats in both time and PSNR, from the nearest to the original to the fastest."""
        kept: list[Point] = []
        for point in sorted(self.points, key=lambda p: (p.outcome.cost, -p.outcome.estimate(_NEAR))):
            if not kept or point.outcome.estimate(_NEAR) > kept[-1].outcome.estimate(_NEAR):
                kept.append(point)
        if self.best is not None and self.best not in kept:
            kept.append(self.best)
        return sorted(kept, key=lambda p: -p.outcome.cost)

    def _run(self, choice: Sequence[Option] | Choice, items: Sequence[int]) -> Outcome | None:
        try:
            plan: Plan = compose(choice, name="tuned")
        except PlanError as refused:
            self.notes.append(f"{name_of(choice)}: {refused}")
            return None
        outcome = self._trials.run(name_of(choice), plan, items)
        if outcome is None:
            self.notes.append(f"{name_of(choice)} was left out: {self._trials.why_not(name_of(choice))}")
        return outcome

    def _has_time(self, share: float) -> bool:
        return self._seconds is None or self._trials.elapsed < share * self._seconds

"""Intervals hold what they promise on simulated data, and refuse or own up where they cannot."""

import math

import numpy as np
import pytest
from scipy import stats

from diffaccel.eval.metrics.intervals import difference_interval, mean_interval, no_worse, wilson


def _coverage(draw, truth: float, repetitions: int = 400) -> float:
    intervals = [mean_interval(*draw(), resamples=400) for _ in range(repetitions)]
    return sum(i.low <= truth <= i.high for i in intervals) / repetitions


@pytest.mark.parametrize("n", [8, 16, 64])
def test_intervals_hold_the_true_mean_as_often_as_they_say(n):
    rng = np.random.default_rng(n)
    assert 0.92 <= _coverage(lambda: (rng.normal(5, 2, n),), 5) <= 0.98


def test_intervals_of_skewed_values_hold_a_little_less_often():
    rng = np.random.default_rng(0)
    assert 0.89 <= _coverage(lambda: (rng.exponential(5, 16),), 5) <= 0.97
    bounds = [no_worse(-rng.exponential(5, 16), np.zeros(16), 0, resamples=400).bound for _ in range(400)]
    assert 0.87 <= np.mean(np.array(bounds) >= 5) <= 0.95


def test_seeds_of_one_prompt_do_not_count_as_more_prompts():
    """20 prompts of 4 seeds that differ from prompt to prompt: taken as 80 prompts, they cover far too little."""
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(20), 4)

    def draw():
        return rng.normal(0, 1, 20)[prompts] + rng.normal(0, 0.2, 80), prompts.tolist()

    assert 0.91 <= _coverage(draw, 0) <= 0.98
    assert _coverage(lambda: (draw()[0],), 0) < 0.8


def test_pairing_removes_what_is_hard_about_a_prompt():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 10, 50)
    a, b = hard + 1 + rng.normal(0, 0.1, 50), hard + rng.normal(0, 0.1, 50)
    paired = difference_interval(a, b)
    assert 0.9 < paired.low < paired.value < paired.high < 1.1
    assert paired.value == pytest.approx(np.mean(a - b))
    assert mean_interval(a).high - mean_interval(a).low > 10 * (paired.high - paired.low)


def test_intervals_narrow_with_prompts_and_widen_with_the_level():
    values = np.random.default_rng(0).normal(size=400)

    def width(interval):
        return interval.high - interval.low

    assert width(mean_interval(values)) < width(mean_interval(values[:25]))
    assert width(mean_interval(values, level=0.5)) < width(mean_interval(values, level=0.99))
    normal = 2 * 1.96 * values.std() / 20
    assert width(mean_interval(values)) == pytest.approx(normal, rel=0.1)


def test_the_order_and_the_global_generator_change_nothing():
    values, prompts = [3.0, 1.0, 2.0, 7.0], ["a", "a", "b", "c"]
    interval = mean_interval(values, prompts)
    state = np.random.get_state()[1].copy()
    assert mean_interval(values, prompts) == interval
    assert (np.random.get_state()[1] == state).all()
    assert interval.value == pytest.approx((2 + 2 + 7) / 3)  # each prompt counts once, whatever its number of seeds
    assert interval.n == 3


def test_verdict_is_wrong_as_seldom_as_it_says():
    """Of samples that are worse by exactly the margin, 5 % are let through; of equal ones nearly all."""
    rng = np.random.default_rng(0)

    def passed(drop: float) -> float:
        holds = [no_worse(-drop + rng.normal(0, 1, 30), np.zeros(30), 1.0, resamples=400).holds for _ in range(300)]
        return sum(holds) / len(holds)

    assert passed(1.0) < 0.09
    assert passed(0.0) > 0.99


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_verdict_knows_the_direction(higher_is_better):
    reference = np.linspace(0, 1, 20)
    sign = 1 if higher_is_better else -1
    noise = np.random.default_rng(0).normal(0, 0.05, 20)
    worse = no_worse(reference - sign * (0.5 + noise), reference, 0.3, higher_is_better=higher_is_better)
    better = no_worse(reference + sign * (0.5 + noise), reference, 0.0, higher_is_better=higher_is_better)
    assert not worse.holds and worse.drop == pytest.approx(0.5, abs=0.05) and worse.bound > worse.drop
    assert better.holds and better.drop == pytest.approx(-0.5, abs=0.05) and better.bound < 0


def test_one_prompt_proves_nothing_and_equal_values_leave_no_doubt():
    one = mean_interval([1.0, 2.0, 3.0], ["a", "a", "a"])
    assert (one.value, one.low, one.high, one.n) == (2, -math.inf, math.inf, 1)
    assert not no_worse([1.0], [0.0], margin=100).holds
    assert mean_interval([0.5] * 10)[:3] == (0.5, 0.5, 0.5)
    assert no_worse([0.5] * 10, [0.5] * 10, margin=0).holds


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: mean_interval([]), "one value per sample"),
        (lambda: mean_interval([1.0, math.nan]), "value 1 of 2 is nan"),
        (lambda: mean_interval([math.inf, 1.0]), "cap what is infinite"),
        (lambda: mean_interval([1.0, 2.0], ["a"]), "2 values but 1 prompts"),
        (lambda: mean_interval([1.0, 2.0], level=1.0), "level"),
        (lambda: difference_interval([1.0, 2.0], [1.0]), "equally many"),
        (lambda: no_worse([1.0], [1.0], margin=-0.1), "at least 0"),
        (lambda: no_worse([1.0], [1.0], margin=math.nan), "at least 0"),
        (lambda: no_worse([1.0, 2.0], [1.0, 2.0], 0.1, level=0.4), r"\(0.5, 1\)"),
        (lambda: wilson(3, 2), "right=3, count=2"),
        (lambda: wilson(0, 0), "count=0"),
    ],
)
def test_what_gives_no_interval_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize(("right", "count"), [(0, 10), (9, 10), (90, 100), (10, 10)])
def test_wilson_is_scipys(right, count):
    interval = wilson(right, count)
    expected = stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert interval[1:3] == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert interval.value == right / count and interval.n == count

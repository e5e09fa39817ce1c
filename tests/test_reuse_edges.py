"""Reuse at its edges, whatever kind: nothing is undefined, and nothing leaks into the next call.

Settings at random, thresholds tiny and huge, runs of one and two steps, sizes that change, errors in the middle, and
two runs of one pipeline that take turns.
"""

import itertools
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import ZOO
from zoo_pipelines import PIPELINES

from diffaccel import ExactReuse, GuidanceReuse, MergeTokens, Plan, StepCache, accelerate
from diffaccel.caching.schedule import Scheduler
from diffaccel.caching.trajectory import Trajectories, Trajectory

FREE = dict(protect_first=0.0, protect_last=0, min_steps=1)
CACHES = {
    "easy": StepCache(threshold=0.3, **FREE),
    "interval": StepCache(policy="interval", **FREE),
    "first block": StepCache.first_block(0.3),
    "modulated": StepCache.teacache(0.5),
    "stack": StepCache.taylorseer(3),
    "sites": StepCache.fora(3),
    "blocks": StepCache(policy="sea", granularity="sites", sites="block", forecast="linear", threshold=0.3, **FREE),
    "kinds": StepCache.pab(),
}
PLANS = {name: Plan(caching=section) for name, section in CACHES.items()}
PLANS |= {
    "guidance": Plan(guidance=GuidanceReuse(every=3, steps=(0.0, 1.0), forecast="trend", change=0.5, agree=0.999)),
    "cache and guidance": Plan(caching=CACHES["easy"], guidance=GuidanceReuse(every=2, steps=(0.0, 1.0))),
    "interval guidance": Plan(guidance=GuidanceReuse(forecast="zero", steps=(0.5, 1.0))),
    "exact": Plan(exact=ExactReuse()),
    "tokens": Plan(tokens=[MergeTokens(steps=(0.0, 1.0), window=16)], caching=CACHES["sites"]),
}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


def call(pipe, name="pixart_sigma", **arguments):
    return PIPELINES[name].call(pipe, **arguments)


@pytest.mark.parametrize("name", ["pixart_sigma", "wan"])
@every_plan
def test_each_call_is_as_if_it_were_the_first(plan, name):
    """After calls of other lengths and sizes, and some broken off, a call gives what the first one gave."""
    pipe = PIPELINES[name].build()
    with accelerate(pipe, plan):
        expected = call(pipe, name, steps=6)
        for arguments in (dict(steps=1), dict(steps=2), dict(batch=2, steps=3), dict(seed=5, steps=4)):
            assert call(pipe, name, **arguments).isfinite().all()
        _broken(pipe, name, at=1)
        _broken(pipe, name, at=0)
        again = call(pipe, name, steps=6)
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-5)


def _broken(pipe, name, at):
    """A call that fails in a block at a step."""
    block, seen = next(m for n, m in pipe.transformer.named_modules() if n.endswith(".1") and "block" in n), []

    def fail(*_):
        seen.append(1)
        if len(seen) > at:
            raise ZeroDivisionError

    handle = block.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        call(pipe, name, steps=6)
    handle.remove()


@every_plan
def test_one_step_is_the_original(plan):
    pipe = PIPELINES["pixart_sigma"].build()
    expected = call(pipe, steps=1)
    with accelerate(pipe, plan):
        got = call(pipe, steps=1)
    if plan.tokens:
        assert got.isfinite().all()
    else:
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("policy", ["easy", "sea", "first-block", "modulated"])
@pytest.mark.parametrize("threshold", [1e-30, 100.0])
def test_thresholds_tiny_and_huge(policy, threshold):
    """Nothing is skipped, to the bit; or everything that may be."""
    inside = dict(granularity="stack", front=1) if policy in ("first-block", "modulated") else {}
    section = StepCache(policy=policy, threshold=threshold, max_skips=1000, forecast="hold", **inside, **FREE)
    pipe = PIPELINES["pixart_sigma"].build()
    expected = call(pipe, steps=8)
    with accelerate(pipe, Plan(caching=section)) as accel:
        if inside:
            call(pipe, steps=2)  # where the layout is learnt
        got = call(pipe, steps=8)
        computed = accel.report().techniques[0].facts["steps_computed"]["transformer"]
    if threshold < 1:
        assert computed == list(range(8)) and torch.equal(got, expected)
    else:
        assert computed == ([0, 1] if policy == "easy" else [0]) and got.isfinite().all()


@settings(max_examples=25, deadline=None)
@given(
    steps=st.integers(1, 30),
    begin=st.integers(0, 29),
    most=st.integers(1, 6),
    share=st.floats(0.01, 1.0),
    protect_first=st.floats(0, 1),
    protect_last=st.one_of(st.integers(0, 40), st.floats(0, 0.99)),
    seed=st.integers(0, 1000),
)
def test_random_schedules(steps, begin, most, share, protect_first, protect_last, seed):
    """They begin with a computed step, hold every limit, and compute no more than asked where the limits allow that."""
    begin = min(begin, steps - 1)
    v = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    times = (999.0, 800.0, 650.0, 500.0, 300.0, 150.0, 50.0)
    gram = torch.einsum("ptd,psd->pts", v, v).numpy()
    known = Trajectories({"cond": Trajectory(times, gram)}, times, (1e-3,) * 7, 0.0)
    section = StepCache(
        policy="schedule",
        forecast="linear",
        share=share,
        max_skips=most,
        protect_first=protect_first,
        protect_last=protect_last,
    )
    timesteps = [1000.0 * (1 - i / steps) for i in range(steps)]
    choices = Scheduler(section, known).choices(timesteps, begin)
    chosen = Scheduler(section, known).choose(timesteps, begin)
    computed = set(chosen.computed)
    protected = {i for i in range(begin, steps) if section.is_protected(i, steps)}
    assert begin in computed and protected <= computed <= set(range(begin, steps))
    gaps = sorted([*computed, steps])
    assert all(b - a - 1 <= most for a, b in itertools.pairwise(gaps))
    assert chosen in choices
    assert len(computed) <= max(round(share * (steps - begin)), 1) or chosen == choices[0]


@every_plan
def test_two_runs_that_take_turns(plan):
    """Two pipelines, step by step in turns."""
    first, second = (PIPELINES["pixart_sigma"].build() for _ in range(2))
    with accelerate(first, plan), accelerate(second, plan):
        expected = [call(first, seed=1, steps=5), call(second, seed=2, steps=5)]
        turn, results = [threading.Semaphore(1), threading.Semaphore(0)], [None, None]

        def work(i, pipe):
            def give_way(*_):
                turn[1 - i].release()
                turn[i].acquire()

            turn[i].acquire()
            results[i] = call(pipe, seed=1 + i, steps=5, callback=give_way, callback_steps=1)
            turn[1 - i].release()

        threads = [threading.Thread(target=work, args=item) for item in enumerate((first, second))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=100)
    for got, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_a_generator_of_the_users_loop_that_stops_in_the_middle():
    """Two loops over one model by hand: the second begins before the first has ended, which then goes no further."""
    specimen = ZOO["pixart_sigma"]
    model = specimen.build()

    def loop(accel, steps):
        accel.clock.start(steps)
        for step in range(steps):
            yield model(**specimen.inputs(progress=step / steps))[0]
            accel.clock.advance()

    with torch.no_grad(), accelerate(model, PLANS["interval"]) as accel:
        expected = list(loop(accel, 6))
        broken = loop(accel, 6)
        for _ in range(3):
            next(broken)
        got = list(loop(accel, 6))
    assert all(map(torch.equal, got, expected))

"""EasyCache and MagCache against the definitions, worked out by hand and by an independent second writing of each."""

import itertools
import math

import pytest
import torch
from caching_parts import Doubler, Scripted, magcache, run, run_by_hand, table, walk
from torch.utils._python_dispatch import TorchDispatchMode

from diffaccel import Plan, PlanError, StepCache, accelerate
from diffaccel.caching.ratios import Ratios

# --- EasyCache --------------------------------------------------------------------------------------------------------


def test_easycache_by_hand():
    latents = [torch.full((1, 2, 2), v) for v in (10.0, 8.0, 7.0, 6.5, 6.0, 5.0, 4.0)]
    section = StepCache(policy="easy", forecast="residual", threshold=0.2, protect_first=0.25, min_steps=1, max_skips=9)
    outputs, steps = run(Doubler(), section, latents)
    # k = |16 - 20| / |8 - 10| = 2. Step 2: 2 * 1 / 16 = .125; step 3: + 2 * .5 / 16 = .1875; step 4: .25, computed.
    # Again k = 2. Step 5: 2 * 1 / 12 = .167; step 6 is the last.
    assert steps == [0, 1, 4, 6]
    assert [float(v.mean()) for v in outputs] == [20, 16, 7 + 8, 6.5 + 8, 12, 5 + 6, 8]


def easycache_again(xs, model, tau, protected):
    """EasyCache, written down a second time: outputs and computed steps."""
    k = acc = x_at = v_at = None
    outputs, steps = [], []
    for i, x in enumerate(xs):
        skip = False
        if k is not None:
            acc += float(k * (x - xs[i - 1]).abs().mean() / v_at.abs().mean())
            skip = i not in protected and acc < tau
        if skip:
            outputs.append(x + (v_at - x_at))
            continue
        v = model(x)
        if v_at is not None:
            k = (v - v_at).abs().mean() / (x - x_at).abs().mean()
        x_at, v_at, acc = x, v, 0.0
        outputs.append(v)
        steps.append(i)
    return outputs, steps


@pytest.mark.parametrize("tau", [0.01, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_easycache_is_the_published_rule(tau, seed):
    latents, model = walk(20, seed=seed), lambda x: torch.tanh(3 * x) - 0.5 * x * x
    expected, expected_steps = easycache_again(latents, model, tau, protected={0, 1, 2, 18, 19})
    outputs, steps = run(Scripted(lambda x, t: model(x)), StepCache.easycache(tau), latents)
    assert steps == expected_steps
    assert 5 <= len(steps) <= 20
    torch.testing.assert_close(outputs, expected, rtol=1e-6, atol=1e-6)


class HostReads(TorchDispatchMode):
    """Counts the scalars read from tensors, each of which would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_one_host_read_per_unprotected_step_and_none_for_magcache():
    latents = walk(10)
    with HostReads() as reads:
        assert bool(torch.ones(())) is True
    assert reads.count == 1
    with HostReads() as reads:
        run(Doubler(), StepCache(threshold=1e-9, protect_first=0.4, protect_last=2), latents)
    assert reads.count == 10 - 4 - 2
    with HostReads() as reads:
        _, steps = run(Doubler(), magcache(table([0.99] * 10), protect_first=0.3), latents)
    assert reads.count == 0
    assert len(steps) < 10


# --- MagCache ---------------------------------------------------------------------------------------------------------


def test_magcache_by_hand():
    # Step 2: ratio .9, error .1; step 3: .81, .29; step 4: .729, .561 > .5, computed. Step 5: .9, .1. Step 6: .81, .29.
    latents = [torch.full((1, 2, 2), float(v)) for v in (10, 9, 8, 7, 6, 5, 4)]
    plan = magcache(table([1.0] + [0.9] * 6), threshold=0.5, max_skips=4, protect_first=0.2)
    outputs, steps = run(Doubler(), plan, latents)
    assert steps == [0, 1, 4]
    assert [float(v.mean()) for v in outputs] == [20, 18, 8 + 9, 7 + 9, 12, 5 + 6, 4 + 6]


def magcache_again(gammas, tau, most, first):
    """MagCache's computed steps, written down a second time."""
    steps, ratio, n, error = [], 1.0, 0, 0.0
    for i, gamma in enumerate(gammas):
        if i >= first:
            ratio, n = ratio * gamma, n + 1
            error += abs(1 - ratio)
            if error <= tau and n <= most:
                continue
        ratio, n, error = 1.0, 0, 0.0
        steps.append(i)
    return steps


@pytest.mark.parametrize("tau", [0.02, 0.06, 0.24])
@pytest.mark.parametrize("most", [1, 2, 5])
def test_magcache_is_the_published_rule(tau, most):
    generator = torch.Generator().manual_seed(7)
    gammas = [1.0, *(1 + 0.03 * torch.randn(29, generator=generator).double()).tolist()]
    _, steps = run(Doubler(), magcache(table(gammas), threshold=tau, max_skips=most, protect_first=0.2), walk(30))
    assert steps == magcache_again(gammas, tau, most, first=6)


def test_ratios_of_another_schedule_are_composed():
    timesteps, gammas = [1000.0, 800.0, 500.0, 100.0], [1.0, 1.2, 0.9, 0.5]
    ratios = Ratios(timesteps, gammas)
    assert [ratios.between(a, b) for a, b in itertools.pairwise(timesteps)] == gammas[1:]
    assert ratios.between(1000, 500) == pytest.approx(1.2 * 0.9)  # half as many steps
    assert ratios.between(800, 650) == pytest.approx(math.sqrt(0.9))  # twice as many
    assert ratios.between(900, 300) == pytest.approx(math.sqrt(1.2) * 0.9 * math.sqrt(0.5))  # across
    assert ratios.between(1100, 1000) == 1  # just outside of what was measured
    assert ratios.between(2000, 1000) is None
    finer = [1000 - 50 * i for i in range(19)]
    product = math.prod(ratios.between(a, b) for a, b in itertools.pairwise(finer))
    assert product == pytest.approx(1.2 * 0.9 * 0.5)


def test_ratios_of_a_second_order_schedule():
    ratios = Ratios([999.0, 799.0, 799.0, 599.0], [1.0, 1.1, 1.3, 0.9])
    assert ratios.between(999, 799) == 1.1
    assert ratios.between(799, 799) == 1.3
    assert ratios.between(999, 599) == pytest.approx(1.1 * 1.3 * 0.9)


def test_magcache_without_ratios_says_how_to_get_them():
    with pytest.raises(PlanError, match=r"diffaccel\.calibrate\(pipe, plan, prompts="):
        accelerate(Doubler(), Plan(caching=StepCache(policy="mag")))


def test_ratios_of_another_branch_are_used_and_named():
    model = Doubler()
    with accelerate(model, magcache(table([1.0] * 9, branch="batched"))) as accel:
        run_by_hand(accel, model, walk(9))
        (technique,) = accel.report().techniques
    assert technique.notes == ["no ratios were calibrated for branch cond; those of batched are used"]
    assert technique.facts["reused"] > 0

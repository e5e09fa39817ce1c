"""Step caching against the definitions, worked out by hand and by an independent second writing of each."""

import itertools
import math
import threading
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import apply_first_block_cache
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import ZOO, trajectory
from zoo_pipelines import PIPELINES

from diffaccel import Plan, PlanError, StepCache, accelerate
from diffaccel.caching.ratios import Ratios
from diffaccel.plan import Artefacts

FORECASTS = ("hold", "residual", "linear", "trend")


@dataclass
class Sample(BaseOutput):
    sample: Tensor
    note: str = "kept"


class Doubler(nn.Module):
    """A denoiser whose computed output, twice its input, cannot be taken for a reused one."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.calls = 0

    def forward(self, hidden_states, timestep, encoder_hidden_states=None):
        self.calls += 1
        return self.scale * hidden_states


class Scripted(nn.Module):
    """Gives ``script(latents, timestep)``, whatever that is."""

    def __init__(self, script):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1), requires_grad=False)
        self.script = script

    def forward(self, hidden_states, timestep, encoder_hidden_states=None, audio_hidden_states=None):
        if audio_hidden_states is not None:
            return self.script(hidden_states, audio_hidden_states, timestep)
        return self.script(hidden_states, timestep)


def always(forecast="hold", **settings):
    """A plan that skips whatever may be skipped: MagCache with ratios that never change. Computes every other step."""
    section = dict(policy="mag", threshold=100, protect_first=0, max_skips=1, min_steps=1, forecast=forecast)
    flat = [table([1.0] * 3, [1000.0, 500.0, 0.0], component) for component in ("transformer", "unet")]
    return Plan(caching=StepCache(**section | settings), artefacts=Artefacts(flat[0] | flat[1]))


def computed_steps(accel):
    (steps,) = accel.report().techniques[0].facts["steps_computed"].values()
    return steps


def run(model, plan, latents, timesteps=None, begin=0):
    """Outputs and computed steps of one run by hand over ``latents``."""
    timesteps = timesteps or [1000.0 - 10 * i for i in range(len(latents))]
    plan = plan if isinstance(plan, Plan) else Plan(caching=plan)
    with accelerate(model, plan) as accel:
        accel.clock.start(begin + len(latents), begin)
        outputs = []
        for x, t in zip(latents, timesteps, strict=True):
            outputs.append(model(x, t))
            accel.clock.advance()
        return outputs, computed_steps(accel)


def walk(steps, shape=(2, 3, 4), seed=0, scale=0.05):
    """Latents that move a little each step."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(shape, generator=generator)
    moves = [scale * torch.randn(shape, generator=generator) * (1 + math.sin(i)) for i in range(steps)]
    return [start + sum(moves[:i], torch.zeros(shape)) for i in range(steps)]


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


def table(gammas, timesteps=None, component="transformer", branch="cond"):
    timesteps = timesteps or [1000.0 - 10 * i for i in range(len(gammas))]
    name = f"caching.{component}.{branch}"
    return {f"{name}.timesteps": torch.tensor(timesteps).double(), f"{name}.ratios": torch.tensor(gammas).double()}


def magcache(ratios, **settings):
    return Plan(caching=StepCache.magcache(**settings), artefacts=Artefacts(ratios))


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


def run_by_hand(accel, model, latents, **arguments):
    accel.clock.start(len(latents))
    outputs = []
    for i, x in enumerate(latents):
        outputs.append(model(x, 1000.0 - i, **arguments))
        accel.clock.advance()
    return outputs


# --- forecasts --------------------------------------------------------------------------------------------------------

TIMES = [1000.0, 900.0, 850.0, 700.0, 660.0]
VALUES = [1.0, 3.0, 6.0, 4.0]  # of the outputs at the first four


@pytest.mark.parametrize(
    ("forecast", "expected"),
    [
        ("hold", 4.0),
        ("residual", -7.0 + (4.0 - 5.0)),
        ("linear", 4 + (4 - 6) / (700 - 850) * (660 - 700)),
        ("trend", 4.0),  # the line through 3 and 6 leads to 15: it foretold nothing of the fall to 4
    ],
)
def test_forecasts_by_hand(forecast, expected):
    values = iter(VALUES)
    model = Scripted(lambda x, t: torch.full_like(x, next(values)))
    latents = [torch.full((1, 2, 2), v) for v in (1.0, 2.0, 3.0, 5.0, -7.0)]
    plan = always(forecast, protect_first=0.8, protect_last=0)
    outputs, steps = run(model, plan, latents, TIMES)
    assert steps == [0, 1, 2, 3]
    assert float(outputs[-1].mean()) == pytest.approx(expected)


@pytest.mark.parametrize(("forecast", "error"), [("linear", 0.0), ("trend", 0.0), ("hold", 0.04)])
def test_lines_are_foretold(forecast, error):
    slope, start = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    model = Scripted(lambda x, t: start + slope * t / 1000)
    outputs, steps = run(model, always(forecast, protect_first=0.8, protect_last=0), walk(5), TIMES)
    assert steps == [0, 1, 2, 3]
    torch.testing.assert_close(outputs[-1], start + slope * 0.66 + error * slope, rtol=1e-4, atol=1e-5)


def test_trend_is_per_sample_and_partial():
    rises = {1000.0: (0.0, 0.0), 900.0: (1.0, 1.0), 800.0: (1.5, 1.0), 700.0: None}
    model = Scripted(lambda x, t: torch.tensor(rises[t]).view(2, 1, 1).expand(2, 2, 2).clone())
    outputs, _ = run(model, always("trend", protect_first=0.7, protect_last=0), walk(4, (2, 2, 2)), list(rises))
    # sample 0 rose by half of what the line foretold: half of the next rise of .5; sample 1 stood still
    torch.testing.assert_close(outputs[-1][:, 0, 0], torch.tensor([1.75, 1.0]))


def test_repeated_timesteps_do_not_divide_by_zero():
    values = iter([1.0, 2.0, 3.0])
    model = Scripted(lambda x, t: torch.full_like(x, next(values)))
    for forecast, expected in (("linear", 5.0), ("trend", 3.0)):
        values = iter([1.0, 2.0, 3.0])
        plan = always(forecast, protect_first=0.7, protect_last=0)
        outputs, _ = run(model, plan, walk(4), [999.0, 799.0, 799.0, 599.0])
        assert float(outputs[-1].mean()) == expected  # 799 counts as 3, its later value


# --- structure --------------------------------------------------------------------------------------------------------

X = walk(3, (1, 4, 6, 6), scale=0.3)


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda v: v, lambda o: o),
        (lambda v: (v,), lambda o: o[0]),
        (lambda v: (v, "kept", None), lambda o: o[0]),
        (lambda v: Sample(v), lambda o: o.sample),
        (lambda v: [v], lambda o: o[0]),
        (lambda v: Sample([v]), lambda o: o.sample[0]),
        (lambda v: {"sample": v, "ids": torch.arange(3)}, lambda o: o["sample"]),
    ],
)
@pytest.mark.parametrize("forecast", ["hold", "residual"])
def test_outputs_keep_their_structure(wrap, unwrap, forecast):
    outputs, steps = run(Scripted(lambda x, t: wrap(2 * x)), always(forecast), X)
    assert steps == [0, 2]
    assert type(outputs[1]) is type(outputs[0])
    expected = 2 * X[0] if forecast == "hold" else X[1] + (2 * X[0] - X[0])
    torch.testing.assert_close(unwrap(outputs[1]), expected)
    if isinstance(outputs[1], Sample):
        assert outputs[1].note == "kept"
    if isinstance(outputs[1], tuple) and len(outputs[1]) == 3:
        assert outputs[1][1:] == ("kept", None)
    if type(outputs[1]) is dict:
        assert torch.equal(outputs[1]["ids"], torch.arange(3))


def test_learned_variance_is_held_behind_the_residual():
    outputs, _ = run(Scripted(lambda x, t: torch.cat([2 * x, 7 * x], 1)), always("residual"), X)
    torch.testing.assert_close(outputs[1], torch.cat([X[1] + X[0], 7 * X[0]], 1))


def test_latents_come_before_conditioning_channels():
    outputs, _ = run(Scripted(lambda x, t: 2 * x[:, :2]), always("residual"), X)
    torch.testing.assert_close(outputs[1], X[1][:, :2] + X[0][:, :2])


def test_unrelated_shapes_are_held():
    outputs, _ = run(Scripted(lambda x, t: x.mean((2, 3))), always("residual"), X)
    torch.testing.assert_close(outputs[1], X[0].mean((2, 3)))


def test_lists_of_latents():
    latents = [[x[0], 2 * x[0, :, :3]] for x in X]
    outputs, steps = run(Scripted(lambda xs, t: Sample([3 * x for x in xs])), always("residual"), latents)
    assert steps == [0, 2]
    for i in range(2):
        torch.testing.assert_close(outputs[1].sample[i], latents[1][i] + 2 * latents[0][i])


def test_video_beside_audio():
    model, sounds = Scripted(lambda x, a, t: (2 * x, 5 * a)), walk(3, (1, 7, 3), seed=5)
    with accelerate(model, always("residual")) as accel:
        accel.clock.start(3)
        outputs = []
        for x, a in zip(X, sounds, strict=True):
            outputs.append(model(x, 0.5, encoder_hidden_states=torch.ones(1, 7, 3), audio_hidden_states=a))
            accel.clock.advance()
    torch.testing.assert_close(outputs[1], (X[1] + X[0], sounds[1] + 4 * sounds[0]))


@pytest.mark.parametrize("forecast", FORECASTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(forecast, dtype):
    latents = [x.to(dtype) for x in walk(7)]
    outputs, steps = run(Doubler(), always(forecast, protect_first=0.5, protect_last=0), latents)
    assert steps == [0, 1, 2, 3, 5]
    assert {v.dtype for v in outputs} == {dtype}
    assert all(v.isfinite().all() for v in outputs)


@pytest.mark.parametrize("forecast", FORECASTS)
def test_whoever_writes_into_latents_and_outputs_changes_nothing(forecast):
    plan = always(forecast, protect_first=0.4, max_skips=2)
    expected, _ = run(Doubler(), plan, walk(9))
    model, buffer, outputs = Doubler(), torch.empty(2, 3, 4), []
    with accelerate(model, plan) as accel:
        accel.clock.start(9)
        for i, x in enumerate(walk(9)):
            v = model(buffer.copy_(x), 1000.0 - 10 * i)
            outputs.append(v.clone())
            v.fill_(math.nan)
            buffer.fill_(math.nan)
            accel.clock.advance()
    assert all(map(torch.equal, outputs, expected))


def static_buffers(graph, inputs):
    """A dynamo backend that, like a CUDA graph, writes its outputs into the same memory at every replay."""
    kept = []

    def replay(*args):
        outputs = graph(*args)
        kept[:] = kept or [torch.empty_like(o) for o in outputs]
        for memory, output in zip(kept, outputs, strict=True):
            memory.copy_(output)
        return tuple(kept)

    return replay


@pytest.mark.parametrize("forecast", ["residual", "linear", "trend"])
def test_outputs_of_a_graph_that_the_next_replay_overwrites(forecast):
    def body(x):
        return torch.tanh(2 * x) + x

    section = StepCache(threshold=0.3, protect_first=0.3, forecast=forecast)
    texts = [torch.ones(1, 2, 2), torch.zeros(1, 2, 2)]
    results = []
    for function in (body, torch.compile(body, backend=static_buffers)):
        model, outputs = Scripted(lambda x, t, f=function: f(x)), []
        with accelerate(model, Plan(caching=section)) as accel:
            accel.clock.start(12)
            for i, x in enumerate(walk(12)):
                for branch, text in enumerate(texts):
                    outputs.append(model(x * (1 + branch), 1000.0 - i, encoder_hidden_states=text).clone())
                accel.clock.advance()
            results.append((outputs, computed_steps(accel)))
    assert 3 < len(results[0][1]) < 12
    assert results[0][1] == results[1][1]
    torch.testing.assert_close(results[0][0], results[1][0])


# --- when it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(), [0, 2, 4, 6, 8, 9]),
        (dict(max_skips=3), [0, 4, 8, 9]),
        (dict(max_skips=3, protect_last=0), [0, 4, 8]),
        (dict(protect_first=0.31, protect_last=3), [0, 1, 2, 3, 5, 7, 8, 9]),
        (dict(protect_first=1), list(range(10))),
        (dict(min_steps=11), list(range(10))),
    ],
)
def test_protected_steps(settings, expected):
    assert run(Doubler(), always(**settings), walk(10))[1] == expected


def test_a_late_start_is_protected_by_the_full_schedule():
    assert run(Doubler(), always(protect_first=0.5), walk(4), begin=6)[1] == [6, 8, 9]
    assert run(Doubler(), always(protect_first=0.5), walk(8), begin=2)[1] == [2, 3, 4, 6, 8, 9]


def test_short_schedules_are_left_alone_and_named():
    model = Doubler()
    with accelerate(model, Plan(caching=StepCache(threshold=100))) as accel:
        run_by_hand(accel, model, walk(8))
        (technique,) = accel.report().techniques
        run_by_hand(accel, model, walk(9))
        (later,) = accel.report().techniques
    assert technique.facts["reused"] == 0
    assert technique.notes == ["a schedule of 8 steps was left alone (min_steps is 9)"]
    assert later.facts["reused"] > 0 and later.notes == []  # of the last run


def test_the_second_branch_follows_the_first():
    model, texts = Doubler(), {"cond": torch.ones(1, 2, 2), "uncond": torch.zeros(1, 2, 2)}
    outputs = {name: [] for name in texts}
    with accelerate(model, always()) as accel:
        accel.clock.start(5)
        for i, x in enumerate(walk(5)):
            for name, text in texts.items():
                if (name, i) == ("uncond", 0):
                    continue  # guidance begins later: that branch has nothing to reuse in step 1
                outputs[name].append(model(x if name == "cond" else 10 * x, 1000.0 - i, encoder_hidden_states=text))
            accel.clock.advance()
        facts = accel.report().techniques[0].facts
    x = walk(5)
    torch.testing.assert_close(outputs["cond"], [2 * x[i] for i in (0, 0, 2, 2, 4)])
    torch.testing.assert_close(outputs["uncond"], [20 * x[i] for i in (1, 2, 2, 4)])
    assert (facts["computed"], facts["reused"]) == (6, 3)


def test_cache_contexts_name_the_branches():
    model = Doubler()
    with accelerate(model, always()) as accel:
        accel.clock.start(4)
        seen = []
        for i, x in enumerate(walk(4)):
            for name, sign in (("cond", 1), ("uncond", -1)):
                _set_cache_context(model, CacheContext(name))
                seen.append(model(sign * x, 1000.0 - i))
                _set_cache_context(model, None)
            accel.clock.advance()
    x = walk(4)
    torch.testing.assert_close(seen, [sign * 2 * x[i] for i in (0, 0, 2, 3) for sign in (1, -1)])


@pytest.mark.parametrize("forecast", FORECASTS)
def test_another_size_in_the_middle_of_a_run_is_computed(forecast):
    model = Doubler()
    latents = walk(3) + walk(3, (1, 3, 4)) + walk(3, (1, 5, 4))
    with accelerate(model, always(forecast)) as accel:
        outputs = run_by_hand(accel, model, latents)
        assert computed_steps(accel) == [0, 2, 3, 5, 6, 8]
    assert [v.shape for v in outputs] == [x.shape for x in latents]


@pytest.mark.parametrize("begin", ["clock", "timestep"])
def test_every_run_starts_anew(begin):
    model, latents = Doubler(), walk(6)
    with accelerate(model, always("linear")) as accel:
        runs = []
        for _ in range(3):
            if begin == "clock":
                accel.clock.start(6)
            runs.append([model(x, torch.tensor([1000.0 - 100 * i])) for i, x in enumerate(latents)])
    assert all(torch.equal(runs[0][0], r[0]) and torch.equal(r[0], 2 * latents[0]) for r in runs)
    assert all(map(torch.equal, runs[0] + runs[1], runs[1] + runs[2]))


def test_a_bare_loop_that_cannot_be_followed_is_computed_and_named():
    model = Doubler()
    with accelerate(model, always()) as accel:
        for x in walk(4):
            model(x, None)
        (technique,) = accel.report().techniques
    assert technique.facts["computed"] == 4
    assert technique.notes[0].startswith("where the loop stands is unknown: call accel.clock.start(steps)")


def test_latents_that_are_no_numbers_are_computed_and_named():
    model = Scripted(lambda x, t: x * 2.0)
    with accelerate(model, always()) as accel:
        run_by_hand(accel, model, [torch.arange(6).view(1, 2, 3) + i for i in range(4)])
        (technique,) = accel.report().techniques
    assert (technique.facts["computed"], technique.facts["reused"]) == (4, 0)
    assert technique.notes == ["no argument of the denoiser holds floating latents: nothing is cached"]


def test_an_exception_leaves_no_state():
    fails = [False]

    def script(x, t):
        if fails[0]:
            raise ZeroDivisionError
        return 2 * x

    model, latents = Scripted(script), walk(8)
    with accelerate(model, always("linear", threshold=1)) as accel:
        expected = run_by_hand(accel, model, latents)
        accel.clock.start(8)
        for i, x in enumerate(latents[:4]):
            fails[0] = i == 2
            with pytest.raises(ZeroDivisionError) if fails[0] else nullcontext():
                model(100 * x, 1000.0 - i)
            accel.clock.advance()
        fails[0] = False
        again = run_by_hand(accel, model, latents)
    assert all(map(torch.equal, expected, again))


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_cache_of_diffusers_is_a_conflict():
    pipe = PIPELINES["wan"].build()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(PlanError, match=r"FirstBlockCacheConfig.*pipe\.transformer\.disable_cache\(\)"):
        accelerate(pipe, Plan(caching=StepCache()))
    pipe.transformer.disable_cache()
    accelerate(pipe, Plan(caching=StepCache())).remove()
    model = ZOO["flux"].build()
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(PlanError, match="already has a cache of diffusers"):
        accelerate(model, Plan(caching=StepCache()))


@pytest.mark.parametrize(
    "bad",
    [
        dict(policy="easi"),
        dict(forecast="hols"),
        dict(threshold=0),
        dict(threshold="low"),
        dict(protect_first=1.1),
        dict(protect_last=-1),
        dict(max_skips=0),
        dict(min_steps=2.5),
    ],
)
def test_bad_settings(bad):
    (name,) = bad
    with pytest.raises(PlanError, match=rf"StepCache\.{name}"):
        StepCache(**bad)


# --- any denoiser -----------------------------------------------------------------------------------------------------

STEPS = 4


# fmt: off
KINDS = [
    "animatediff", "auraflow", "chroma", "cogvideox", "cosmos", "curio", "dit", "flux", "hidream", "hunyuan_video",
    "kandinsky5", "ltx", "ltx2", "lumina2", "mochi", "omnigen", "pixart_sigma", "prior", "prx", "qwen_image", "sana",
    "sd3", "stable_audio", "stable_cascade", "unet_sd15", "wan", "wan_i2v", "wan_ti2v", "z_image",
]
# fmt: on
KINDS += [name for name, specimen in ZOO.items() if not specimen.inputs()[specimen.latents[0]][0].is_floating_point()]


@pytest.mark.parametrize("name", KINDS)
def test_zoo(name):
    specimen = ZOO[name]
    model = specimen.build()
    inputs = list(trajectory(specimen, steps=STEPS))
    floating = all(t.is_floating_point() for n in specimen.latents for t in _tensors(inputs[0][n]))

    def loop(accel=None):
        if accel:
            accel.clock.start(STEPS)
        outputs = []
        with torch.no_grad():
            for kwargs in inputs:
                outputs.append(model(**kwargs))
                if accel:
                    accel.clock.advance()
        return outputs

    plain, before = loop(), sorted(vars(model))
    with accelerate(model, always(protect_last=0)) as accel:
        cached, again = loop(accel), loop(accel)
        (technique,) = accel.report().techniques
    source = [0, 0, 2, 2] if floating else [0, 1, 2, 3]
    for i, j in enumerate(source):
        assert type(cached[i]) is type(plain[i])
        assert all(map(torch.equal, specimen.outputs(cached[i]), specimen.outputs(plain[j])))
        assert all(map(torch.equal, specimen.outputs(cached[i]), specimen.outputs(again[i])))
    assert technique.facts["reused"] == (4 if floating else 0)
    assert bool(technique.notes) is not floating
    assert sorted(vars(model)) == before
    assert all(map(torch.equal, specimen.outputs(loop()[-1]), specimen.outputs(plain[-1])))


def _tensors(value):
    return value if isinstance(value, list) else [value]


def test_two_models_in_two_threads():
    def work(seed):
        model = ZOO["pixart_sigma"].build()
        results[seed] = []
        for _ in range(3):
            with torch.no_grad(), accelerate(model, Plan(caching=StepCache(threshold=0.3 * (1 + seed)))) as accel:
                accel.clock.start(12)
                for kwargs in trajectory(ZOO["pixart_sigma"], steps=12):
                    results[seed].append(model(**kwargs)[0])
                    accel.clock.advance()
                results[seed].append(computed_steps(accel))

    def flat(values):
        return [v for v in values if isinstance(v, Tensor)], [v for v in values if isinstance(v, list)]

    results = {}
    for seed in (0, 1):
        work(seed)
    expected = dict(results)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (0, 1):
        (tensors, steps), (tensors_before, steps_before) = flat(results[seed]), flat(expected[seed])
        assert steps == steps_before
        assert all(map(torch.equal, tensors, tensors_before))
    assert expected[0][-1] != expected[1][-1]

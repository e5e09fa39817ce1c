"""Caching on the block stack: published rules against a second writing, and any denoiser."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from torch import nn
from zoo import ZOO, tensors_of

from diffaccel import Plan, PlanError, StepCache, accelerate
from diffaccel.caching.policies import SeaCache
from diffaccel.forecast import Forecast

STEPS = 4
# Between the blocks of these something is added or joined to their streams; there whole calls are skipped.
NOT_FOLLOWED = ("hidream", "bria_fibo", "wan_vace", "kandinsky3")


def loop(model, inputs, accel=None):
    outputs = []
    with torch.no_grad():
        for kwargs in inputs:
            outputs.append(model(**kwargs))
            if accel:
                accel.clock.advance()
    return outputs


def every_other(forecast="hold", **settings):
    """A plan that computes every other step."""
    section = dict(policy="interval", granularity="stack", max_skips=1, protect_first=0, protect_last=0, min_steps=1)
    return Plan(caching=StepCache(forecast=forecast, **section | settings))


@pytest.mark.parametrize("name", ZOO)
def test_a_skipped_step_adds_what_the_blocks_added_before(name):
    """With the same arguments on every step the sum is what would be computed, up to rounding."""
    specimen = ZOO[name]
    model = specimen.build()
    inputs = [specimen.inputs(progress=0.3)] * STEPS
    plain, before = loop(model, inputs), sorted(vars(model))
    with accelerate(model, every_other()) as accel:
        accel.clock.start(STEPS)
        loop(model, inputs[:1], accel)  # where the layout is learnt
        accel.clock.start(STEPS)
        cached = loop(model, inputs, accel)
        (technique,) = accel.report().techniques
    assert sorted(vars(model)) == before
    scale = max(float(v.double().abs().max()) for v in specimen.outputs(plain[0]))
    for got, expected in zip(cached, plain, strict=True):
        for a, b in zip(specimen.outputs(got), specimen.outputs(expected), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4 * scale, rtol=0)
    floating = any(tensors_of(inputs[0][n]) for n in specimen.latents)
    assert technique.facts["reused"] == (2 if floating else 0)
    assert any("whole calls are skipped instead" in note for note in technique.notes) is (name in NOT_FOLLOWED)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.grow, self.shrink, self.calls = nn.Linear(8, 16), nn.Linear(16, 8), 0

    def forward(self, text, hidden_states, temb):
        self.calls += 1
        change = self.shrink(self.grow(hidden_states + text.mean(1, keepdim=True)).sin()) * temb
        return text + 0.1 * change.mean(1, keepdim=True), hidden_states + change


class Toy(nn.Module):
    """Two streams through two lists of three blocks; ``extra`` is added between blocks, as a ControlNet does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.ModuleList(Block() for _ in range(3)) for _ in range(2))

    def forward(self, hidden_states, timestep, encoder_hidden_states, extra=None):
        text, temb = encoder_hidden_states, 1 + torch.as_tensor(timestep) / 1000
        for block in (*self.first, *self.second):
            text, hidden_states = block(text, hidden_states, temb)
            if extra is not None:
                hidden_states = hidden_states + extra
        return hidden_states * temb

    def calls(self):
        return [block.calls for block in (*self.first, *self.second)]


def toy_inputs(steps, **more):
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 5, 8, generator=generator), torch.randn(2, 3, 8, generator=generator)
    moves = torch.randn(steps, 2, 5, 8, generator=generator)
    times = [1000.0 - 100 * i for i in range(steps)]
    return [
        {"hidden_states": x + 0.1 * m, "timestep": t, "encoder_hidden_states": text, **more}
        for m, t in zip(moves, times, strict=True)
    ]


def run(model, plan, inputs):
    """Outputs, computed steps and notes of a run; the layout is learnt before."""
    with accelerate(model, plan) as accel:
        accel.clock.start(len(inputs))
        loop(model, inputs[:1], accel)
        for block in (*model.first, *model.second):
            block.calls = 0
        accel.clock.start(len(inputs))
        outputs = loop(model, inputs, accel)
        (technique,) = accel.report().techniques
    (steps,) = technique.facts["steps_computed"].values()
    return outputs, steps, technique.notes


def by_hand(model, kwargs, front, back, added=None):
    """A second writing: the output and what the cached blocks of each list add; ``added`` instead of computing it."""
    x, text, temb = (
        kwargs["hidden_states"],
        kwargs["encoder_hidden_states"],
        1 + torch.tensor(kwargs["timestep"]) / 1000,
    )
    found = {}
    for start, blocks in ((0, model.first), (3, model.second)):
        cached = [i for i in range(start, start + 3) if front <= i < 6 - back]
        for i, block in enumerate(blocks, start):
            if added and i in cached:
                if i == cached[0]:
                    text, x = text + added[start][0], x + added[start][1]
                continue
            if cached and i == cached[0]:
                before = text, x
            text, x = block(text, x, temb)
            if cached and i == cached[-1]:
                found[start] = text - before[0], x - before[1]
    return x * temb, found


@pytest.mark.parametrize(("front", "back"), [(0, 0), (1, 0), (0, 1), (2, 2), (3, 0), (4, 1)])
def test_blocks_in_front_and_behind_always_run(front, back):
    model, inputs = Toy(), toy_inputs(4)
    outputs, steps, _ = run(model, every_other(front=front, back=back), inputs)
    assert steps == [0, 2]
    assert model.calls() == [4] * front + [2] * (6 - front - back) + [4] * back
    for step in (0, 2):
        computed, added = by_hand(model, inputs[step], front, back)
        torch.testing.assert_close(outputs[step], computed, atol=1e-6, rtol=1e-6)
        skipped, _ = by_hand(model, inputs[step + 1], front, back, added)
        torch.testing.assert_close(outputs[step + 1], skipped, atol=1e-6, rtol=1e-6)


def test_what_is_added_between_blocks_is_not_added_twice():
    """Learnt without, called with a ControlNet's residuals: they would be in what is kept, and come again."""
    model, plain = Toy(), toy_inputs(4)
    extra = toy_inputs(4, extra=torch.full((2, 5, 8), 0.3))
    with accelerate(model, every_other()) as accel:
        accel.clock.start(4)
        loop(model, plain, accel)
        accel.clock.start(4)
        outputs = loop(model, extra, accel)
        (technique,) = accel.report().techniques
    expected = loop(model, extra)
    torch.testing.assert_close(outputs[0], expected[0], atol=0, rtol=0)
    torch.testing.assert_close(outputs[1], expected[0], atol=0, rtol=0)  # whole calls are reused instead
    torch.testing.assert_close(outputs[2], expected[2], atol=0, rtol=0)
    assert any("added between its blocks" in note for note in technique.notes)


def test_another_order_of_blocks_is_computed():
    """Layers that a guidance method leaves out (SD3's skip_layers): the call is made again, with what it asks for."""
    model, inputs = Toy(), toy_inputs(4)
    with accelerate(model, every_other()) as accel:
        accel.clock.start(4)
        loop(model, inputs[:3], accel)  # learns, records, skips
        model.first = model.first[:2]
        got = loop(model, inputs[3:], accel)
        (technique,) = accel.report().techniques
    torch.testing.assert_close(got, loop(model, inputs[3:]), atol=0, rtol=0)
    assert any("same order" in note for note in technique.notes)


@pytest.mark.parametrize("threshold", [0.02, 0.05, 0.1, 0.3])
def test_first_block_cache_is_that_of_diffusers(threshold):
    specimen = ZOO["wan"]
    model = specimen.build()
    inputs = [specimen.inputs(progress=step / 12) for step in range(12)]
    with accelerate(model, Plan(caching=StepCache.first_block(threshold))) as accel:
        accel.clock.start(12)
        loop(model, inputs[:1], accel)
        accel.clock.start(12)
        ours = loop(model, inputs, accel)
        (steps,) = accel.report().techniques[0].facts["steps_computed"].values()
    model.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    tail, computed = model.blocks[-1], []
    handle = tail.attn1.register_forward_hook(lambda *_: computed.append(True))
    theirs, theirs_computed = [], []
    for step, kwargs in enumerate(inputs):
        computed.clear()
        with model.cache_context("cond"):
            theirs += loop(model, [kwargs])
        theirs_computed += [step] if computed else []
    handle.remove()
    model.disable_cache()
    assert steps == theirs_computed
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a[0], b[0], atol=1e-5, rtol=1e-5)


def test_seacache_filters_as_diffusers_does():
    from diffusers.hooks.sea_cache import _apply_sea_filter

    x = torch.randn(2, 4, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    ours = SeaCache(0.2, lambda t: t)._filter(x, 0.7)
    theirs = torch.stack([_apply_sea_filter(sample.movedim(0, -1), 0.7, 3.0).movedim(-1, 0) for sample in x])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_seacache_by_hand():
    """A constant image has one frequency: filtering scales it, and the distance is that of the values."""
    policy, steps = SeaCache(0.25, lambda t: 0.5), []
    for step, value in enumerate((10.0, 9.0, 8.1, 7.29, 6.561)):  # each 10 % less than the one before
        policy.look([torch.full((1, 2, 4, 4), value)], 0.0, step)
        if not (step and policy.skip()):
            steps.append(step)
            policy.learn([torch.zeros(1)])
    assert steps == [0, 3]  # .1, .2, then .3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "first-block"}, "needs granularity='stack' and front of 1 or more, got 'root' and 0"),
        ({"policy": "first-block", "granularity": "stack"}, "got 'stack' and 0"),
        ({"front": 1}, "blocks of granularity='stack'"),
        ({"granularity": "block"}, "StepCache.granularity is 'block'"),
        ({"granularity": "stack", "front": -1}, "front must be a whole number"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(PlanError, match=message):
        StepCache(**settings)


@pytest.mark.parametrize(("front", "back"), [(6, 0), (3, 3), (2, 9)])
def test_nothing_left_to_skip_is_refused(front, back):
    with pytest.raises(PlanError, match=f"front={front} and back={back} leave none of the 6 blocks of transformer"):
        accelerate(Toy(), every_other(front=front, back=back))


def test_taylorseer_orders():
    assert [StepCache.taylorseer(3, order).forecast for order in (0, 1, 2)] == ["hold", "linear", "quadratic"]
    with pytest.raises(PlanError, match="order 0, 1 or 2, got 3"):
        StepCache.taylorseer(3, 3)


def test_a_parabola_is_forecast_exactly():
    """Order 2 of TaylorSeer over uneven timesteps."""
    memory = Forecast("quadratic")
    curve = lambda t: torch.tensor([[2.0 - 3 * t + 0.5 * t * t, t * t]])  # noqa: E731
    for t in (9.0, 7.0, 4.0):
        memory.record([], [curve(t)], t)
    torch.testing.assert_close(memory([], 2.5)[0], curve(2.5))

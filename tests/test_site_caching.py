"""Caching of single modules and of a UNet's deep part: which they are, and that the rest goes on right."""

import itertools
import math

import numpy as np
import pytest
import torch
from caching_parts import Doubler
from torch import nn
from zoo import ZOO
from zoo_pipelines import PIPELINES

from diffaccel import Plan, PlanError, StepCache, accelerate, calibrate
from diffaccel.caching.lags import Lags, lags_of
from diffaccel.caching.modules import cacheable
from diffaccel.denoiser import Denoiser

STEPS = 4
UNETS = ("unet_2d", "unet_sd15", "unet_sdxl", "svd", "animatediff", "unet_3d", "i2vgen_xl")


def loop(model, inputs, accel=None):
    outputs = []
    with torch.no_grad():
        for kwargs in inputs:
            outputs.append(model(**kwargs))
            if accel:
                accel.clock.advance()
    return outputs


def plan(granularity="sites", **settings):
    section = dict(policy="interval", max_skips=1, protect_first=0, protect_last=0, min_steps=1, forecast="hold")
    return Plan(caching=StepCache(granularity=granularity, **section | settings))


def report(accel):
    return accel.report().techniques[0]


def same_inputs(name, settings):
    """Outputs with the same arguments on every step: what is reused is what would be computed."""
    specimen = ZOO[name]
    model = specimen.build()
    inputs = [specimen.inputs(progress=0.3)] * STEPS
    plain, before = loop(model, inputs[:1])[0], sorted(vars(model))
    with accelerate(model, settings) as accel:
        accel.clock.start(STEPS)
        cached = loop(model, inputs, accel)
        facts = report(accel)
    assert sorted(vars(model)) == before
    scale = max(float(v.double().abs().max()) for v in specimen.outputs(plain))
    for got in cached:
        for a, b in zip(specimen.outputs(got), specimen.outputs(plain), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4 * scale, rtol=0)
    return facts


# fmt: off
KINDS = [
    "allegro", "animatediff", "auraflow", "cogvideox", "cosmos", "dit", "flux", "hidream", "hunyuan_video", "latte",
    "ltx2", "lumina2", "mochi", "pixart_sigma", "qwen_image", "sana", "sd3", "stable_audio", "unet_sdxl", "wan",
    "z_image",
]
# fmt: on


@pytest.mark.parametrize("name", KINDS)
def test_outputs_of_modules_are_reused(name):
    facts = same_inputs(name, plan()).facts
    (groups,) = facts["steps_computed"].values()
    assert all(steps == [0, 2] for steps in groups.values())
    assert facts["reused"] == 2 and facts["cache_bytes"] > 0


@pytest.mark.parametrize("name", ["pixart_sigma", "flux", "wan", "sd3", "hidream", "unet_sd15", "svd", "curio"])
def test_what_blocks_add_is_reused(name):
    facts = same_inputs(name, plan(sites="block"))
    assert facts.facts["reused"] == 2


def test_feed_forwards_are_found():
    found = {
        n: [s.name for s in cacheable(Denoiser.of(ZOO[n].build(), "x")) if s.role == "ff"] for n in ("wan", "hidream")
    }
    assert found["wan"] == [f"blocks.{i}.ffn" for i in range(3)]
    assert not any("expert" in name for name in found["hidream"]) and found["hidream"]


class Part(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.to_q = nn.Linear(4, 4)
        self.factor, self.calls = factor, 0

    def forward(self, hidden_states):
        self.calls += 1
        return self.factor * hidden_states + self.calls


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.attn2 = Part(2.0), Part(3.0)

    def forward(self, hidden_states, gate):
        hidden_states = hidden_states + gate * self.attn(hidden_states)
        return hidden_states + gate * self.attn2(hidden_states)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, hidden_states, timestep):
        for block in self.blocks:
            hidden_states = block(hidden_states, timestep / 1000)
        return hidden_states

    def calls(self):
        return [(b.attn.calls, b.attn2.calls) for b in self.blocks]


def toy_inputs(steps):
    x = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    return [{"hidden_states": x * (1 - 0.1 * i), "timestep": 1000.0 - 100 * i} for i in range(steps)]


def test_kept_before_the_gate_and_by_kind():
    """A second writing: each kind by its interval, the gate and the sum of the step itself."""
    model, inputs = Toy(), toy_inputs(7)
    with accelerate(model, plan(every="attn=2 cross=3", sites="attn cross")) as accel:
        accel.clock.start(7)
        outputs = loop(model, inputs, accel)
        facts = report(accel).facts
    assert facts["steps_computed"]["transformer"] == {"attn": [0, 2, 4, 6], "cross": [0, 3, 6]}
    assert facts["timeline"]["transformer"] == {"cond attn": "#.#.#.#", "cond cross": "#..#..#"}
    assert model.calls() == [(4, 3)] * 2
    kept = {}
    for step, (kwargs, got) in enumerate(zip(inputs, outputs, strict=True)):
        x, gate = kwargs["hidden_states"], kwargs["timestep"] / 1000
        for block in range(2):
            for kind, every, factor in (("attn", 2, 2.0), ("attn2", 3, 3.0)):
                if step % every == 0:
                    kept[block, kind] = factor * x + step // every + 1
                x = x + gate * kept[block, kind]
        torch.testing.assert_close(got, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("forecast", ["linear", "quadratic"])
def test_taylorseer_continues_each_module(forecast):
    """Outputs that are polynomials of the timestep are foretold exactly."""
    power = {"linear": 1, "quadratic": 2}[forecast]

    class Polynomial(Part):
        def forward(self, hidden_states, t=[0]):  # noqa: B006
            return torch.ones_like(hidden_states) * (self.now / 1000) ** power

    model = Toy()
    for block in model.blocks:
        block.attn, block.attn2 = Polynomial(1.0), Polynomial(1.0)
    settings = plan(forecast=forecast, protect_first=0.5, max_skips=9)

    def run(accel):
        outputs = []
        for kwargs in toy_inputs(7):
            for block in model.blocks:
                block.attn.now = block.attn2.now = kwargs["timestep"]
            outputs.append(model(**kwargs))
            if accel:
                accel.clock.advance()
        return outputs

    plain = run(None)
    with accelerate(model, settings) as accel:
        accel.clock.start(7)
        got = run(accel)
        assert report(accel).facts["steps_computed"]["transformer"]["attn"] == [0, 1, 2, 3]
    torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-5)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_memory_is_granted_up_to_the_limit():
    model, inputs = Toy(), toy_inputs(4)
    one = inputs[0]["hidden_states"].nbytes
    with accelerate(model, plan(memory=3 * one, sites="attn cross")) as accel:
        for _ in range(2):
            accel.clock.start(4)
            loop(model, inputs, accel)
        technique = report(accel)
    assert technique.facts["cache_bytes"] == technique.facts["cache_bytes_granted"] == 3 * one
    assert model.calls() == [(4, 4), (4, 8)]
    assert f"left no room for {one} more" in technique.notes[0]


@pytest.mark.parametrize("granularity", ["root", "stack", "deep"])
def test_no_memory_no_skips(granularity):
    specimen = ZOO["unet_sd15" if granularity == "deep" else "pixart_sigma"]
    model, inputs = specimen.build(), [specimen.inputs(progress=i / STEPS) for i in range(STEPS)]
    plain = loop(model, inputs)
    with accelerate(model, plan(granularity, memory=100, back=int(granularity == "deep"))) as accel:
        accel.clock.start(STEPS)
        got = loop(model, inputs, accel)
        technique = report(accel)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(got, plain, strict=True))
    assert (technique.facts["reused"], technique.facts["cache_bytes"]) == (0, 0)
    assert "left no room" in technique.notes[-1]


# --- UNets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layers"), [*((name, n) for name in UNETS for n in (1, 3)), ("unet_sd15", 2), ("unet_sdxl", 5)]
)
def test_the_outer_layers_of_unets_get_their_skip_connections(name, layers):
    facts = same_inputs(name, plan("deep", back=layers))
    assert facts.facts["reused"] == 2 and not facts.notes


def test_deepcache_by_hand():
    """A second writing on the UNet of Stable Diffusion: input convolution, last up layer, what came from below."""
    specimen = ZOO["unet_sd15"]
    model = specimen.build()
    inputs = [specimen.inputs(progress=0.3), specimen.inputs(progress=0.4)]
    with accelerate(model, Plan(caching=StepCache.deepcache(2))) as accel:
        accel.clock.start(2)
        got = loop(model, inputs, accel)[1][0]
        assert report(accel).facts["timeline"] == {"unet": {"cond": "#."}}
    below = []
    handle = model.up_blocks[-1].attentions[-2].register_forward_hook(lambda m, i, o: below.append(o[0]))
    loop(model, inputs[:1])
    handle.remove()
    with torch.no_grad():
        kwargs, last = inputs[1], model.up_blocks[-1]
        time = model.time_embedding(model.time_proj(kwargs["timestep"]))
        x = torch.cat([below[0], model.conv_in(kwargs["sample"])], 1)
        x = last.attentions[-1](last.resnets[-1](x, time), encoder_hidden_states=kwargs["encoder_hidden_states"])[0]
        expected = model.conv_out(model.conv_act(model.conv_norm_out(x)))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_partial_calls_are_cheap():
    specimen, ran = ZOO["unet_sdxl"], []
    model = specimen.build()
    for resnet in (m for m in model.modules() if "Resnet" in type(m).__name__):
        resnet.conv1.register_forward_hook(lambda m, i, o: ran.append(m))
    with accelerate(model, Plan(caching=StepCache.deepcache(2))) as accel:
        accel.clock.start(2)
        loop(model, [specimen.inputs(progress=0.3)], accel)
        ran.clear()
        loop(model, [specimen.inputs(progress=0.4)], accel)
    assert ran == [model.up_blocks[-1].resnets[-1].conv1]


def test_unets_only():
    with pytest.raises(PlanError, match="is for UNets, and transformer"):
        accelerate(ZOO["wan"].build(), plan("deep", back=1))
    with pytest.raises(PlanError, match=r"back=6 leaves none of the 6 up layers"):
        accelerate(ZOO["unet_sd15"].build(), plan("deep", back=6))


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(granularity="deep"), "needs back >= 1"),
        (dict(granularity="sites", back=1), "back are blocks of granularity='stack' or layers"),
        (dict(granularity="sites", every="attn=2"), "every belongs to"),
        (dict(granularity="sites", policy="interval", every="attn"), "'attn' is no glob with a number"),
        (dict(granularity="sites", policy="interval", every="attn=0"), "'attn=0' is no glob"),
        (dict(granularity="sites", forecast="residual"), "is for whole calls"),
        (dict(memory=-1), "memory must be"),
        (dict(sites=""), "sites must be a text"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(PlanError, match=message):
        StepCache(**settings)


def test_no_such_modules():
    with pytest.raises(PlanError, match=r"sites='mlp' names none.*roles are attn, block, cross, ff"):
        accelerate(ZOO["wan"].build(), plan(sites="mlp"))
    with pytest.raises(PlanError, match=r"names transformer\.blocks\.0 and, inside it, transformer\.blocks\.0\.attn1"):
        accelerate(ZOO["wan"].build(), plan(sites="attn block"))


@pytest.mark.parametrize(
    "section",
    [StepCache.fora(), StepCache.taylorseer_full(), StepCache.pab(), StepCache.deepcache(), StepCache.step_rehash()],
)
def test_round_trip(section, tmp_path):
    plan = Plan(caching=section)
    assert Plan.load(plan.save(tmp_path)) == plan


# --- SmoothCache and TeaCache -----------------------------------------------------------------------------------------


def test_smooth_schedules_by_hand():
    never = math.inf
    lags = Lags(
        (1000.0, 900.0, 800.0, 700.0, 600.0),
        np.array([[never, never], [0.1, never], [0.1, 0.3], [0.1, 0.15], [0.2, 0.2]]),
    )
    free = lambda step: False  # noqa: E731
    own = lags.timesteps
    assert lags.schedule(own, 0.2, 9, free) == {0, 2}  # 1 -> 2 would be .1, but 0 -> 2 is .3; then .1 and .2
    assert lags.schedule(own, 0.3, 9, free) == {0, 3}  # 0 -> 3 was not measured
    assert lags.schedule(own, 0.3, 1, free) == {0, 2, 4}
    assert lags.schedule(own, 0.3, 9, lambda step: step == 1) == {0, 1, 4}
    assert lags.schedule(own, 0.05, 9, free) == set(range(5))
    half = [1000.0 - 50 * i for i in range(9)]  # twice as many steps: half the errors
    assert lags.schedule(half, 0.051, 1, free) == {0, 1, 3, 5, 7, 8}  # 950 lies beside a step with nothing before it


def test_smoothcache_is_calibrated_and_follows_its_errors():
    specimen = PIPELINES["pixart_sigma"]
    pipe, outputs = specimen.build(), []
    handle = pipe.transformer.transformer_blocks[1].ff.register_forward_hook(lambda m, i, o: outputs.append(o.clone()))
    call = specimen.arguments(steps=8)
    plan = calibrate(pipe, StepCache.smoothcache(0.2), prompts=call.pop("prompt"), **call)
    handle.remove()
    lags = lags_of(plan.artefacts, "transformer")
    assert set(lags) == {"attn", "cross", "ff"} and lags["ff"].errors.shape == (8, 3)
    one = [float((b - a).abs().sum() / a.abs().sum()) for a, b in itertools.pairwise(outputs)]
    others = lags["ff"].errors[1:, 0] * 3 - np.array(one)  # of the two other blocks
    assert (others > 0).all() and others.max() < 2
    for steps in (8, 12):
        with accelerate(pipe, plan) as accel:
            assert specimen.call(pipe, steps=steps).isfinite().all()
            computed = report(accel).facts["steps_computed"]["transformer"]
        assert set(computed) == {"attn", "cross", "ff"} and all({0, steps - 1} <= set(s) for s in computed.values())
    timesteps = lags["ff"].timesteps
    tight = lags["ff"].schedule(timesteps, float(lags["ff"].errors[1:, 0].max()), 1, lambda s: s in (0, 7))
    assert tight == {0, 2, 4, 6, 7}
    with pytest.raises(PlanError, match="needs the calibrated errors of modules"):
        accelerate(pipe, Plan(caching=StepCache.smoothcache()))


def test_teacache_adds_up_what_the_first_attention_is_given():
    specimen = ZOO["flux"]
    model = specimen.build()
    inputs = [specimen.inputs(progress=step / 12) for step in range(12)]
    given = []
    handle = model.transformer_blocks[0].attn.to_q.register_forward_pre_hook(lambda m, i: given.append(i[0].clone()))
    loop(model, inputs)
    handle.remove()
    expected, moved = [0], 0.0
    for step, (a, b) in enumerate(itertools.pairwise(given), 1):
        moved += float((b - a).abs().mean() / a.abs().mean())
        if moved >= 0.3 or step == 11:
            expected.append(step)
            moved = 0.0
    before = (
        sorted(vars(model.transformer_blocks[0].attn.to_q)),
        len(model.transformer_blocks[0].attn.to_q._forward_pre_hooks),
    )
    with accelerate(model, Plan(caching=StepCache.teacache(0.3))) as accel:
        for _ in range(2):  # the layout is learnt in the first
            accel.clock.start(12)
            loop(model, inputs, accel)
        assert report(accel).facts["steps_computed"]["transformer"] == expected
    assert 3 < len(expected) < 11
    to_q = model.transformer_blocks[0].attn.to_q
    assert (sorted(vars(to_q)), len(to_q._forward_pre_hooks)) == before
    with pytest.raises(PlanError, match="has none there; use policy='first-block'"):
        accelerate(Doubler(), Plan(caching=StepCache.teacache()))

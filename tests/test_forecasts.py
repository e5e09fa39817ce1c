"""What stands in for a skipped output: by hand, and whatever the structure of the output."""

import math
from dataclasses import dataclass

import pytest
import torch
from caching_parts import FORECASTS, Doubler, Scripted, always, computed_steps, run, walk
from diffusers.utils import BaseOutput
from torch import Tensor

from diffaccel import Plan, StepCache, accelerate


@dataclass
class Sample(BaseOutput):
    sample: Tensor
    note: str = "kept"


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

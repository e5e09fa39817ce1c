"""Guidance reuse by hand, with both ways of guidance, and on real pipelines."""

import pytest
import torch
from diffusers.hooks.faster_cache import _split_low_high_freq
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from torch import nn
from zoo_pipelines import PIPELINES

from diffaccel import GuidanceReuse, Plan, PlanError, StepCache, accelerate
from diffaccel.guidance.frequency import mixed

UNGUIDED = ("flux", "flux_img2img", "hunyuan_video")  # distilled: the scale is an input
NOTHING = Plan(caching=StepCache(min_steps=100))  # leaves short schedules alone
TEXT, NO_TEXT = torch.full((1, 3, 4), 2.0), torch.zeros(1, 3, 4)


class Denoiser(nn.Module):
    """Gives latents * timestep / 1000 + mean of the text; ``rows`` has the batch size of every call."""

    def __init__(self, mixes=False):
        super().__init__()
        self.scale, self.mixes, self.rows = nn.Parameter(torch.ones(1), requires_grad=False), mixes, []

    def forward(self, hidden_states, timestep, encoder_hidden_states):
        self.rows.append(len(hidden_states))
        strength = encoder_hidden_states.mean((1, 2)).view(-1, 1, 1) * (1 + timestep / 1000)
        output = self.scale * hidden_states + strength
        return output + encoder_hidden_states.mean() if self.mixes else output


def counts(report):
    return report.facts["uncond_computed"], report.facts["uncond_reused"]


def batched(model, plan, steps=6, samples=2):
    """A run with both halves in one call; outputs and the report."""
    with accelerate(model, plan) as accel:
        return batched_run(model, accel, steps, samples), accel.report().techniques[0]


def batched_run(model, accel, steps, samples):
    accel.clock.start(steps)
    x = torch.randn(samples, 5, 4, generator=torch.Generator().manual_seed(0))
    text = torch.cat([NO_TEXT.expand(samples, -1, -1), TEXT.expand(samples, -1, -1)])
    outputs = []
    for step in range(steps):
        outputs.append(model(torch.cat([x, x]) / (1 + step), 1000.0 - 100 * step, text))
        accel.clock.advance()
    return outputs


def test_another_batch_size_in_the_next_run():
    plan, model = Plan(guidance=GuidanceReuse(forecast="linear", steps=(0.0, 1.0), every=2)), Denoiser()
    with accelerate(model, plan) as accel:
        for samples in (2, 1, 3, 2):
            model.rows.clear()
            outputs = batched_run(model, accel, 6, samples)
            assert [len(v) for v in outputs] == [2 * samples] * 6 and set(model.rows) == {samples, 2 * samples}
            plain, _ = batched(Denoiser(), NOTHING, samples=samples)
            torch.testing.assert_close(outputs[3:], plain[3:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("forecast", ["hold", "linear", "trend"])
def test_batched_by_hand(forecast):
    """The difference is 2 * (1 + t / 1000): a line, which linear and trend continue exactly."""
    plan = Plan(guidance=GuidanceReuse(forecast=forecast, steps=(0.0, 1.0), every=2))
    model = Denoiser()
    plain, _ = batched(Denoiser(), NOTHING)
    outputs, report = batched(model, plan)
    assert model.rows == [4, 4, 2, 2, 4, 2, 4]  # step 1 tells that both halves are there, and tries one
    assert counts(report) == (3, 2)
    # Step 0 is not known to hold both halves.
    assert report.facts["timeline"] == {
        "transformer": {"without prompt": " #.#.#".replace(".", "~" if forecast != "hold" else ".")}
    }
    for step, (got, exact) in enumerate(zip(outputs, plain, strict=True)):
        torch.testing.assert_close(got[2:], exact[2:], atol=1e-6, rtol=1e-6)
        # The difference falls by .2 a step. A line needs two of them, a trend a line that held.
        late = {"hold": (2, 4), "linear": (2,), "trend": (2, 4)}[forecast]
        torch.testing.assert_close(got[:2], exact[:2] - (0.2 if step in late else 0), atol=1e-5, rtol=1e-5)


def test_no_guidance_inside_an_interval():
    plan = Plan(guidance=GuidanceReuse(forecast="zero", steps=(0.5, 1.0)))
    model = Denoiser()
    outputs, report = batched(model, plan)
    plain, _ = batched(Denoiser(), NOTHING)
    assert report.facts["uncond_reused"] == 3  # progress .6, .8, 1
    torch.testing.assert_close(outputs[2], plain[2])
    for step in (3, 4, 5):  # at the first of them a half was tried
        torch.testing.assert_close(outputs[step], plain[step][2:].repeat(2, 1, 1))


def test_a_denoiser_that_mixes_samples_is_left_alone():
    model = Denoiser(mixes=True)
    outputs, report = batched(model, Plan(guidance=GuidanceReuse(every=2, steps=(0.0, 1.0))))
    plain, _ = batched(Denoiser(mixes=True), NOTHING)
    assert report.facts["uncond_reused"] == 0 and "half a batch does not give half the output" in report.notes[0]
    torch.testing.assert_close(outputs, plain, atol=0, rtol=0)


def two_calls(model, plan, first="cond", steps=6):
    with accelerate(model, plan) as accel:
        accel.clock.start(steps)
        outputs = {"cond": [], "uncond": []}
        for step in range(steps):
            for branch in (first, "uncond" if first == "cond" else "cond"):
                _set_cache_context(model, CacheContext(name=branch))
                text = TEXT if branch == "cond" else NO_TEXT
                outputs[branch].append(model(torch.full((1, 5, 4), 1.0 / (1 + step)), 1000.0 - 100 * step, text))
            accel.clock.advance()
        return outputs, accel.report().techniques[0]


def test_half_a_batch_may_be_rounded_otherwise():
    """Quantized linears take the kernel that is fastest for their number of rows."""
    plan, model = Plan(guidance=GuidanceReuse(steps=(0.0, 1.0), every=2)), Denoiser()
    whole = model.forward

    def rounded(x, *arguments):
        out = whole(x, *arguments)
        return out if len(x) > 2 else out + 0.01 * out.std() * torch.randn(out.shape)

    model.forward = rounded
    _, report = batched(model, plan)
    assert counts(report)[1] > 0
    model.forward = lambda x, *arguments: whole(x, *arguments) * (1 if len(x) > 2 else 1.1)
    _, report = batched(model, plan)
    assert counts(report)[1] == 0 and "half a batch" in report.notes[0]


def test_two_calls_by_hand():
    model = Denoiser()
    outputs, report = two_calls(model, Plan(guidance=GuidanceReuse(forecast="linear", steps=(0.0, 1.0), every=3)))
    plain, _ = two_calls(Denoiser(), NOTHING)
    assert counts(report) == (2, 4) and len(model.rows) == 8
    torch.testing.assert_close(outputs["cond"], plain["cond"], atol=0, rtol=0)
    torch.testing.assert_close(outputs["uncond"][3:], plain["uncond"][3:], atol=1e-6, rtol=1e-6)


def test_sooner_where_the_difference_is_expected_to_change():
    """It changes by .2 a step, 4.3, 3.65 and 3.4 being the conditional output at steps 1, 3 and 4."""
    patterns = {0.3: "##....", 0.1: "##..#.", 0.05: "##.###", 1e-3: "######"}
    for change, pattern in patterns.items():
        report = two_calls(Denoiser(), guided(change=change, every=6))[1]
        assert report.facts["timeline"] == {"transformer": {"without prompt": pattern}}


def guided(**settings):
    return Plan(guidance=GuidanceReuse(**dict(steps=(0.0, 1.0), forecast="hold") | settings))


class Fading(Denoiser):
    """The text has no effect from timestep 500 on."""

    def forward(self, hidden_states, timestep, encoder_hidden_states):
        left = max(timestep - 500, 0) / 500
        return super().forward(hidden_states + torch.arange(4.0), timestep, encoder_hidden_states * left)


@pytest.mark.parametrize(
    ("call", "always", "until"),
    [(batched, " #.#.#.#.#.", " #.#.#....."), (two_calls, "#.#.#.#.#.#", "#.#.#.#....")],
)
def test_it_ends_when_both_branches_agree(call, always, until):
    for agree, pattern in ((None, always), (0.9999, until)):
        report = call(Fading(), guided(agree=agree, every=2), steps=11)[1]
        assert report.facts["timeline"] == {"transformer": {"without prompt": pattern}}


@pytest.mark.parametrize(("progress", "low", "high"), [(0.05, 1, 1), (0.5, 1.1, 1), (0.8, 1.1, 1.1), (0.95, 1, 1.1)])
def test_frequencies_are_weighted_as_in_diffusers(progress, low, high):
    difference = torch.randn(1, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    split = [torch.fft.ifftshift(part) for part in _split_low_high_freq(difference)]  # shifted over all axes
    parts = [torch.fft.ifft2(part).real for part in split]
    torch.testing.assert_close(mixed(difference, progress), low * parts[0] + high * parts[1], atol=1e-5, rtol=1e-4)
    tokens = difference.flatten(2)
    assert torch.equal(mixed(tokens, progress), tokens)


def test_the_unconditional_call_first():
    outputs, report = two_calls(Denoiser(), Plan(guidance=GuidanceReuse()), first="uncond")
    plain, _ = two_calls(Denoiser(), NOTHING, first="uncond")
    assert report.facts["uncond_reused"] == 0 and "comes first" in report.notes[0]
    torch.testing.assert_close(outputs["uncond"], plain["uncond"], atol=0, rtol=0)


def test_no_guidance_is_said():
    model = Denoiser()
    with accelerate(model, Plan(guidance=GuidanceReuse())) as accel:
        accel.clock.start(2)
        model(torch.ones(1, 5, 4), 1.0, TEXT)
        assert "no unconditional branch was seen" in accel.report().techniques[0].notes[0]


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines(name):
    """Guided ones lose calls or halves of them, the others are left alone; undone to the bit."""
    specimen = PIPELINES[name]
    pipe = specimen.build()
    plain = specimen.call(pipe)
    with accelerate(pipe, Plan(guidance=GuidanceReuse(every=2, steps=(0.0, 1.0)))) as accel:
        changed = specimen.call(pipe)
        report = accel.report().techniques[0]
    assert (report.facts["uncond_reused"] > 0) is (name not in UNGUIDED), report.notes
    assert bool(report.notes) is (name in UNGUIDED)
    assert changed.shape == plain.shape and bool(torch.isfinite(changed).all())
    assert torch.equal(changed, plain) is (name in UNGUIDED)
    assert torch.equal(specimen.call(pipe), plain)


def test_conflicts_and_mistakes():
    with pytest.raises(PlanError, match="halves the batch"):
        Plan(guidance=GuidanceReuse(), caching=StepCache(granularity="stack"))
    with pytest.raises(PlanError, match="every must be a whole number"):
        GuidanceReuse(every=1)
    with pytest.raises(PlanError, match=r"GuidanceReuse\.forecast is 'none'"):
        GuidanceReuse(forecast="none")
    with pytest.raises(PlanError, match="never computes the branch"):
        GuidanceReuse(forecast="zero", agree=0.9)
    with pytest.raises(PlanError, match=r"GuidanceReuse\.agree must be"):
        GuidanceReuse(agree=1.5)
    with pytest.raises(PlanError, match=r"Plan\.guidance holds"):
        Plan(guidance=StepCache())


def test_round_trip(tmp_path):
    plan = Plan(guidance=GuidanceReuse(every=3, steps=(0.1, 0.9)), caching=StepCache())
    plan.save(tmp_path)
    assert Plan.load(tmp_path) == plan and plan.without("guidance").guidance is None

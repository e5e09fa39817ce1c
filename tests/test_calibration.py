"""`diffaccel.calibrate` for MagCache, and cached runs of whole pipelines."""

import copy
from itertools import pairwise

import pytest
import torch
from zoo_pipelines import PIPELINES

import diffaccel
from diffaccel import ModelError, Plan, PlanError, Quantize, StepCache, accelerate, calibrate

MAG = StepCache.magcache(threshold=0.3)


def residuals(name, steps):
    """Outputs less inputs of each denoiser call of a run, by branch order, watched from outside."""
    pipe, seen = PIPELINES[name].build(), []
    forward = pipe.transformer.forward

    def watched(*args, **kwargs):
        x = kwargs["hidden_states"].clone()
        output = forward(*args, **kwargs)
        seen.append((output[0] if isinstance(output, tuple) else output.sample) - x)
        return output

    pipe.transformer.forward = watched
    arguments = PIPELINES[name].arguments(steps=steps)
    pipe(**arguments)
    return seen, pipe.scheduler.timesteps.tolist()


def test_ratios_are_those_of_the_definition():
    seen, timesteps = residuals("wan", 5)
    pipe = PIPELINES["wan"].build()
    call = PIPELINES["wan"].arguments(steps=5)
    plan = calibrate(pipe, MAG, prompts=[call.pop("prompt")[0]], **call)
    assert set(plan.artefacts) == {
        f"caching.transformer.{b}.{n}" for b in ("cond", "uncond") for n in ("timesteps", "ratios")
    }
    for offset, branch in enumerate(("cond", "uncond")):
        norms = [r.norm(dim=1) for r in seen[offset::2]]  # the channels of [B, C, F, H, W]
        expected = [1.0] + [float((b / a).mean()) for a, b in pairwise(norms)]
        got = plan.artefacts[f"caching.transformer.{branch}.ratios"]
        torch.testing.assert_close(got, torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)
        assert plan.artefacts[f"caching.transformer.{branch}.timesteps"].tolist() == timesteps
    assert not vars(pipe.scheduler).keys() & {"step", "set_timesteps"}
    assert pipe._progress_bar_config == PIPELINES["wan"].build()._progress_bar_config
    assert "_diffusers_hook" not in vars(pipe.transformer)


def test_a_calibrated_plan_survives_saving_and_serves_other_step_counts(tmp_path):
    pipe, specimen = PIPELINES["pixart_sigma"].build(), PIPELINES["pixart_sigma"]
    call = specimen.arguments(steps=10)
    plan = calibrate(pipe, Plan(caching=MAG), prompts=call.pop("prompt"), **call)
    loaded = Plan.load(plan.save(tmp_path / "plan"))
    assert loaded == plan
    for steps in (10, 14):
        expected = specimen.call(pipe, steps=steps)
        with accelerate(pipe, loaded) as accel:
            first, second = specimen.call(pipe, steps=steps), specimen.call(pipe, steps=steps)
            facts = accel.report().techniques[0].facts
        assert facts["computed"] + facts["reused"] == 2 * steps
        assert facts["reused"] > 0
        assert len(facts["steps_computed"]["transformer"]) == facts["computed"] / 2
        assert torch.equal(first, second)
        assert not torch.equal(first, expected)
        assert torch.equal(specimen.call(pipe, steps=steps), expected)
    other = PIPELINES["sana"].build()
    with pytest.raises(PlanError, match="made for another model"):
        accelerate(other, loaded)


def test_two_experts_are_calibrated_apart():
    pipe, specimen = PIPELINES["wan22"].build(), PIPELINES["wan22"]
    call = specimen.arguments(steps=9)
    plan = calibrate(pipe, MAG, prompts=call.pop("prompt"), **call)
    spans = [plan.artefacts[f"caching.{c}.cond.timesteps"].tolist() for c in ("transformer", "transformer_2")]
    assert spans[0] + spans[1] == pipe.scheduler.timesteps.tolist()
    with accelerate(pipe, plan) as accel:
        specimen.call(pipe, steps=9)
        steps = accel.report().techniques[0].facts["steps_computed"]
    assert steps["transformer"][0] == 0
    assert steps["transformer_2"][0] == len(spans[0])  # always computes its first call


def test_the_rest_of_the_plan_is_at_work_while_measuring():
    pipe, specimen = PIPELINES["pixart_sigma"].build(), PIPELINES["pixart_sigma"]
    call = specimen.arguments(steps=4)
    prompt, generator = call.pop("prompt"), call.pop("generator")
    quantized = Plan(caching=MAG, quantization=[Quantize(sites="attn.* ff.*")])
    plain, both = (
        calibrate(pipe, plan, prompts=prompt, generator=copy.deepcopy(generator), **call)
        for plan in (Plan(caching=MAG), quantized)
    )
    name = "caching.transformer.cond.ratios"
    assert not torch.equal(plain.artefacts[name], both.artefacts[name])
    torch.testing.assert_close(plain.artefacts[name], both.artefacts[name], rtol=0.05, atol=0.05)
    assert both.quantization == quantized.quantization


def test_pipelines_without_text_are_calibrated_on_arguments():
    plan = calibrate(PIPELINES["dit"].build(), MAG, prompts={"class_labels": [3]}, num_inference_steps=3)
    assert len(plan.artefacts["caching.transformer.cond.ratios"]) == 3


@pytest.mark.parametrize(
    ("plan", "prompts", "message"),
    [
        (MAG, [], "needs prompts"),
        (MAG, [3], "needs prompts"),
        (MAG, None, "needs prompts"),
        (StepCache(), ["a"], "nothing in this plan needs calibration"),
        (Plan(), ["a"], "nothing in this plan needs calibration"),
        ("balanced", ["a"], "needs a Plan or a section"),
    ],
)
def test_refusals(plan, prompts, message):
    pipe = PIPELINES["dit"].build()
    before = sorted(vars(pipe.transformer))
    with pytest.raises(PlanError, match=message):
        calibrate(pipe, plan, prompts=prompts)
    assert sorted(vars(pipe.transformer)) == before


def test_an_accelerated_pipeline_and_a_model_without_pipeline_are_refused():
    pipe = PIPELINES["dit"].build()
    with accelerate(pipe, Plan(caching=StepCache())), pytest.raises(PlanError, match="already accelerated"):
        calibrate(pipe, MAG, prompts={"class_labels": [3]})
    with pytest.raises(ModelError):
        calibrate("not a pipeline", MAG, prompts="a")
    with pytest.raises(PlanError, match="runs a pipeline"):
        calibrate(pipe.transformer, MAG, prompts="a")


def test_it_is_public():
    assert diffaccel.calibrate is calibrate


PIPES = ["curio", "flux_img2img", "qwen_image", "sd3_heun", "wan22", "z_image"]


@pytest.mark.parametrize("name", PIPES)
def test_pipelines(name):
    """No pipeline needs to know of caches: with a cache context or without, guided twice, in a batch or not at all."""
    specimen, steps = PIPELINES[name], 12
    pipe = specimen.build()
    expected = specimen.call(pipe, steps=steps)
    with accelerate(pipe, Plan(caching=StepCache(threshold=5, protect_first=0.2))) as accel:
        first, second = specimen.call(pipe, steps=steps), specimen.call(pipe, steps=steps)
        (technique,) = accel.report().techniques
    facts, schedule = technique.facts, len(pipe.scheduler.timesteps)
    assert not technique.notes
    assert facts["reused"] > 0
    assert torch.equal(first, second)
    assert first.isfinite().all()
    assert not torch.equal(first, expected)
    assert torch.equal(specimen.call(pipe, steps=steps), expected)
    protected = set(range(-(-schedule // 5))) | {schedule - 1}
    done = [step for steps in facts["steps_computed"].values() for step in steps]
    begin = min(done)
    assert {step for step in protected if step >= begin} <= set(done)
    assert (
        facts["computed"] + facts["reused"] == accel.report().calls[next(iter(facts["steps_computed"]))]
        or name == "wan22"
    )

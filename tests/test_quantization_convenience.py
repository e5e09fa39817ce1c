"""`diffaccel.quantize`: one call for what plan, calibrate, accelerate and bake do in four."""

import pytest
from diffusers import PixArtTransformer2DModel
from test_quantization import alike, out, pixart, quantized, same, snapshot, unchanged
from zoo_pipelines import PIPELINES

from diffaccel import Plan, PlanError, Quantize, accelerate, quantize

pytestmark = pytest.mark.filterwarnings("ignore:diffaccel", "ignore:__array__")


def test_the_same_as_a_plan():
    specimen, model = pixart()
    start, before = snapshot(model), out(specimen, model)
    sections = [Quantize(), Quantize(sites="ff.*", weights="int4", group=32)]
    with accelerate(model, Plan(quantization=sections)):
        expected = out(specimen, model)
    with quantize(model, *sections) as accel:
        assert same(out(specimen, model), expected) and accel.plan.quantization == tuple(sections)
    assert unchanged(model, start) and same(out(specimen, model), before)
    with quantize(model, sites="attn.*", weights="int4", group=64) as accel:
        assert accel.report().techniques[0].facts["schemes"] == {"W4A8 g64": len(quantized(model))}


def test_baked_at_once(tmp_path):
    specimen, model = pixart()
    accel = quantize(model, weights="int4", group=32, bake=True)
    with pytest.raises(PlanError, match="load the model again"):
        accel.remove()
    model.save_pretrained(tmp_path)
    assert alike(out(specimen, PixArtTransformer2DModel.from_pretrained(tmp_path)), out(specimen, model))


def test_calibrates_where_it_must():
    specimen = PIPELINES["pixart_sigma"]
    pipe = specimen.build()
    call = {k: v for k, v in specimen.arguments(steps=2).items() if k not in ("prompt", "generator")}
    start = snapshot(pipe.transformer)
    with pytest.raises(PlanError, match="prompts="):
        quantize(pipe, balance=0.5)
    with quantize(pipe, balance=0.5, sites="ff.*", prompts=["a", "b"], call=call) as accel:
        assert any(name.endswith("squares") for name in accel.plan.artefacts)
        assert "balance 0.5" in next(iter(accel.report().techniques[0].facts["schemes"]))
    assert unchanged(pipe.transformer, start)


def test_what_does_not_go_together_is_refused():
    _, model = pixart()
    for match, args, settings in (
        ("sections and also weights", (Quantize(),), {"weights": "int8"}),
        ("did you mean 'weights'", (), {"weight": "int8"}),
        ("needs prompts", (), {"call": {"num_inference_steps": 2}}),
        ("bare denoiser", (), {"balance": 0.5, "prompts": ["a"]}),
    ):
        with pytest.raises(PlanError, match=match):
            quantize(model, *args, **settings)
    assert not quantized(model)

"""Rounding that is learnt: the codes it starts from, what it gains, that it is kept, and what is refused."""

from dataclasses import replace

import pytest
import torch
from test_quantization import alike, pixart, quantized, same, snapshot, sqnr, unchanged
from torch import nn
from zoo_pipelines import PIPELINES

from diffaccel import Plan, PlanError, Quantize, accelerate, calibrate, learn_rounding
from diffaccel.quantization import reconstruct
from diffaccel.quantization.block_samples import Sample
from diffaccel.quantization.prepare import learnable
from diffaccel.quantization.rounding import Rounding

pytestmark = pytest.mark.filterwarnings("ignore:diffaccel", "ignore:__array__")

LEARNT = Quantize(weights="int4", activations="float", group=32, rounding="learnt")
FORMS = {
    "int8": Quantize(),
    "per channel": Quantize(weights="int4"),
    "groups": Quantize(weights="int4", group=32),
    "rotated, low rank": Quantize(weights="int4", group=32, rotate=True, low_rank=4),
}


@pytest.mark.parametrize("name", FORMS)
def test_it_starts_from_what_the_layer_would_be(name):
    """Nearest codes, the conditioning undone; so the same weight as that of the quantized layer."""
    _, model = pixart()
    layer = model.transformer_blocks[0].ff.net[2]
    section = replace(FORMS[name], sites="transformer.transformer_blocks.0.ff.net.2", float_activations="")
    start = learnable(layer.weight, (0.0, 1.0), section.form(), None)
    rounding = Rounding(start.weight, start.tensors, start.run)
    with torch.no_grad():
        assert rounding.changed() < 0.03  # where two are nearly as near
        exact = (rounding.weight() - layer.weight).abs() < 1e-4  # between codes, but where it is clipped
        assert section.low_rank or exact.float().mean() > 0.95
        with accelerate(model, Plan(quantization=section)):
            expected = layer.weight + 0
            assert torch.allclose(rounding.nearest(), expected, atol=1e-6)
        rounding.v[:2, :5] *= -1
        rounding.gain[3] = 0.02
    tensors = rounding.tensors()
    assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in start.tensors.items()}
    again = Rounding(start.weight, tensors, start.run).nearest()
    assert torch.allclose(again, rounding.weight(hard=True), atol=1e-5)
    if not section.rotate:
        changed = ((again - expected).abs() > 1e-6).float()
        assert changed[:2, :5].mean() > 0.7 and changed[3].mean() > 0.7 and changed[4:].mean() < 0.03


def pipeline():
    specimen = PIPELINES["pixart_sigma"]
    call = specimen.arguments(steps=4)
    return specimen, specimen.build(), {k: v for k, v in call.items() if k not in ("prompt", "generator")}


def seeded(prompts):
    return [{"prompt": p, "generator": torch.Generator().manual_seed(ord(p))} for p in prompts]


@pytest.fixture(scope="module")
def learnt():
    _, pipe, call = pipeline()
    start = snapshot(pipe.transformer)
    plan = learn_rounding(pipe, LEARNT, prompts=seeded("abc"), iterations=12, **call)
    assert unchanged(pipe.transformer, start) and not any(p.grad is not None for p in pipe.transformer.parameters())
    return plan


def test_inputs_that_hang_together_are_made_use_of():
    """Errors of a weight's values can cancel where inputs vary together; nearest codes know nothing of that."""
    torch.manual_seed(0)
    layer, directions = nn.Linear(64, 32), torch.randn(4, 64)

    def samples(count):
        inputs = [torch.randn(50, 4) @ directions + 0.05 * torch.randn(50, 64) for _ in range(count)]
        return [Sample((x,), {}, [layer(x).detach()]) for x in inputs]

    for form in (FORMS["per channel"].form(), FORMS["rotated, low rank"].form()):
        start = learnable(layer.weight, (0.0, 1.0), form, None)
        roundings = {"weight": Rounding(start.weight, start.tensors, start.run)}
        nearest = {"weight": roundings["weight"].nearest()}
        seen, unseen = samples(8), samples(4)
        of_nearest = reconstruct._error(layer, seen, nearest)
        reconstruct._optimise(layer, roundings, seen, of_nearest, 200, lambda: None)
        learnt = {"weight": roundings["weight"].weight(hard=True).detach()}
        assert reconstruct._error(layer, unseen, learnt) < 0.3 * reconstruct._error(layer, unseen, nearest)
        assert 0.01 < roundings["weight"].changed() < 0.6


def test_pictures_are_made_with_what_was_learnt(learnt, tmp_path):
    specimen, pipe, _ = pipeline()
    start = snapshot(pipe.transformer)
    reference = [specimen.call(pipe, steps=4)]
    with accelerate(pipe, Plan(quantization=replace(LEARNT, rounding="nearest"))):
        of_nearest = [specimen.call(pipe, steps=4)]
        nearest = sqnr(reference, of_nearest)
    plan = Plan.load(learnt.save(tmp_path / "plan"))
    with accelerate(pipe, plan) as accel:
        assert list(accel.report().techniques[0].facts["schemes"]) == ["W4A16 g32 + learnt rounding"]
        pictures = [specimen.call(pipe, steps=4)]
        assert sqnr(reference, pictures) > nearest - 0.5 and not same(pictures, of_nearest)
    assert unchanged(pipe.transformer, start)
    accelerate(pipe, plan).bake()
    pipe.transformer.save_pretrained(tmp_path / "model")
    pipe.transformer = type(pipe.transformer).from_pretrained(tmp_path / "model")
    assert len(quantized(pipe.transformer)) > 10 and alike([specimen.call(pipe, steps=4)], pictures)


def test_what_does_not_help_is_not_kept(monkeypatch):
    """Learning that goes astray is noticed on the calls that it did not see."""
    _, pipe, call = pipeline()
    section = replace(LEARNT, sites="transformer.transformer_blocks.0.ff*")

    def astray(module, roundings, *rest):
        for rounding in roundings.values():
            rounding.v.data.neg_()

    monkeypatch.setattr(reconstruct, "_optimise", astray)
    plan = learn_rounding(pipe, section, prompts=seeded("ab"), iterations=1, **call)
    layer = pipe.transformer.transformer_blocks[0].ff.net[2]
    with accelerate(pipe, Plan(quantization=replace(section, rounding="nearest"))):
        nearest = layer.weight + 0
    with accelerate(pipe, plan):
        assert torch.equal(layer.weight + 0, nearest)


def test_goes_on_where_it_was_cut_off(tmp_path, monkeypatch):
    _, pipe, call = pipeline()
    section = replace(LEARNT, sites="ff.* final", balance=0.5)
    plan = calibrate(pipe, section, prompts=seeded("ab"), **call)
    whole = learn_rounding(pipe, plan, prompts=seeded("ab"), iterations=4, **call)
    real, units = reconstruct._learn, []

    def failing(unit, *rest):
        units.append(unit.name)
        if len(units) == 2:
            raise KeyboardInterrupt
        return real(unit, *rest)

    monkeypatch.setattr(reconstruct, "_learn", failing)
    with pytest.raises(KeyboardInterrupt):
        learn_rounding(pipe, plan, prompts=seeded("ab"), iterations=4, folder=tmp_path, **call)
    again = learn_rounding(pipe, plan, prompts=seeded("ab"), iterations=4, folder=tmp_path, **call)
    assert len(units) == len(set(units)) + 1 and units[1] == units[2] and "proj_out" in units[-1]
    assert set(again.artefacts) == set(whole.artefacts)
    assert all(torch.equal(again.artefacts[n], t) for n, t in whole.artefacts.items())
    with pytest.raises(PlanError, match="of another model, plan, prompts"):
        learn_rounding(pipe, plan, prompts=seeded("ab"), iterations=5, folder=tmp_path, **call)


def test_refusals(learnt):
    _, pipe, call = pipeline()
    with pytest.raises(PlanError, match=r"diffaccel\.learn_rounding"):
        accelerate(pipe, Plan(quantization=LEARNT))
    with pytest.raises(PlanError, match=r"diffaccel\.learn_rounding"):  # what was learnt is of other groups
        accelerate(pipe, Plan(quantization=replace(LEARNT, group=64), artefacts=learnt.artefacts))
    with pytest.raises(PlanError, match=r"diffaccel\.calibrate"):
        learn_rounding(pipe, replace(LEARNT, balance=0.5), prompts=["a"], **call)
    with pytest.raises(PlanError, match="nothing in this plan"):
        learn_rounding(pipe, Quantize(), prompts=["a"], **call)
    with pytest.raises(PlanError, match="needs prompts"):
        learn_rounding(pipe, LEARNT, prompts=[], **call)
    with pytest.raises(PlanError, match="fp8"):
        Quantize(weights="fp8", activations="fp8", rounding="learnt")

"""The field that tells engines which steps leave activations in 16 bits: written, read, followed, or refused."""

import json

import pytest
import torch
from diffusers.pipelines.cosmos.mixed_precision import Cosmos3MixedPrecisionConfig, parse_diffusion_step_policy
from test_quantization import alike, quantized
from zoo_pipelines import PIPELINES

from diffaccel import DiffAccelConfig, ModelError, Plan, PlanError, Quantize, accelerate
from diffaccel.quantization.policy import StepPolicy, policy_of, read_policy
from diffaccel.quantization.schedule import schedule_of
from diffaccel.quantization.scheme import Form, Scheme

pytestmark = pytest.mark.filterwarnings("ignore:diffaccel")

STEPS = 8
EDGES = [
    Quantize(activations="float"),
    Quantize(steps=(0.2, 0.95)),  # of 8 steps, numbers 2 to 6
]


def pipeline():
    return PIPELINES["pixart_sigma"], PIPELINES["pixart_sigma"].build()


def test_what_is_written_is_what_diffusers_reads():
    for first, last, overlap in ((3, 2, True), (0, 4, True), (5, 5, False), (5, 5, True)):
        policy = StepPolicy(first, last, overlap)
        body = policy.to_dict()["diffusion_step_policy"]
        theirs = parse_diffusion_step_policy(body, {"quant_algo": "FP8"})
        assert (theirs.first_steps, theirs.last_steps) == (first, last)
        config = Cosmos3MixedPrecisionConfig("fp8", first, last, overlap=theirs.overlap)
        for steps in (1, 2, 7, 20):
            expected = [config.use_high_precision(i, steps) for i in range(steps)]
            assert [policy.high(i, steps) for i in range(steps)] == expected
        assert read_policy({"diffusion_step_policy": body}) == policy


def test_saved_loaded_and_followed(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFACCEL_KERNELS", "int8_linear=onednn")  # the one that rounds activations
    specimen, pipe = pipeline()
    accel = accelerate(pipe, Plan(quantization=EDGES))
    expected = specimen.call(pipe, steps=STEPS)
    accel.bake()
    notes = "\n".join(accel.report().techniques[0].notes)
    assert f"first 2 and last 1 of {STEPS} steps" in notes
    pipe.save_pretrained(tmp_path)
    field = json.loads((tmp_path / "transformer" / "config.json").read_text())["quantization_config"]
    assert parse_diffusion_step_policy(field["runtime"]["diffusion_step_policy"]).first_steps == 2
    saved = {layer: entry["activations"] for entry in field["saved"] for layer in entry["layers"]}
    assert {saved[layer] for layer in saved if "attn1" in layer} == {"int8"}
    with pytest.warns(UserWarning, match="leaves activations in 16 bits in some steps under"):
        loaded = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    native = specimen.call(loaded, steps=STEPS)
    with accelerate(loaded, Plan()) as accel:
        assert "follows its steps: activations in 16 bits in the first 2 and last 1 steps" in "\n".join(
            accel.report().notes
        )
        assert alike([specimen.call(loaded, steps=STEPS)], [expected])
        assert not alike([native], [expected])
    assert torch.equal(specimen.call(loaded, steps=STEPS), native)
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "transformer" / "config.json").read_text())["quantization_config"]
    assert again["runtime"] == field["runtime"] and again["saved"] == field["saved"]


NESTED = [Quantize(), Quantize(weights="int4", group=32, steps=(0.4, 0.8))]


@pytest.mark.parametrize("sections", [NESTED, EDGES], ids=["8 and 4 bits", "before the first run"])
def test_other_bits_at_other_steps_are_saved_too(sections, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFACCEL_KERNELS", "int8_linear=onednn")
    specimen, pipe = pipeline()
    with accelerate(pipe, Plan(quantization=sections)):
        expected = specimen.call(pipe, steps=STEPS)
    accel = accelerate(pipe, Plan(quantization=sections))
    accel.bake()
    assert "is saved with the bits of its steps" in "\n".join(accel.report().techniques[0].notes)
    pipe.save_pretrained(tmp_path / "a")
    field = json.loads((tmp_path / "a" / "transformer" / "config.json").read_text())["quantization_config"]
    assert "runtime" not in field
    with pytest.warns(UserWarning, match="runs other bits at other steps under"):
        loaded = type(pipe).from_pretrained(tmp_path / "a")
    loaded.set_progress_bar_config(disable=True)
    ranged = [layer for layer in quantized(loaded.transformer) if layer.phase is not None]
    assert ranged and len({id(layer.phase) for layer in ranged}) == 1
    assert {layer.active.scheme.weights for layer in ranged} == {"int8"}  # the widest, while nothing follows the steps
    assert {layer.active.scheme.activations for layer in ranged} == (
        {"float"} if sections is EDGES else {"float", "int8"}
    )
    resting = specimen.call(loaded, steps=STEPS)
    for _ in range(2):
        with accelerate(loaded, Plan()) as accel:
            assert "follows its steps" in "\n".join(accel.report().notes)
            assert alike([specimen.call(loaded, steps=STEPS)], [expected])
        assert torch.equal(specimen.call(loaded, steps=STEPS), resting) and not alike([resting], [expected])
    loaded.save_pretrained(tmp_path / "b")
    again = json.loads((tmp_path / "b" / "transformer" / "config.json").read_text())["quantization_config"]
    assert again["saved"] == field["saved"]
    file = tmp_path / "b" / "transformer" / "config.json"
    file.write_text(file.read_text().replace("0.0,", "0.1,"))
    with pytest.raises(ModelError, match="do not lead from 0 to 1"):
        type(pipe.transformer).from_pretrained(tmp_path / "b" / "transformer")


def test_what_reads_several_weights_is_saved_in_its_widest_form(tmp_path):
    _, pipe = pipeline()
    sections = [Quantize(), Quantize(weights="int4", steps=(0.5, 1.0))]  # not in groups: a weight of its own
    accel = accelerate(pipe, Plan(quantization=sections))
    accel.bake()
    assert "layers in their widest form for all steps" in "\n".join(accel.report().techniques[0].notes)
    pipe.transformer.save_pretrained(tmp_path)
    loaded = type(pipe.transformer).from_pretrained(tmp_path)
    assert all(len(layer.runs) == 1 and layer.runs[0].scheme.weights == "int8" for layer in quantized(loaded))


def test_given_while_loading(tmp_path):
    specimen, pipe = pipeline()
    pipe.save_pretrained(tmp_path)
    config = DiffAccelConfig(runtime=StepPolicy(1, 0).to_dict())
    assert DiffAccelConfig.from_dict(config.to_dict()) == config != DiffAccelConfig()
    model = type(pipe.transformer).from_pretrained(tmp_path / "transformer", quantization_config=config)
    ranged = [layer for layer in quantized(model) if layer.phase is not None]
    assert len({id(layer.phase) for layer in ranged}) == 1 and len(ranged) == len(
        [layer for layer in quantized(model) if not layer.weight_only]
    )
    pipe.transformer, seen = model, []
    model.register_forward_hook(lambda *_: seen.append(ranged[0].active.scheme.activations))
    with accelerate(pipe, Plan()):
        specimen.call(pipe, steps=3)
    assert seen == ["float", "int8", "int8"]


def test_images_as_a_start_count_from_their_own_first_step():
    phase_steps = []
    specimen = PIPELINES["sd15_img2img"]
    pipe = specimen.build()
    from diffaccel.quantization.policy import PolicyPhase

    with accelerate(pipe, Plan(quantization=Quantize())) as accel:
        phase = PolicyPhase(StepPolicy(2, 1))
        root = accel._context.root(accel._context.denoisers[0])
        root.listeners.append(phase.follow)
        root.listeners.append(lambda call, arguments, compute: phase_steps.append(phase.active))
        specimen.call(pipe, steps=10, strength=0.5)
    assert phase_steps == [1, 1, 0, 0, 1]


W8A8, W8A16, W4A8 = (Form(scheme) for scheme in (Scheme(), Scheme(activations="float"), Scheme("int4")))


def test_what_fits():
    def of(*matches, steps=9):
        return policy_of([schedule_of(matches), schedule_of([((0.0, 1.0), W8A16)])], steps)

    always = (0.0, 1.0)
    assert of((always, W8A8), ((0.0, 0.25), W8A16))[0] == StepPolicy(2, 0)
    assert of((always, W8A8), ((0.0, 0.25), W8A16), ((0.75, 1.0), W8A16))[0] == StepPolicy(2, 3)
    assert of((always, W8A8)) == (None, "")
    for matches in (
        [(always, W8A8), ((0.4, 0.6), W8A16)],  # in the middle
        [(always, W8A8), ((0.0, 0.2), W4A8)],  # other weights
        [((0.2, 1.0), W8A8)],  # the original
        [(always, W4A8), ((0.0, 0.2), W8A16)],
    ):
        policy, reason = of(*matches)
        assert policy is None and "the same in all layers" in reason
    assert "has run once" in of((always, W8A8), ((0.0, 0.2), W8A16), steps=None)[1]
    two = [schedule_of([(always, W8A8), ((0.0, end), W8A16)]) for end in (0.2, 0.4)]
    assert policy_of(two, 20)[0] is None
    assert policy_of(two, 2)[0] == StepPolicy(1, 0)  # which so few steps cannot tell apart


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"type": "by_noise_level"}, "first_last_n"),
        ({"schema_version": 2}, "schema_version is 2"),
        ({"index_space": "sigma"}, "index_space"),
        ({"scope": ["transformer", "vae"]}, "scope"),
        ({"reasoner": "a16"}, "float_activations"),
        ({"overlap": "b16"}, "did you mean 'a16'"),
        ({"first_steps": {"count": -1, "mode": "a16"}}, "whole number"),
        ({"last_steps": 3}, "last_steps must be"),
        ({"firststeps": 3}, "did you mean 'first_steps'"),
        ({"overlap": None}, "overlap is None"),
    ],
)
def test_what_cannot_be_run_is_refused(change, match):
    body = StepPolicy(1, 1).to_dict()["diffusion_step_policy"] | change
    with pytest.raises(PlanError, match=match):
        DiffAccelConfig(runtime={"diffusion_step_policy": body})
    with pytest.raises(PlanError, match="lacks"):
        read_policy({"diffusion_step_policy": {}})
    with pytest.raises(PlanError, match="must be an object"):
        read_policy({"diffusion_step_policy": 3})

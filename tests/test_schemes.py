"""Every scheme: close to what it promises, as small, undone to the bit, saved and loaded, and switched by step."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel
from test_quantization import alike, out, pixart, quantized, same, snapshot, sqnr, unchanged
from torch import nn
from zoo import ZOO

from diffaccel import DiffAccelConfig, ModelError, Plan, PlanError, Quantize, accelerate
from diffaccel.quantization.linear import QuantizedLinear
from diffaccel.quantization.schedule import schedule_of
from diffaccel.quantization.scheme import Form, Scheme
from diffaccel.quantization.skips import skip_boundaries

pytestmark = pytest.mark.filterwarnings("ignore:diffaccel")

# Settings, least SQNR of the denoiser's output in dB, most bytes per weight (the layers are 64 to 256 wide, so the
# scales weigh more than in a real model), label.
SCHEMES = {
    "W8A8": ({}, 28, 1.1, "W8A8"),
    "W8A16": ({"activations": "float"}, 35, 1.1, "W8A16"),
    "W4A8": ({"weights": "int4", "group": 32}, 13, 0.62, "W4A8 g32"),
    "W4A16": ({"weights": "int4", "activations": "float"}, 11, 0.56, "W4A16"),
    "FP8": ({"weights": "fp8", "activations": "fp8"}, 20, 1.1, "FP8"),
    "rotated": ({"weights": "int4", "group": 64, "rotate": True}, 13, 0.62, "W4A8 g64 + rotation"),
    "low rank": ({"weights": "int4", "low_rank": 8, "refine": 1}, 13, 1.1, "W4A8 + rank 8"),
}


def plan(**settings):
    return Plan(quantization=[Quantize(float_activations="", **settings)])


@pytest.mark.parametrize("name", SCHEMES)
def test_close_small_and_restored(name):
    settings, least, most, label = SCHEMES[name]
    specimen, model = pixart()
    start, before = snapshot(model), out(specimen, model)
    with accelerate(model, plan(**settings)) as accel:
        facts = accel.report().techniques[0].facts
        assert facts["schemes"] == {label: len(quantized(model))}
        notes = " ".join(accel.report().techniques[0].notes)
        assert ("fp8 activations are not rounded" in notes) == (name == "FP8")  # on the CPU
        assert facts["bytes_after"] <= most * facts["bytes_before"] / 4
        assert least < sqnr(before, out(specimen, model)) < least + 25
        layer = model.transformer_blocks[0].ff.net[2]
        assert layer.weight.shape == (64, 256) and torch.isfinite(layer.weight + 0).all()
    assert unchanged(model, start) and same(out(specimen, model), before)


@pytest.mark.parametrize("name", SCHEMES)
def test_saved_and_loaded(name, tmp_path):
    settings, *_ = SCHEMES[name]
    specimen, model = pixart()
    model.save_pretrained(tmp_path / "float")
    accel = accelerate(model, plan(**settings))
    expected = out(specimen, model)
    accel.bake()
    model.save_pretrained(tmp_path / "small")
    loaded = PixArtTransformer2DModel.from_pretrained(tmp_path / "small")
    assert alike(out(specimen, loaded), expected)
    assert [m.runs for m in quantized(loaded)] == [m.runs for m in quantized(model)]
    assert all(
        torch.equal(a.weight + 0, b.weight + 0) for a, b in zip(quantized(loaded), quantized(model), strict=True)
    )
    config = DiffAccelConfig(float_activations="", **settings)
    at_load = PixArtTransformer2DModel.from_pretrained(tmp_path / "float", quantization_config=config)
    assert alike(out(specimen, at_load), expected)
    at_load.save_pretrained(tmp_path / "again")
    assert alike(out(specimen, PixArtTransformer2DModel.from_pretrained(tmp_path / "again")), expected)


def test_what_config_json_does_not_explain_is_refused(tmp_path):
    _, model = pixart()
    accelerate(model, plan()).bake()
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"kind": "int8"', '"kind": "int5"'))
    with pytest.raises(ModelError, match="int5"):
        PixArtTransformer2DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_weights_keep_their_dtype(dtype):
    specimen, model = pixart()
    for settings, *_ in (SCHEMES["FP8"], SCHEMES["low rank"]):
        with accelerate(model, plan(**settings)):
            before = [{n: t.clone() for n, t in m.stored().items()} for m in quantized(model)]
            model.to(dtype)
            for layer, tensors in zip(quantized(model), before, strict=True):
                assert all(torch.equal(layer.stored()[n], t) for n, t in tensors.items())
            inputs = {
                k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v
                for k, v in specimen.inputs().items()
            }
            with torch.no_grad():
                assert specimen.outputs(model(**inputs))[0].dtype == dtype
        model.to(torch.float32)


# --- what runs when ---------------------------------------------------------------------------------------------------


def form(weights):
    return Form(Scheme(weights, "float"))


def test_the_last_section_wins_at_each_step():
    a, b, c = form("int8"), form("int4"), form("fp8")
    assert schedule_of([((0.0, 1.0), a)]) == (((0.0, 1.0), a),)
    assert schedule_of([((0.0, 1.0), a), ((0.2, 0.6), b)]) == (((0.0, 0.2), a), ((0.2, 0.6), b), ((0.6, 1.0), a))
    assert schedule_of([((0.2, 0.6), b), ((0.0, 1.0), a)]) == (((0.0, 1.0), a),)
    assert schedule_of([((0.5, 1.0), a), ((0.25, 0.75), c)]) == (
        ((0.0, 0.25), None),
        ((0.25, 0.75), c),
        ((0.75, 1.0), a),
    )
    assert schedule_of([((0.0, 0.5), a), ((0.5, 1.0), a)]) == (((0.0, 1.0), a),)


@pytest.mark.parametrize("group", [32, None])
def test_bit_width_changes_over_the_steps(group):
    """Each step gives what the plan of that step's scheme alone gives; in groups, one stored weight serves both."""
    specimen, model = pixart()
    start, before = snapshot(model), out(specimen, model)
    wide = Quantize(float_activations="")
    narrow = Quantize(float_activations="", weights="int4", group=group, steps=(0.5, 1.0))
    with accelerate(model, Plan(quantization=[wide, narrow])) as accel:
        facts = accel.report().techniques[0].facts
        accel.clock.start(5)
        outputs = []
        for _ in range(5):
            outputs.append(out(specimen, model))
            accel.clock.advance()
        assert same(outputs[0], outputs[1]) and same(outputs[2], outputs[4]) and not same(outputs[1], outputs[2])
        kinds = {run.kind for m in quantized(model) for run in m.runs}
        assert kinds == ({"nested"} if group else {"int8", "int4"})
        assert all("original" not in m._buffers for m in quantized(model))
        per_weight = facts["bytes_after"] / (facts["bytes_before"] / 4)
        assert per_weight < (1.25 if group else 1.7)
        assert list(facts["schemes"]) == [f"W8A8 or W4A8{' g32' if group else ''}"]
    assert sqnr(before, outputs[0]) > 28 and 10 < sqnr(before, outputs[4]) < 25
    assert unchanged(model, start) and same(out(specimen, model), before)


def test_blocks_share_graphs_whatever_they_store():
    torch._dynamo.reset()
    specimen, model = ZOO["pixart_sigma"], ZOO["pixart_sigma"].build()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    for block in model.transformer_blocks:
        block.compile(backend=backend, fullgraph=True)
    how = {"rotate": True, "low_rank": 4}
    sections = [Quantize(**how), Quantize(weights="int4", group=32, steps=(0.5, 1.0), **how)]
    with accelerate(model, Plan(quantization=sections)) as accel:
        accel.clock.start(4)
        first = out(specimen, model)
        assert len(graphs) == 2  # the first block gets its tokens with other strides
        accel.clock.start(4, 3)
        late = out(specimen, model)
        assert len(graphs) == 4 and not same(first, late)
        with torch.compiler.set_stance("fail_on_recompile"):
            accel.clock.start(4)
            assert same(out(specimen, model), first)
    torch._dynamo.reset()


def test_a_baked_layer_of_two_widths_saves_the_wider(tmp_path):
    specimen, model = pixart()
    sections = [Quantize(), Quantize(weights="int4", group=32, steps=(0.5, 1.0))]
    accel = accelerate(model, Plan(quantization=sections))
    accel.clock.start(4)
    wide = out(specimen, model)
    accel.bake()
    model.save_pretrained(tmp_path)
    loaded = PixArtTransformer2DModel.from_pretrained(tmp_path)
    assert alike(out(specimen, loaded), wide)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"weights": "fp8"}, "activations='fp8'"),
        ({"weights": "int8", "activations": "fp8"}, "activations='int8'"),
        ({"group": 64}, "one scale per output channel"),
        ({"weights": "int4", "group": 48}, "32, 64, 128"),
        ({"balance": 1.5}, "balance"),
        ({"low_rank": 2.5}, "whole number"),
        ({"rotate": "yes"}, "True or False"),
        ({"first": "both"}, "first"),
    ],
)
def test_bad_settings_are_refused(settings, match):
    with pytest.raises(PlanError, match=match):
        Quantize(**settings)


# --- values that hurt -------------------------------------------------------------------------------------------------


def lonely(layer):
    """A model of one linear."""
    root = nn.Module()
    root.blocks = nn.ModuleList([nn.ModuleDict({"to_q": layer})])
    root.forward = lambda hidden_states, timestep=None: layer(hidden_states)
    return root


@pytest.mark.parametrize("name", SCHEMES)
def test_awkward_weights_and_activations(name):
    settings, least, *_ = SCHEMES[name]
    torch.manual_seed(0)
    for columns in (64, 67):
        layer = nn.Linear(columns, 48)
        with torch.no_grad():
            layer.weight[3] = 0  # a channel of zeros
            layer.weight[4] = 0.25  # a constant one
            layer.weight[:, 5] = 0  # an input that counts for nothing
        model = lonely(layer)
        x = torch.randn(2, 9, columns)
        x[0, 1] = 0
        before = layer(x).detach()
        with torch.no_grad(), accelerate(model, plan(sites="*", **settings)):
            assert isinstance(layer, QuantizedLinear)
            after = layer(x)
            assert sqnr([before], [after]) > least - 3
            assert torch.allclose(after[..., 3], layer.bias[3], atol=2e-2)
            assert layer(x[:0]).shape == (0, 9, 48)
            x[1, 2, 7], x[1, 3, 8] = float("nan"), float("inf")
            after = layer(x)
            assert not after[1, 2].isfinite().any() and not after[1, 3].isfinite().any()
            after[1, 2:4] = 0
            assert after.isfinite().all()  # the other tokens do not notice


def test_fp16_activations_near_their_largest():
    torch.manual_seed(0)
    layer = nn.Linear(64, 32, bias=False).half()
    layer.weight.data *= 1e-3
    model, x = lonely(layer), torch.randn(4, 64, dtype=torch.half).clamp(-1, 1) * 60000
    before = x.float() @ layer.weight.float().t()
    for settings, least, *_ in SCHEMES.values():
        with torch.no_grad(), accelerate(model, plan(sites="*", **settings)):
            assert sqnr([before], [layer(x).float()]) > least - 3


# --- convolutions -----------------------------------------------------------------------------------------------------

CONVS = Quantize(sites="conv skip")


@pytest.mark.parametrize("activations", ["int8", "float"])
def test_convolutions(activations, tmp_path):
    specimen, model = ZOO["unet_sd15"], ZOO["unet_sd15"].build()
    start, before = snapshot(model), out(specimen, model)
    section = replace(CONVS, activations=activations, rotate=True)  # which is for linears: left out
    accel = accelerate(model, Plan(quantization=section))
    facts = accel.report().techniques[0].facts
    assert facts["schemes"] == {"W8A8" if activations == "int8" else "W8A16": len(quantized(model))}
    assert facts["bytes_after"] < 0.3 * facts["bytes_before"]
    assert 22 < sqnr(before, out(specimen, model)) < 60
    layer = quantized(model)[0]
    assert layer.weight.shape == (layer.out_channels, layer.in_channels, *layer.kernel_size)
    accel.remove()
    assert unchanged(model, start) and same(out(specimen, model), before)
    model.save_pretrained(tmp_path / "float")
    config = DiffAccelConfig(sites=section.sites, activations=activations)
    at_load = UNet2DConditionModel.from_pretrained(tmp_path / "float", quantization_config=config)
    accel = accelerate(model, Plan(quantization=section))
    expected = out(specimen, model)
    accel.bake()
    model.save_pretrained(tmp_path / "small")
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "small")
    for other in (at_load, loaded):
        assert len(quantized(other)) == len(quantized(model)) and alike(out(specimen, other), expected)


def test_what_comes_through_skips_is_rounded_apart(tmp_path):
    """Where it is much larger than the rest, one scale for both would be left with a few codes for the rest."""
    specimen, model = ZOO["unet_sd15"], ZOO["unet_sd15"].build()
    boundaries = skip_boundaries(model)
    concatenated = []
    real = torch.cat

    def cat(tensors, dim=0):
        if dim == 1 and tensors[0].ndim == 4:
            concatenated.append(tensors[0].shape[1])
        return real(tensors, dim=dim)

    with mock.patch.object(torch, "cat", cat):
        out(specimen, model)
    shortcuts = {n: c for n, c in boundaries.items() if n.endswith("conv_shortcut")}
    assert list(shortcuts.values()) == concatenated and len(boundaries) == 2 * len(concatenated)  # and conv1
    name = next(iter(shortcuts))
    layer, section = model.get_submodule(name), replace(CONVS, split=True)
    x = torch.randn(2, layer.in_channels, 8, 8)
    x[:, boundaries[name] :] *= 200
    layer.weight.data[:, boundaries[name] :] /= 200
    exact = layer(x).detach()
    start, losses = snapshot(model), {}
    for split in (False, True):
        with torch.no_grad(), accelerate(model, Plan(quantization=replace(section, split=split))) as accel:
            losses[split] = sqnr([exact], [layer(x)])
            schemes = accel.report().techniques[0].facts["schemes"]
            assert schemes.get("W8A8 split", 0) == split * len(boundaries)
    assert losses[True] > 30 > losses[False] + 10 and unchanged(model, start)
    accelerate(model, Plan(quantization=section)).bake()
    expected = out(specimen, model)
    model.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert alike(out(specimen, loaded), expected) and loaded.get_submodule(name).weight.shape == layer.weight.shape


def test_convolutions_by_step_and_in_other_widths():
    specimen, model = ZOO["unet_sd15"], ZOO["unet_sd15"].build()
    before = out(specimen, model)
    with accelerate(model, Plan(quantization=replace(CONVS, steps=(0.5, 1.0)))) as accel:
        accel.clock.start(3)
        assert same(out(specimen, model), before)
        accel.clock.start(3, 2)
        assert not same(out(specimen, model), before)
    with pytest.raises(PlanError, match="int8 only"):
        accelerate(model, Plan(quantization=replace(CONVS, weights="int4")))
    assert same(out(specimen, model), before)

"""Inspection: what is counted is what torch itself counts, and nothing is left behind."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo import ZOO
from zoo_pipelines import PIPELINES

import diffaccel
from diffaccel import Plan, Quantize
from diffaccel.errors import InputError, ModelError
from diffaccel.inspection import capture_inputs, draw, inspect_model, predict_memory, predict_pipeline_memory
from diffaccel.inspection.weights import module_bytes

SOME = ["flux", "wan", "unet_sd15", "pixart_sigma", "sd3", "cogvideox", "dit"]


def _state(model):
    return [
        (name, sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    ]


@pytest.mark.parametrize("name", SOME)
def test_shares_of_a_denoiser(name):
    model, inputs = ZOO[name].build(), ZOO[name].inputs()
    before, weights = _state(model), {k: v.clone() for k, v in model.state_dict().items()}
    inspection = inspect_model(model, inputs)
    (denoiser,) = inspection.denoisers
    assert sum(s.parameters for s in denoiser.roles) == sum(p.numel() for p in model.parameters())
    flops = {s.name: s.flops for s in denoiser.roles}
    # Torch has no formula for the CPU's fused attention, but for the products that it is made of.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(**inputs)
    assert sum(flops.values()) == counter.get_total_flops()
    assert flops["attention"] == counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)
    assert all(s.seconds > 0 for s in denoiser.roles if s.flops)
    assert denoiser.calls == 1
    assert _state(model) == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    json.dumps(inspection.to_dict())


def test_attention_calls_have_shapes_and_layouts():
    specimen = ZOO["flux"]
    grid = specimen.grid()
    model = specimen.build()
    (denoiser,) = inspect_model(model, specimen.inputs()).denoisers
    (calls,) = denoiser.attention
    assert calls.calls == sum(len(names) for names in denoiser.blocks.values())
    config = model.config
    shape = (1, config.num_attention_heads, config.attention_head_dim)
    assert (calls.batch, calls.heads, calls.width) == shape
    assert calls.queries == calls.keys == 12 + grid.height * grid.width
    assert f"{grid.height} x {grid.width}" in calls.layout
    assert "12 before" in calls.layout
    products = 4 * calls.calls * calls.heads * calls.queries * calls.keys * calls.width
    assert next(s for s in denoiser.roles if s.name == "attention").flops == products


@pytest.fixture(scope="module")
def pipeline_inspection():
    pipe = PIPELINES["pixart_sigma"].build()
    before = [_state(c) for c in pipe.components.values() if isinstance(c, nn.Module)]
    request = {k: v for k, v in PIPELINES["pixart_sigma"].request.items() if k != "output_type"}
    inspection = inspect_model(SimpleNamespace(pipe=pipe, defaults=request), {"prompt": "a red circle"})
    assert [_state(c) for c in pipe.components.values() if isinstance(c, nn.Module)] == before
    return inspection


def test_a_pipeline_is_split_into_components_and_phases(pipeline_inspection):
    shares = {s.name: s for s in pipeline_inspection.components}
    assert set(shares) == {"text_encoder", "transformer", "vae"}
    assert all(s.flops > 0 and s.seconds > 0 and s.parameters > 0 for s in shares.values())
    (denoiser,) = pipeline_inspection.denoisers
    assert denoiser.calls == 2
    assert shares["transformer"].flops == sum(s.flops for s in denoiser.roles)
    assert list(pipeline_inspection.phases) == ["text encoding", "denoising", "decoding"]
    assert pipeline_inspection.phases["denoising"] >= 0.9 * shares["transformer"].seconds
    assert {a.role for a in denoiser.attention} == {"attn", "cross"}


def test_renders(pipeline_inspection, tmp_path):
    import numpy as np
    from PIL import Image

    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(pipeline_inspection)
    text = console.export_text()
    for word in ("transformer", "vae", "ff.in", "attention calls", "denoising", "BasicTransformerBlock"):
        assert word in text
    pixels = np.asarray(Image.open(draw(pipeline_inspection, tmp_path / "bars.png")).convert("RGB"))
    assert pixels.std() > 5


def test_without_a_possible_run_structure_is_given_and_said_so():
    model = ZOO["flux"].build()
    inspection = inspect_model(model)
    assert inspection.run is None
    assert "needs the arguments" in inspection.notes[0]
    assert sum(s.parameters for s in inspection.denoisers[0].roles) == sum(p.numel() for p in model.parameters())
    assert not any(s.flops or s.seconds for s in inspection.denoisers[0].roles)
    with pytest.raises(InputError, match="cannot be run with these arguments"):
        inspect_model(model, {"hidden_states": torch.zeros(1, 2, 3)})
    with pytest.raises(ModelError):
        inspect_model(object())


def test_bytes_count_shared_storage_once():
    layer = nn.Linear(8, 8, bias=False)
    tied = nn.Sequential(layer, nn.Linear(8, 8, bias=False))
    tied[1].weight = layer.weight
    assert module_bytes(tied) == 8 * 8 * 4
    assert module_bytes(layer.to(torch.bfloat16)) == 8 * 8 * 2


# --- memory ---


class _Chain(nn.Module):
    """Memory worked out by hand: each linear's input and output live together, nothing else does."""

    def __init__(self, widths):
        super().__init__()
        pairs = itertools.pairwise(widths)
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairs)

    def forward(self, hidden_states):
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


def test_bytes_of_int8_weights_in_whatever_form_runs_here():
    layers = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 32))
    model = ZOO["pixart_sigma"].build()
    full = module_bytes(model)
    with diffaccel.accelerate(model, Plan(quantization=[Quantize()])) as accel:
        facts = accel.report().techniques[0].facts
        assert module_bytes(model) == full - facts["bytes_before"] + facts["bytes_after"]
    assert module_bytes(layers) == 4 * (64 * 64 + 64 * 32 + 32)


def test_predicted_memory_of_a_chain_is_exact():
    widths = (4, 64, 256, 16)
    rows = 1000
    predicted = predict_memory(_Chain(widths), {"hidden_states": torch.zeros(rows, 4)})
    weights = 4 * sum(a * b for a, b in itertools.pairwise(widths))
    assert predicted.weights_bytes == weights
    # The caller keeps the input; the widest moment is the third layer's.
    assert predicted.peak_bytes == weights + 4 * rows * (4 + 256 + 64)
    assert predicted.syncs == {}
    assert predicted.output == (f"[{rows}, 16] torch.float32 cuda:0",)
    half = predict_memory(lambda: _Chain(widths), {"hidden_states": torch.zeros(rows, 4)}, dtype=torch.bfloat16)
    assert half.peak_bytes == predicted.peak_bytes // 2


def test_attention_counts_as_a_fused_kernel():
    specimen = ZOO["flux"]
    model = specimen.build()
    plain = predict_memory(model, specimen.inputs())
    assert next(model.parameters()).device.type == "cpu"
    inputs = specimen.inputs()
    tokens = 4096
    inputs["hidden_states"] = torch.zeros(1, tokens, inputs["hidden_states"].shape[-1])
    inputs["img_ids"] = torch.zeros(tokens, 3)
    large = predict_memory(model, inputs)
    assert large.weights_bytes == plain.weights_bytes
    assert plain.activation_bytes < large.activation_bytes < 4 * tokens**2  # below one head's scores in float32


def test_captured_inputs_are_those_of_the_first_call():
    entry = PIPELINES["pixart_sigma"]
    pipe = entry.build()
    calls = []
    handle = pipe.transformer.register_forward_pre_hook(lambda m, a, k: calls.append((a, k)), with_kwargs=True)
    captured = capture_inputs(pipe, entry.arguments(steps=3))
    handle.remove()
    assert len(calls) == 1
    assert captured["transformer"].keys() >= {"hidden_states", "encoder_hidden_states", "timestep"}
    assert predict_memory(pipe.transformer, captured["transformer"]).syncs == {}
    assert not pipe.transformer._forward_pre_hooks


def test_memory_of_a_pipeline_at_the_sizes_of_a_call():
    entry = PIPELINES["pixart_sigma"]
    pipe = entry.build()
    request = {k: v for k, v in entry.request.items() if k not in ("output_type", "height", "width")}
    loaded = SimpleNamespace(pipe=pipe, defaults=request)
    small, large = (predict_pipeline_memory(loaded, {"height": s, "width": s})["transformer"] for s in (32, 128))
    assert small.weights_bytes == large.weights_bytes == module_bytes(pipe.transformer)
    assert large.activation_bytes > 4 * small.activation_bytes
    assert "_progress_bar_config" in pipe.__dict__
    quantized = predict_pipeline_memory(loaded, {"height": 32, "width": 32}, Plan(quantization=[Quantize()]))
    assert quantized["transformer"].weights_bytes < small.weights_bytes

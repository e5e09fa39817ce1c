"""Text encoders: addressed by name, quantized like denoisers, saved and loaded by transformers' own from_pretrained."""

import json
import subprocess
import sys
from collections import Counter

import pytest
import torch
import zoo_parts as parts
from diffusers import PipelineQuantizationConfig
from test_quantization import alike, quantized, same, snapshot, sqnr, unchanged
from transformers import BertConfig, BertModel, UMT5Config, UMT5EncoderModel
from zoo_pipelines import PIPELINES

import diffaccel
from diffaccel import DiffAccelConfig, ModelError, Plan, PlanError, Quantize, accelerate, calibrate, quantize
from diffaccel.denoiser import Denoiser, find_encoders

pytestmark = pytest.mark.filterwarnings("ignore:diffaccel", "ignore:__array__")


def umt5():
    return parts.seeded(UMT5EncoderModel, UMT5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2))


ENCODERS = {"t5": parts.t5, "umt5": umt5, "clip": parts.clip, "clip with projection": lambda: parts.clip(32, 24)}
every_encoder = pytest.mark.parametrize("name", ENCODERS)
IDS = torch.randint(4, 60, (2, 7), generator=torch.Generator().manual_seed(0))


def hidden(model):
    with torch.no_grad():
        return [t for t in model(IDS).to_tuple() if torch.is_tensor(t)]


@every_encoder
def test_roles_by_structure(name):
    network = Denoiser.of(ENCODERS[name](), "text_encoder")
    roles = Counter(site.role for site in network.layers)
    embed = {"embed": 1} if name == "clip with projection" else {}
    blocks = dict.fromkeys(("attn.q", "attn.k", "attn.v", "attn.out", "ff.in", "ff.out"), 2)
    assert roles == blocks | embed | ({"ff.in": 4} if name == "umt5" else {})


def test_roles_of_bert():
    config = BertConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    roles = [site.role for site in Denoiser.of(parts.seeded(BertModel, config), "text_encoder").layers]
    assert roles.count("attn.out") == 2 and "other" not in roles


@every_encoder
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_quantized_while_loading_and_loaded_again(name, dtype, tmp_path):
    model = ENCODERS[name]()
    cls, before = type(model), hidden(model)
    model.save_pretrained(tmp_path / "float")
    config = DiffAccelConfig(weights="int4", group=32, activations="float", rotate=True)
    small = cls.from_pretrained(tmp_path / "float", quantization_config=config, dtype=dtype)
    assert len(quantized(small)) == len(Denoiser.of(model, "x").layers) - (name == "clip with projection")
    assert 10 < sqnr(before, hidden(small)) < 60
    small.save_pretrained(tmp_path / "small", max_shard_size="10KB")
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 1
    loaded = cls.from_pretrained(tmp_path / "small")
    assert loaded.dtype == dtype and same(hidden(small), hidden(loaded))
    assert [layer.weight_dtype for layer in quantized(loaded)] == [layer.weight_dtype for layer in quantized(small)]
    if "t5" in name and dtype == torch.float16:  # which overflows there, so that T5 keeps this layer in float32
        assert {layer.weight_dtype for n, layer in loaded.named_modules() if n.endswith(".wo")} == {torch.float32}
    assert not quantized(loaded.dequantize()) and alike(hidden(loaded), hidden(small)) == (dtype == torch.float32)


def test_a_partial_or_foreign_save_is_refused(tmp_path):
    parts.t5().save_pretrained(tmp_path / "float")
    cls = type(parts.t5())
    cls.from_pretrained(tmp_path / "float", quantization_config=DiffAccelConfig()).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    text = file.read_text()
    for old, new, match in (
        ('"SelfAttention.q', '"SelfAttention.qq', "no such layer"),
        ('"kind": "int8"', '"kind": "int9"', "int9"),
    ):
        file.write_text(text.replace(old.replace('"Self', "Self"), new.replace('"Self', "Self")))
        with pytest.raises(ModelError, match=match):
            cls.from_pretrained(tmp_path)
    body = json.loads(text)
    body["quantization_config"]["saved"][0]["tensors"]["before"] = "float16"
    file.write_text(json.dumps(body))
    with pytest.raises(ModelError, match="only a part"):
        cls.from_pretrained(tmp_path)


# --- in a pipeline ----------------------------------------------------------------------------------------------------

ENCODERS_OF_SD3 = "text_encoder*:attn.* text_encoder*:ff.*"


def pipeline(name="sd3"):
    return PIPELINES[name], PIPELINES[name].build()


def test_meant_only_where_named():
    _, pipe = pipeline()
    assert [e.component for e in find_encoders(pipe)] == ["text_encoder", "text_encoder_2", "text_encoder_3"]
    for sites in ("*", "attn.*", "!transformer:ff.*"):
        with accelerate(pipe, Plan(quantization=Quantize(sites=sites))):
            assert quantized(pipe.transformer) and not any(quantized(e.module) for e in find_encoders(pipe))
    with quantize(pipe, sites="text_encoder_2:attn.* text_encoder_3.encoder.block.0.*"):
        assert not quantized(pipe.transformer) and not quantized(pipe.text_encoder)
        assert len(quantized(pipe.text_encoder_2)) == 8 and len(quantized(pipe.text_encoder_3)) == 6
    with pytest.raises(PlanError, match=r"attn\.q"):
        quantize(pipe, sites="text_encoder:cross.*")
    with pytest.raises(PlanError, match="before the first step"):
        quantize(pipe, sites=ENCODERS_OF_SD3, steps=(0.0, 0.5))


def test_undone_to_the_bit_and_beside_the_denoiser():
    specimen, pipe = pipeline()
    modules = [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3]
    before = specimen.call(pipe, steps=2)  # which leaves attributes of transformers behind
    start = [snapshot(m) for m in modules]
    with quantize(pipe, Quantize(), Quantize(sites=ENCODERS_OF_SD3, weights="int4", group=32)) as accel:
        schemes = accel.report().techniques[0].facts["schemes"]
        assert schemes["W4A8 g32"] == sum(len(quantized(m)) for m in modules[1:])
        after = specimen.call(pipe, steps=2)
        assert torch.isfinite(after).all() and not torch.equal(after, before)
    assert all(unchanged(m, s) for m, s in zip(modules, start, strict=True))
    assert torch.equal(specimen.call(pipe, steps=2), before)


def test_baked_saved_and_loaded_with_the_pipeline(tmp_path):
    specimen, pipe = pipeline()
    quantize(pipe, Quantize(), Quantize(sites=ENCODERS_OF_SD3), bake=True)
    expected = specimen.call(pipe, steps=2)
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert all(quantized(e.module) for e in find_encoders(loaded)) and quantized(loaded.transformer)
    assert alike([specimen.call(loaded, steps=2)], [expected])


def test_by_the_pipelines_quantization_config(tmp_path):
    specimen, pipe = pipeline("flux")
    pipe.save_pretrained(tmp_path / "float")
    names = ("text_encoder", "text_encoder_2", "transformer")
    by_mapping = PipelineQuantizationConfig(quant_mapping={name: DiffAccelConfig() for name in names})
    by_backend = PipelineQuantizationConfig(
        quant_backend="diffaccel", quant_kwargs={"weights": "int8"}, components_to_quantize=list(names)
    )
    outputs = []
    for config in (by_mapping, by_backend):
        loaded = type(pipe).from_pretrained(tmp_path / "float", quantization_config=config)
        loaded.set_progress_bar_config(disable=True)
        assert all(quantized(getattr(loaded, name)) for name in names)
        outputs.append(specimen.call(loaded, steps=2))
    with quantize(pipe, Quantize(), Quantize(sites=ENCODERS_OF_SD3)):
        assert alike([specimen.call(pipe, steps=2)], outputs[:1]) and alike(outputs[:1], outputs[1:])


def test_calibrated():
    specimen = PIPELINES["pixart_sigma"]
    pipe = specimen.build()
    call = {k: v for k, v in specimen.arguments(steps=2).items() if k not in ("prompt", "generator")}
    section = Quantize(sites="text_encoder:attn.*", weights="int4", balance=0.5)
    plan = calibrate(pipe, section, prompts=["a", "red circle"], **call)
    assert plan.artefacts and all("text_encoder." in name for name in plan.artefacts)
    with accelerate(pipe, plan) as accel:
        assert accel.report().techniques[0].facts["schemes"] == {
            "W4A8 + balance 0.5": len(quantized(pipe.text_encoder))
        }
        assert any("before" in layer.stored() for layer in quantized(pipe.text_encoder))


@pytest.mark.parametrize("bundled", ["bundled:image", "bundled:video"])
def test_bundled(bundled):
    pipe = diffaccel.pipelines.load(bundled, device="cpu").pipe
    ids = torch.randint(4, 20, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = pipe.text_encoder(ids)[0]
        with quantize(pipe, sites="text_encoder:attn.* text_encoder:ff.*") as accel:
            assert accel.report().techniques[0].sites >= 18
            assert 25 < sqnr([before], [pipe.text_encoder(ids)[0]]) < 60
        assert torch.equal(before, pipe.text_encoder(ids)[0])


def test_registered_although_transformers_comes_later(tmp_path):
    model = parts.t5()
    model.save_pretrained(tmp_path / "float")
    config = DiffAccelConfig()
    type(model).from_pretrained(tmp_path / "float", quantization_config=config).save_pretrained(tmp_path / "small")
    code = f"""import diffaccel
from transformers import T5EncoderModel
model = T5EncoderModel.from_pretrained({str(tmp_path / "small")!r})
assert type(model.encoder.block[0].layer[0].SelfAttention.q).__name__ == "QuantizedLinear"
assert type(model.config.quantization_config).__name__ == "DiffAccelConfig"
from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "diffaccel" in AUTO_QUANTIZER_MAPPING"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

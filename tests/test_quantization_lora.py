"""LoRA: fused before, or loaded before or after by diffusers' own functions; it runs beside the quantized weight."""

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from test_quantization import alike, quantized, sqnr
from zoo_pipelines import PIPELINES

from diffaccel import Plan, PlanError, Quantize, accelerate, quantize

pytestmark = pytest.mark.filterwarnings("ignore:diffaccel", "ignore:.*steps_offset", "ignore:__array__")

DENOISERS = {"sd15": "unet", "flux": "transformer", "wan": "transformer"}
both_transformers = pytest.mark.parametrize("name", ["flux", "wan"])


def pipeline(name, folder, adapters=("a",)):
    """A pipeline, its denoiser's name, and the adapters in ``folder``, each with files of its own."""
    specimen, component = PIPELINES[name], DENOISERS[name]
    for seed, adapter in enumerate(adapters):
        twin = specimen.build()
        denoiser = getattr(twin, component)
        torch.manual_seed(seed)
        targets = ["to_q", "to_v", "to_out.0", "net.0.proj"]
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
        denoiser.add_adapter(config)
        layers = {f"{component}_lora_layers": get_peft_model_state_dict(denoiser)}
        type(twin).save_lora_weights(folder / adapter, **layers)
    return specimen, specimen.build(), component


def call(specimen, pipe):
    return specimen.call(pipe, steps=2)


@both_transformers
def test_loaded_after(name, tmp_path):
    specimen, pipe, component = pipeline(name, tmp_path, ("a", "b"))
    denoiser, plain = getattr(pipe, component), call(specimen, pipe)
    types, parameters = [type(m) for m in denoiser.modules()], dict(denoiser.named_parameters())
    twin = specimen.build()
    wanted = {}
    for adapter in ("a", "b"):
        twin.load_lora_weights(tmp_path / adapter, adapter_name=adapter)
        twin.set_adapters([adapter])
        wanted[adapter] = call(specimen, twin)
    accel = quantize(pipe, weights="int4", group=32, low_rank=8, activations="float")
    small = call(specimen, pipe)
    for adapter in ("a", "b"):
        pipe.load_lora_weights(tmp_path / adapter, adapter_name=adapter)
        pipe.set_adapters([adapter])
        assert sqnr([wanted[adapter]], [call(specimen, pipe)]) > sqnr([wanted[adapter]], [small]) + 6
    pipe.set_adapters(["a", "b"], [1.0, 0.0])
    assert sqnr([wanted["a"]], [call(specimen, pipe)]) > sqnr([wanted["a"]], [small]) + 6
    pipe.disable_lora()
    assert torch.equal(call(specimen, pipe), small)
    pipe.enable_lora()
    with pytest.raises(PlanError, match="fuse, then accelerate"):
        pipe.fuse_lora()
    pipe.delete_adapters("b")
    pipe.unload_lora_weights()
    assert torch.equal(call(specimen, pipe), small)
    accel.remove()
    assert torch.equal(call(specimen, pipe), plain) and [type(m) for m in denoiser.modules()] == types
    assert all(p is parameters[n] for n, p in denoiser.named_parameters())


@both_transformers
def test_loaded_before_and_removed_in_between(name, tmp_path):
    specimen, pipe, component = pipeline(name, tmp_path)
    plain = call(specimen, pipe)
    pipe.load_lora_weights(tmp_path / "a")
    wanted = call(specimen, pipe)
    with quantize(pipe):
        assert sqnr([wanted], [call(specimen, pipe)]) > 25
        assert len(quantized(getattr(pipe, component))) > 8
        pipe.unload_lora_weights()
        assert sqnr([plain], [call(specimen, pipe)]) > 25
    assert torch.equal(call(specimen, pipe), plain)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_fused_before(name, tmp_path):
    specimen, pipe, _ = pipeline(name, tmp_path)
    plain = call(specimen, pipe)
    pipe.load_lora_weights(tmp_path / "a")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    wanted = call(specimen, pipe)
    assert sqnr([wanted], [plain]) < 25
    with quantize(pipe):
        assert sqnr([wanted], [call(specimen, pipe)]) > 25
    assert torch.equal(call(specimen, pipe), wanted)


def test_fused_and_still_loaded_is_refused(tmp_path):
    specimen, pipe, _ = pipeline("sd15", tmp_path)
    plain = call(specimen, pipe)
    pipe.load_lora_weights(tmp_path / "a")
    pipe.fuse_lora()
    with pytest.raises(PlanError, match="which keeps what is fused"):
        quantize(pipe)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert alike([call(specimen, pipe)], [plain])


@both_transformers
def test_on_a_model_that_was_loaded_quantized(name, tmp_path):
    specimen, pipe, component = pipeline(name, tmp_path)
    with quantize(pipe):
        pipe.load_lora_weights(tmp_path / "a")
        expected = call(specimen, pipe)
        pipe.unload_lora_weights()
    quantize(pipe, bake=True)
    pipe.save_pretrained(tmp_path / "small")
    loaded = type(pipe).from_pretrained(tmp_path / "small")
    loaded.set_progress_bar_config(disable=True)
    small = call(specimen, loaded)
    loaded.load_lora_weights(tmp_path / "a")
    assert alike([call(specimen, loaded)], [expected])
    assert not any(key.endswith("attn1.to_q.weight") for key in loaded.components[component].state_dict())
    loaded.unload_lora_weights()
    assert torch.equal(call(specimen, loaded), small)


def test_with_bits_that_change_over_the_steps_and_half_precision(tmp_path):
    specimen, pipe, component = pipeline("wan", tmp_path)
    pipe.load_lora_weights(tmp_path / "a")
    wanted = call(specimen, pipe)
    pipe.unload_lora_weights()
    pipe.to(torch.bfloat16)
    sections = [Quantize(), Quantize(weights="int4", group=32, steps=(0.5, 1.0))]
    with accelerate(pipe, Plan(quantization=sections)):
        without = call(specimen, pipe)
        pipe.load_lora_weights(tmp_path / "a")
        lora = [p for n, p in getattr(pipe, component).named_parameters() if "lora_" in n]
        assert lora and {p.dtype for p in lora} == {torch.bfloat16}
        assert sqnr([wanted], [call(specimen, pipe)]) > max(12, sqnr([wanted], [without]) + 4)

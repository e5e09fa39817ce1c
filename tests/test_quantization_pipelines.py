"""Image to image, ControlNet and IP-Adapter around a quantized denoiser, put on before and after."""

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from test_quantization import quantized, snapshot, sqnr, unchanged
from zoo_base import initialise
from zoo_pipelines import PIPELINES

from diffaccel import Plan, Quantize, accelerate, quantize

pytestmark = pytest.mark.filterwarnings("ignore:diffaccel", "ignore:.*steps_offset", "ignore:__array__")

LEAST = 25.0  # dB, of the pictures


def denoiser_of(pipe):
    return getattr(pipe, "unet", None) or pipe.transformer


@pytest.mark.parametrize("name", ["sd15_img2img", "flux_img2img"])
def test_image_to_image(name):
    specimen = PIPELINES[name]
    pipe = specimen.build()
    denoiser = denoiser_of(pipe)
    call = lambda: specimen.call(pipe, steps=6, strength=0.5)  # noqa: E731
    before = call()  # which leaves a registry of diffusers' hooks behind
    start = snapshot(denoiser)
    with quantize(pipe):
        w8a8 = call()
        assert LEAST < sqnr([before], [w8a8]) < 100
    assert unchanged(denoiser, start) and torch.equal(call(), before)
    early = Quantize(weights="int4", steps=(0.0, 0.5))  # which the strength leaves out
    with accelerate(pipe, Plan(quantization=[Quantize(), early])):
        assert torch.equal(call(), w8a8)


# --- ControlNet -------------------------------------------------------------------------------------------------------


def controlled(name):
    """A pipeline with a ControlNet that matters, and how it is called."""
    base = PIPELINES[name].build()
    parts = {n: c for n, c in base.components.items() if c is not None or name == "sd15"}
    if name == "sd15":
        net = diffusers.ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(8, 16))
        pipe = diffusers.StableDiffusionControlNetPipeline(**parts, controlnet=net, requires_safety_checker=False)
        more = {"image": torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
    else:
        config = {**base.transformer.config, "num_layers": 1, "num_single_layers": 1}
        net = diffusers.FluxControlNetModel.from_config(config)
        pipe = diffusers.FluxControlNetPipeline(**parts, controlnet=net)
        more = {"control_image": torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
    initialise(net, 0)  # its last layers begin as zeros
    pipe.set_progress_bar_config(disable=True)
    return pipe, lambda **changes: PIPELINES[name].call(pipe, steps=2, **more, **changes)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_controlnet(name):
    pipe, call = controlled(name)
    denoiser, before = denoiser_of(pipe), call()
    start, control = snapshot(denoiser), snapshot(pipe.controlnet)
    assert sqnr([before], [call(controlnet_conditioning_scale=0.0)]) < LEAST
    with quantize(pipe) as accel:
        assert (
            quantized(denoiser)
            and not quantized(pipe.controlnet)
            and list(accel.report().denoisers) == ["unet" if name == "sd15" else "transformer"]
        )
        assert LEAST < sqnr([before], [call()]) < 100
        with quantize(pipe.controlnet):  # a network by itself
            assert quantized(pipe.controlnet) and LEAST - 3 < sqnr([before], [call()]) < 100
    assert unchanged(denoiser, start) and unchanged(pipe.controlnet, control) and torch.equal(call(), before)


# --- IP-Adapter -------------------------------------------------------------------------------------------------------

TOKENS, WIDTH = 4, 16


def ip_adapter(unet):
    """The two parts of a file of IP-Adapter, for ``unet``."""
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for index, module in enumerate(m for n, m in unet.named_modules() if n.endswith("attn2")):
        shape = module.to_k.weight.shape
        for part in ("to_k_ip", "to_v_ip"):
            layers[f"{2 * index + 1}.{part}.weight"] = torch.randn(shape, generator=generator) * 0.3
    text = unet.config.cross_attention_dim
    project = {
        "proj.weight": torch.randn(TOKENS * text, WIDTH, generator=generator) * 0.3,
        "proj.bias": torch.zeros(TOKENS * text),
        "norm.weight": torch.ones(text),
        "norm.bias": torch.zeros(text),
    }
    return {"image_proj": project, "ip_adapter": layers}


@pytest.mark.parametrize("when", ["before", "after"])
def test_ip_adapter(when):
    specimen = PIPELINES["sd15"]
    pipe, twin = specimen.build(), specimen.build()
    embeds = torch.randn(2, 1, WIDTH, generator=torch.Generator().manual_seed(2))  # without and with guidance
    adapter = ip_adapter(pipe.unet)
    call = lambda p: specimen.call(p, steps=2, ip_adapter_image_embeds=[embeds])  # noqa: E731
    plain = specimen.call(pipe, steps=2)
    twin.unet._load_ip_adapter_weights([adapter])
    twin.set_ip_adapter_scale(0.8)
    before = call(twin)
    assert sqnr([before], [plain]) < LEAST

    def load():
        pipe.unet._load_ip_adapter_weights([adapter])
        pipe.set_ip_adapter_scale(0.8)

    if when == "before":
        load()
    with quantize(pipe):
        if when == "after":
            load()
        assert LEAST < sqnr([before], [call(pipe)]) < 100
        processor = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor
        assert isinstance(processor, IPAdapterAttnProcessor2_0)
        assert bool(quantized(processor)) == (when == "before")
    assert torch.equal(call(pipe), before)
    with quantize(pipe):
        pipe.unload_ip_adapter()
        assert LEAST < sqnr([plain], [specimen.call(pipe, steps=2)]) < 100
    assert torch.equal(specimen.call(pipe, steps=2), plain)

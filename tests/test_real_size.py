"""Released denoisers at full resolution in bfloat16 on a fake GPU: every plan keeps shapes, dtypes and devices, reads
nothing from the device where it must not, and needs the memory that it should."""

import math

import pytest
import torch
from real_size import REAL_SIZE, build_fake, fake_inputs
from torch import nn

from diffaccel import BlockSparse, Plan, Quantize, StepCache
from diffaccel.denoiser import find_denoisers
from diffaccel.inspection import predict_memory
from diffaccel.presets import PRESETS

PLANS = {
    **{name: name for name in PRESETS},
    "quantization": Plan(quantization=[Quantize()]),
    "attention": Plan(attention=[BlockSparse(density=0.25, steps=(0.0, 1.0))]),
    "caching": Plan(caching=StepCache(threshold=0.3)),
    "together": Plan(
        quantization=[Quantize()],
        attention=[BlockSparse(density=0.25, steps=(0.0, 1.0))],
        caching=StepCache(threshold=0.3),
    ),
}
STEPS = 3
"""For plans with a cache, which can skip the third; the others do the same at every step."""
# Parameters of the released checkpoints in billions, from their model cards or their papers.
BILLIONS = {
    "flux_dev": 11.9,
    "sd35_large": 8.1,
    "sdxl": 2.57,
    "qwen_image": 20.4,
    "wan21_14b": 14.3,
    "hunyuan_video": 12.8,
    "cogvideox_5b": 5.6,
}


def _shallow(model: nn.Module) -> nn.Module:
    """One block of each list of repeated blocks, two where they differ: a plan does to each block alike."""
    parents = dict.fromkeys(name.rpartition(".")[0] for name, _ in find_denoisers(model)[0].blocks)
    for parent in parents:
        blocks = model.get_submodule(parent)
        shapes = [[p.shape for p in block.parameters()] for block in blocks]
        kept = [blocks[0]] if shapes[0] == shapes[-1] else [blocks[0], blocks[-1]]
        above, _, name = parent.rpartition(".")
        setattr(model.get_submodule(above), name, nn.ModuleList(kept))
    return model


@pytest.mark.parametrize("name", REAL_SIZE)
def test_memory_at_full_depth(name):
    model = build_fake(name)
    inputs = fake_inputs(name)
    plain = predict_memory(model, inputs)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters / 1e9 == pytest.approx(BILLIONS[name], rel=0.03)
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert plain.weights_bytes == pytest.approx(weights, rel=1e-3)  # some hold tables as plain attributes
    latents = next(iter(inputs.values()))
    assert plain.output == (f"{list(latents.shape)} torch.bfloat16 cuda:0",)
    assert plain.syncs == {}
    tokens = math.prod(REAL_SIZE[name].tokens)
    (denoiser,) = find_denoisers(model)
    queries = [site for site in denoiser.layers if site.role in ("attn.q", "attn.qkv")]
    width = max(site.module.weight.shape[1] for site in queries)
    # At least queries, keys and values beside the residual stream; never as much as one head's matrix of scores.
    assert 4 * 2 * tokens * width < plain.activation_bytes
    if tokens > 50_000:
        assert plain.activation_bytes < 2 * tokens**2


@pytest.mark.parametrize("name", REAL_SIZE)
def test_every_plan_agrees_with_the_plain_forward(name):
    model = _shallow(build_fake(name))
    inputs = fake_inputs(name)
    plain = predict_memory(model, inputs)
    before = _state(model)
    for label, plan in PLANS.items():
        cached = label in ("caching", "together", "balanced", "fast")
        predicted = predict_memory(model, inputs, plan, steps=STEPS if cached else 1)
        assert predicted.output == plain.output, label
        # An adaptive cache knows enough at the third step, and decides on the host: one scalar, at the root.
        assert dict(predicted.syncs) == ({"a scalar was read": 1} if cached else {}), label
        assert predicted.weights_bytes <= plain.weights_bytes, label
        assert predicted.peak_bytes < 1.25 * plain.peak_bytes, label
        assert _state(model) == before, label
        if label == "quantization":
            saved = plain.weights_bytes - predicted.weights_bytes
            assert saved == pytest.approx(_quantized_weights(model), rel=0.02)  # two bytes become one, less the scales
            assert predicted.peak_bytes < plain.peak_bytes


def _quantized_weights(model: nn.Module) -> int:
    roles = ("attn.", "ff.", "fused.", "cross.")
    sites = (site for denoiser in find_denoisers(model) for site in denoiser.layers if site.role.startswith(roles))
    return sum(site.module.weight.numel() for site in sites if isinstance(site.module, nn.Linear))


def _state(model: nn.Module) -> list[tuple]:
    modules = list(model.named_modules())
    tensors = [(n, t.shape, t.dtype, t.device) for n, t in (*model.named_parameters(), *model.named_buffers())]
    return [(n, type(m), sorted(m.__dict__)) for n, m in modules] + tensors


def test_a_scalar_read_inside_the_denoiser_is_seen():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            if timestep.max().item() > 0:
                hidden_states = self.layer(hidden_states)
            return hidden_states + hidden_states.cpu().mean()

    predicted = predict_memory(Reads(), {"hidden_states": torch.zeros(2, 8), "timestep": torch.ones(2)})
    assert predicted.syncs == {"a scalar was read": 1, "a tensor was copied to the host": 1}

"""Released denoisers at full resolution in bfloat16 on a fake GPU: every plan keeps shapes, dtypes and devices, reads
nothing from the device where it must not, and needs the memory that it should."""

import math

import pytest
import torch
from real_size import REAL_SIZE, build_fake, fake_inputs, shallow
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

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
    model = shallow(build_fake(name))
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


class _Shapes(TorchFunctionMode):
    """Runs a forward's linear layers and attention calls a second time, through our kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is F.linear and args[0].shape[-1] % 16 == 0:
            self._check_linear(*args[:2], result)
        elif function is F.scaled_dot_product_attention:
            q, k, v = args if args else (kwargs["query"], kwargs["key"], kwargs["value"])
            self._check_attention(q, k, v, result)
        return result

    def _check_linear(self, x, weight, expected):
        from diffaccel.kernels.fp8_linear import fp8_linear
        from diffaccel.kernels.int8_gemm import int8_gemm
        from diffaccel.kernels.token_quantize import token_quantize

        if (shape := (*x.shape, len(weight))) in self.seen:
            return
        self.seen.add(shape)
        with torch._C.DisableTorchFunction():
            scale = weight.new_empty(len(weight), dtype=torch.float32)
            for eps in (None, 1e-6):
                q, row_scale = token_quantize(x, torch.int8, eps)
            y = int8_gemm(q, weight.to(torch.int8), row_scale, scale, None, x.dtype)
            fp8 = fp8_linear(x, weight.to(torch.float8_e4m3fn), scale)
        assert _kind(y) == _kind(fp8) == _kind(expected), shape

    def _check_attention(self, q, k, v, expected):
        from diffaccel.kernels.permute_tokens import permute_tokens
        from diffaccel.kernels.sparse_attention import sparse_attention

        if (shape := (*q.shape, *k.shape)) in self.seen:
            return
        self.seen.add(shape)
        with torch._C.DisableTorchFunction():
            n, m = (-(-x.shape[2] // 128) for x in (q, k))
            num, indices = (q.new_empty(1, q.shape[1], *size, dtype=torch.int32) for size in ((n,), (n, m)))
            order = q.new_empty(q.shape[1], q.shape[2], dtype=torch.int32)
            y, _ = sparse_attention(permute_tokens(q, order), k, v, num, indices, 128)
        assert _kind(y) == _kind(expected), shape


def _kind(x: torch.Tensor) -> tuple:
    return x.shape, x.dtype, x.device


@pytest.mark.parametrize("name", REAL_SIZE)
def test_every_kernel_takes_the_shapes_without_a_host_sync(name):
    pytest.importorskip("triton")
    model = shallow(build_fake(name))
    shapes = _Shapes()

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, **arguments):
            with shapes:
                return self.model(**arguments)

    assert predict_memory(Watched(), fake_inputs(name)).syncs == {}
    assert len(shapes.seen) >= 5

"""Values that hurt, for every scheme: what docs/quantization.md promises of them."""

import pytest
import torch
from test_quantization import sqnr
from test_schemes import SCHEMES, lonely
from torch import nn

from diffaccel import Plan, PlanError, Quantize, accelerate
from diffaccel.denoiser import Site
from diffaccel.plan import Artefacts
from diffaccel.quantization.channels import ChannelRecorder
from diffaccel.quantization.linear import QuantizedConv2d, QuantizedLinear

pytestmark = pytest.mark.filterwarnings("ignore:diffaccel")

# Sections beside those of test_schemes, and the least SQNR of one linear in dB. "nested" is read as int8 or as int4.
INT4_LATE = {"weights": "int4", "group": 32, "steps": (0.5, 1.0)}
MORE = {
    "WFP8A16": ([{"weights": "fp8", "activations": "float"}], 25),
    "W4A8 g128": ([{"weights": "int4", "group": 128}], 13),
    "static": ([{"activations": "static"}], 25),
    "static, balanced": ([{"activations": "static", "balance": 0.5}], 25),
    "balanced": ([{"weights": "int4", "group": 64, "balance": 0.5}], 13),
    "rotated, then balanced": ([{"balance": 0.5, "rotate": True, "first": "rotate"}], 25),
    "nested at 8 bits": ([{}, INT4_LATE], 25),
    "nested at 4 bits": ([{}, {**INT4_LATE, "steps": (0.0, 0.5)}], 13),
    "the original at first": ([{"steps": (0.5, 1.0)}], 100),
}
ALL = {name: ([settings], least) for name, (settings, least, *_) in SCHEMES.items()} | MORE


def measured(layer, x):
    """What calibration would have seen: the channels, turned or not, and their limits."""
    site = Site("transformer", "blocks.0.to_q", "attn.q", layer)
    recorder = ChannelRecorder([site], {site}, set(), {site})
    layer(x)
    recorder.remove()
    return Artefacts(dict(recorder.artefacts()))


def quantized_as(name, layer, x):
    """An acceleration of ``layer`` under the scheme ``name``."""
    sections = [Quantize(sites="*", float_activations="", **settings) for settings in ALL[name][0]]
    return accelerate(lonely(layer), Plan(quantization=sections, artefacts=measured(layer, x)))


@pytest.mark.parametrize("columns", [64, 67])
@pytest.mark.parametrize("name", ALL)
def test_awkward_values(name, columns):
    torch.manual_seed(0)
    layer = nn.Linear(columns, 48)
    with torch.no_grad():
        layer.weight[3] = 0  # a channel of zeros
        layer.weight[4] = 0.25  # a constant one
        layer.weight[:, 5] = 0  # an input that counts for nothing
    x = torch.randn(2, 9, columns)
    x[0, 1] = 0
    x[:, :, 6] = 0  # an input that never comes
    x[:, :, 7] = 0.5  # one that never changes
    before = layer(x).detach()
    with torch.no_grad(), quantized_as(name, layer, x):
        assert isinstance(layer, QuantizedLinear)
        after = layer(x)
        assert sqnr([before], [after]) > ALL[name][1] - 3
        assert torch.allclose(after[..., 3], layer.bias[3], atol=2e-2)  # no scale of 0 divides anything
        assert torch.allclose(after[0, 1], before[0, 1], atol=0.05 * float(before.abs().max()))
        assert layer(x[:0]).shape == (0, 9, 48) and layer(x[:, :0]).shape == (2, 0, 48)
        assert torch.allclose(layer(x[0, 2]), after[0, 2], atol=1e-5)  # one token without a batch
        for value in (float("nan"), float("inf"), -float("inf")):
            bad = x.clone()
            bad[1, 2, 8] = value
            result = layer(bad)
            others = torch.ones(2, 9, dtype=torch.bool)
            others[1, 2] = False
            assert torch.equal(result[others], after[others]) or torch.allclose(
                result[others], after[others], atol=1e-5
            )
            if "static" not in name:
                assert not result[1, 2].isfinite().any()


@pytest.mark.parametrize("name", [n for n in ALL if "static" not in n])
def test_fp16_overflow_is_infinite_where_the_float_layer_is(name):
    torch.manual_seed(0)
    layer = nn.Linear(64, 32).half()
    x = torch.randn(6, 64).half()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(32, 64) * 0.3)
        layer.weight[0] = 200.0
        x[0], x[1] = 60000, x[1] * 4000  # beyond half precision in most channels, and in channel 0
    exact = x.double() @ layer.weight.double().t() + layer.bias.double()
    with torch.no_grad(), quantized_as(name, layer, x):
        result = layer(x)
    far, near = exact.abs() > 1.5 * 65504, exact.abs() < 0.5 * 65504
    assert far.sum() > 10 and not result[far].isfinite().any()
    ordinary = slice(2, None)
    if name != "low rank":  # whose branch has a 16-bit sum of its own, which leaves the range with its token
        assert result[near].isfinite().all()
    assert result[ordinary].isfinite().sum() >= near[ordinary].sum()
    assert sqnr([exact[ordinary, 1:]], [result[ordinary, 1:]]) > min(ALL[name][1], 60) - 4


def test_static_activations_clip_what_is_beyond_their_range(monkeypatch):
    monkeypatch.setenv("DIFFACCEL_KERNELS", "int8_static_linear=onednn")  # a product of integers, not the dense one
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 48), torch.randn(4, 64)
    with torch.no_grad(), quantized_as("static", layer, x):
        most = layer(x.amax() * x[:1].sign())
        assert torch.allclose(layer(1e6 * x[:1].sign()), most, rtol=0.2, atol=0.2 * float(most.abs().max()))
        assert layer(torch.full((1, 64), float("inf"))).isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ALL)
def test_weights_that_are_not_finite_are_refused_before_anything_changes(name, value):
    layer = nn.Linear(64, 48)
    x = torch.randn(4, 64)
    with torch.no_grad():
        layer.weight[3, 3] = value
    artefacts = measured(nn.Linear(64, 48), x)
    sections = [Quantize(sites="*", float_activations="", **settings) for settings in ALL[name][0]]
    with pytest.raises(PlanError, match="not finite"):
        accelerate(lonely(layer), Plan(quantization=sections, artefacts=artefacts))
    assert type(layer) is nn.Linear


def test_what_calibration_sees_need_not_be_finite():
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 48), torch.randn(6, 64)
    bad = x.clone()
    bad[0, 3] = float("nan")
    sections = [Quantize(sites="*", float_activations="", balance=0.5)]
    before = layer(x).detach()
    plan = Plan(quantization=sections, artefacts=measured(layer, bad))
    with torch.no_grad(), accelerate(lonely(layer), plan):
        assert sqnr([before], [layer(x)]) > 25


@pytest.mark.parametrize("activations", ["int8", "float"])
def test_convolutions(activations):
    torch.manual_seed(0)
    layer = nn.Conv2d(17, 19, 3, padding=1)
    root = nn.Module()
    root.blocks = nn.ModuleList([nn.ModuleDict({"conv": layer})])
    root.forward = lambda hidden_states, timestep=None: layer(hidden_states)
    with torch.no_grad():
        layer.weight[3], layer.weight[4], layer.weight[:, 5] = 0, 0.1, 0
    x = torch.randn(2, 17, 7, 5)
    before = layer(x).detach()
    section = Quantize(sites="*", activations=activations, float_activations="")
    with torch.no_grad(), accelerate(root, Plan(quantization=section)):
        assert isinstance(layer, QuantizedConv2d) and sqnr([before], [layer(x)]) > 25
        assert torch.allclose(layer(x)[:, 3], layer.bias[3].expand(2, 7, 5), atol=1e-5)
        assert layer(x[:0]).shape == (0, 19, 7, 5)
        bad = x.clone()
        bad[1, 2, 3, 3] = float("nan")
        result = layer(bad)
        assert not result[1, 0, 3, 3].isfinite() and result[0].isfinite().all()
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(PlanError, match="not finite"):
        accelerate(root, Plan(quantization=section))

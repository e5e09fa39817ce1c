"""Static int8 activations: the kernels against the formula, ranges by step, what must be measured first."""

import warnings
from dataclasses import replace

import pytest
import torch
from mutants import mutant
from poison import poisoned_outputs, surrounded
from test_quantization import out, pixart, quantized, snapshot, sqnr, unchanged
from test_schemes import lonely
from torch import nn
from zoo import ZOO
from zoo_pipelines import PIPELINES

from diffaccel import Plan, PlanError, Quantize, accelerate, calibrate
from diffaccel.denoiser import Denoiser, Site, select
from diffaccel.kernels import static_quantize as kernel
from diffaccel.kernels._candidates import worst_row_error
from diffaccel.kernels.int8_linear import activation_bits, pack, quantize_per_channel, saturating_data
from diffaccel.kernels.int8_static import (
    _shifted,
    grid,
    int8_static_linear,
    int8_static_linear_ref,
    static_quantize,
    static_quantize_ref,
)
from diffaccel.plan import Artefacts
from diffaccel.quantization.channels import RANGES, ChannelRecorder
from diffaccel.quantization.eligible import why_not

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFACCEL_CACHE", str(tmp_path))
    monkeypatch.setenv("DIFFACCEL_KERNELS", "int8_static_linear=onednn;int8_conv=onednn")  # which rounds
    torch.manual_seed(0)
    with warnings.catch_warnings():  # NumPy below the interpreter, on infinities
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def data(dtype=torch.float32, M=7, K=1100):
    """x, between poison; beyond the range, infinite and tiny values among it."""
    x = torch.randn(M, K) + 2
    x[0, 0], x[1, 1], x[2, 2] = torch.inf, -torch.inf, 1e4
    low, high = torch.tensor([-1.5]), torch.tensor([5.5])
    return surrounded(x.to(dtype)), *(surrounded(t) for t in grid(low, high)), surrounded((0.5 + torch.rand(K)).half())


def by_hand(x, scale, zero, before):
    factor = (1 if before is None else before.double()) / scale.double()
    return (x.double() * factor + zero.double()).clamp(-128, 127)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("run", ["cpu", "triton"])
def test_rounds_to_the_grid(run, dtype):
    x, scale, zero, before = data(dtype)
    for factor in (None, before):
        if run == "triton":
            with poisoned_outputs():
                q = kernel.launch(x, scale, zero, factor)
        else:
            q = static_quantize(x, scale, zero, factor)
        exact = by_hand(x, scale, zero, factor)
        assert q.dtype == torch.int8 and (q.double() - exact).abs().max() < 0.5 + 1e-3
        assert q.max() == 127 and q.min() == -128
        assert (q != static_quantize_ref(x, scale, zero, factor)).float().mean() < 0.01  # where two are as near


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("y.to(tl.int8), mask=keep)", "y.to(tl.int8), mask=k < K + 1)"),
        ("before_ptr + k, mask", "before_ptr + k + 1, mask"),
        ("-128.0), 127.0)", "-128.0), 126.0)"),
    ],
)
def test_faults_are_noticed(right, wrong):
    x, scale, zero, before = data()
    with mutant(kernel, right, wrong) as copy, pytest.raises(AssertionError), poisoned_outputs():
        assert torch.equal(copy.launch(x, scale, zero, before), static_quantize_ref(x, scale, zero, before))


def test_zero_is_exact_and_one_sign_gets_all_codes():
    for low, high in ((-0.17, 8.0), (0.5, 3.0), (-4.0, -1.0), (0.0, 0.0), (-1.0, 1.0)):
        for bits, codes in ((8, 255), (7, 127)):
            scale, zero = grid(torch.tensor([low]), torch.tensor([high]), bits)
            q = static_quantize(torch.tensor([[0.0, min(low, 0), max(high, 0)]]), scale, zero, None, bits)[0].int()
            assert q[0] == zero and (low == high or q[2] - q[1] in (codes, codes - 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", sorted({7, activation_bits()}))
def test_linear_matches_float64(bits, dtype):
    x, weight = saturating_data(37, 130, 67, torch.device("cpu"))
    x, bias = x.to(dtype)[None], torch.randn(67)
    qweight, scale = quantize_per_channel(weight)
    before = 0.5 + torch.rand(130).bfloat16().float()
    x_scale, x_zero = grid(torch.tensor([-3.0]), torch.tensor([4.0]), bits)
    data = pack(qweight, scale, "onednn").data
    for b, factor in ((bias, None), (None, before)):
        y = int8_static_linear(x, data, scale, b, x_scale, x_zero, None, factor, "onednn", bits)
        q = by_hand(x, x_scale, x_zero, factor).round().clamp(*((-64, 63) if bits == 7 else (-128, 127)))
        exact = (q - x_zero.double()) @ qweight.double().t() * x_scale.double() * scale.double()
        exact = exact if b is None else exact + b.double()
        assert y.dtype == dtype and worst_row_error(y[0].double(), exact[0]) < (
            3e-3 if dtype != torch.bfloat16 else 1e-2
        )
        reference = int8_static_linear_ref(x, qweight, scale, b, x_scale, x_zero, factor, bits)
        assert worst_row_error(y[0], reference[0]) < (1e-3 if dtype != torch.bfloat16 else 1e-2)
    assert int8_static_linear(x[:, :0], data, scale, bias, x_scale, x_zero).shape == (1, 0, 67)
    with pytest.raises(ValueError, match="x_scale"):
        int8_static_linear(x, data, scale, bias, x_scale.expand(2), x_zero)


def test_zero_point_is_taken_out_where_no_library_does():
    """As on CUDA: the product of the codes, less what the zero point adds."""
    x, weight = torch.rand(5, 64), torch.randn(9, 64)
    qweight, scale = quantize_per_channel(weight)
    x_scale, x_zero = grid(torch.zeros(1), torch.ones(1))
    q, product = static_quantize(x, x_scale, x_zero), scale * x_scale
    y = q.float() @ qweight.float().t() * product + _shifted(product, None, x_zero, qweight.sum(1).float())
    reference = int8_static_linear_ref(x, qweight, scale, None, x_scale, x_zero)
    assert x_zero == -128 and torch.allclose(y, reference, atol=1e-4)


def test_operators():
    x, scale, zero, before = torch.randn(3, 8), *grid(torch.tensor([-2.0]), torch.tensor([2.0])), torch.ones(8)
    torch.library.opcheck(torch.ops.diffaccel.static_quantize, (x, scale, zero, before, 8))
    qweight, w_scale = quantize_per_channel(torch.randn(4, 8))
    arguments = (x, qweight, w_scale, None, scale, zero, None, None, "dense", 8)
    torch.library.opcheck(torch.ops.diffaccel.int8_static_linear, arguments)


# --- through a plan ---------------------------------------------------------------------------------------------------


def pipeline():
    specimen = PIPELINES["pixart_sigma"]
    call = specimen.arguments(steps=4)
    return specimen, specimen.build(), {k: v for k, v in call.items() if k not in ("prompt", "generator")}


STATIC = Quantize(activations="static", balance=0.5, float_activations="")


@pytest.fixture(scope="module")
def calibrated():
    _, pipe, call = pipeline()
    return calibrate(pipe, STATIC, prompts=["a", "b c"], generator=torch.Generator().manual_seed(0), **call)


def test_ranges_are_measured_followed_and_saved(calibrated, tmp_path):
    specimen, pipe, _ = pipeline()
    plan = Plan.load(calibrated.save(tmp_path / "plan"))
    reference = specimen.call(pipe, steps=4)
    with accelerate(pipe, plan) as accel:
        layers = quantized(pipe.transformer)
        assert accel.report().techniques[0].facts["schemes"] == {"W8A8 static + balance 0.5": len(layers)}
        used = []
        layers[0].register_forward_pre_hook(lambda m, x: used.append(float(m.act_scale)))
        assert sqnr([reference], [specimen.call(pipe, steps=4)]) > 25
        by_part = grid(*layers[0].act_limits.T, layers[0].bits)[0]
        assert used == [float(by_part[part]) for part in (0, 2, 5, 7)] and len(set(used)) > 1  # of eight, at four steps
        accel.bake()
        pipe.transformer.save_pretrained(tmp_path / "model")
    loaded = type(pipe.transformer).from_pretrained(tmp_path / "model")
    for layer in quantized(loaded):  # without a clock: one range for all steps
        limits = layer.act_limits
        assert torch.equal(layer.act_scale, grid(limits[:, 0].amin()[None], limits[:, 1].amax()[None], layer.bits)[0])
    pipe.transformer = loaded
    assert sqnr([reference], [specimen.call(pipe, steps=4)]) > 20


def test_they_come_off_and_move(calibrated):
    specimen, pipe, _ = pipeline()
    start = snapshot(pipe.transformer)
    with accelerate(pipe, calibrated):
        specimen.call(pipe, steps=2)
    assert unchanged(pipe.transformer, start)
    with accelerate(pipe, calibrated):
        pipe.transformer.to(torch.bfloat16)
        layer = quantized(pipe.transformer)[0]
        assert layer.act_limits.dtype == layer.act_scale.dtype == torch.float32
    assert not any(name.startswith("act_") for m in pipe.transformer.modules() for name in m._buffers)


def test_what_does_not_go_together_is_refused():
    _, model = pixart()
    with pytest.raises(PlanError, match=r"range of .*input.*diffaccel\.calibrate"):
        accelerate(model, Plan(quantization=Quantize(activations="static")))
    with pytest.raises(PlanError, match="rotation"):
        Quantize(activations="static", rotate=True)
    with pytest.raises(PlanError, match="int8 weights"):
        Quantize(activations="static", weights="int4")


def test_the_range_leaves_protected_tokens_out():
    """MixDQ's case: one constant token of the text, many times larger, would take all the codes."""
    _, model = pixart()
    layer = model.transformer_blocks[0].attn2.to_k
    name = "transformer_blocks.0.attn2.to_k"
    site = Site("transformer", name, "cross.k", layer)
    texts = [torch.randn(2, 9, layer.in_features) for _ in range(3)]
    for x in texts:
        x[:, 0] = torch.linspace(-400, 400, layer.in_features)
    recorder = ChannelRecorder([site], set(), {site}, {site})
    for x in texts[:2]:
        recorder._rows[site.full_name].begin()
        layer(x)
    recorder.remove()
    artefacts, exact, losses = Artefacts(dict(recorder.artefacts())), layer(texts[2]).detach()[:, 1:], {}
    for protect in (True, False):
        section = Quantize(sites=f"transformer.{name}", activations="static", protect=protect, float_activations="")
        limits = artefacts if protect else _with_leading(artefacts, site)
        with torch.no_grad(), accelerate(model, Plan(quantization=section, artefacts=limits)):
            losses[protect] = sqnr([exact], [layer(texts[2])[:, 1:]])
    assert losses[True] > losses[False] + 20


def _with_leading(artefacts, site):
    key = f"quantization.{site.full_name}.limits"
    wide = artefacts[key].clone()
    wide[0, 0], wide[0, 1] = wide[0, 0].clamp(max=-400), wide[0, 1].clamp(min=400)
    return Artefacts({**artefacts, key: wide})


def test_convolutions_round_to_a_symmetric_range():
    specimen = ZOO["unet_sd15"]
    model = specimen.build()
    sites = [s for s in select([Denoiser.of(model, "unet")], "conv skip", "layers") if why_not(s.module, {}) is None]
    recorder = ChannelRecorder(sites, set(), set(), set(sites))
    with torch.no_grad():
        before = out(specimen, model)
        recorder.remove()
        plan = Plan(
            quantization=Quantize(sites="conv skip", activations="static"),
            artefacts=Artefacts(dict(recorder.artefacts())),
        )
        with accelerate(model, plan):
            layers = quantized(model)
            assert layers and all(
                float(x.act_scale) * 127 == pytest.approx(float(x.act_limits.abs().max())) for x in layers
            )
            assert sqnr(before, out(specimen, model)) > 25
        with accelerate(model, replace(plan, quantization=(replace(plan.quantization[0], split=True),))):
            split = [x for x in quantized(model) if x.active.scheme.split]
            assert split and all(x.act_scale.shape == (2,) and x.act_limits.shape == (RANGES, 4) for x in split)
            assert sqnr(before, out(specimen, model)) > 25


def test_ranges_change_within_compiled_code():
    """They are buffers that are written to, so another part of the schedule is no other graph."""
    torch.manual_seed(0)
    layer = nn.Linear(32, 16)
    root = lonely(layer)
    site = Site("transformer", "blocks.0.to_q", "attn.q", layer)
    recorder = ChannelRecorder([site], set(), set(), {site})
    small, large = torch.randn(4, 32), 100 * torch.randn(4, 32)
    broken = small.clone()
    broken[0, 0], broken[1, 1] = torch.nan, torch.inf  # does not count
    layer(broken)
    for part, x in ((0, small), (RANGES - 1, large)):
        recorder._row = part
        layer(x)
    recorder.remove()
    section = Quantize(sites="*", activations="static")
    with torch.no_grad(), accelerate(root, Plan(quantization=section, artefacts=Artefacts(dict(recorder.artefacts())))):
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        layer.use_limits(RANGES - 1)
        coarse = compiled(small)
        layer.use_limits(0)
        with torch.compiler.set_stance("fail_on_recompile"):
            fine = compiled(small)
        exact = small @ (layer.weight + 0).t() + layer.bias
        assert sqnr([exact], [fine]) > sqnr([exact], [coarse]) + 20

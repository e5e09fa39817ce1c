"""Balancing, rotation, low rank and protected tokens: exact without rounding, better with it where outliers are."""

import pytest
import torch
from safetensors.torch import load_file
from test_quantization import pixart, quantized, same, snapshot, sqnr, unchanged
from test_schemes import lonely
from torch import nn
from zoo_pipelines import PIPELINES

from diffaccel import Plan, PlanError, Quantize, accelerate, calibrate
from diffaccel.denoiser import Site
from diffaccel.kernels.fit_int4 import quantize_int4, quantize_nested
from diffaccel.kernels.hadamard import block_for, hadamard
from diffaccel.kernels.int4_linear import int4_linear
from diffaccel.kernels.int8_linear import int8_linear, pack, quantize_per_channel
from diffaccel.kernels.int8_rows import Conditioner, conditioned
from diffaccel.kernels.per_token import quantize_per_token
from diffaccel.plan import Artefacts
from diffaccel.quantization.channels import RANGES, ChannelRecorder, Channels
from diffaccel.quantization.conditioning import (
    balance_multiplier,
    condition_weight,
    low_rank,
    release_weight,
)
from diffaccel.quantization.protection import ConstantRows, protect_rows
from diffaccel.quantization.rotation import block_size, random_signs

pytestmark = pytest.mark.filterwarnings("ignore:diffaccel", "ignore:__array__")


# --- the mathematics --------------------------------------------------------------------------------------------------


def test_rotation_stays_in_the_range_of_half_precision():
    x = (60000 * random_signs(128, "cpu").sign()[None]).half()
    assert (
        hadamard(x, random_signs(128, "cpu")).isfinite().all()
        and not hadamard(x, random_signs(128, "cpu").sign()).isfinite().all()
    )
    assert block_size(67) is None and block_size(24) is None


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("order", ["before", "after", "both"])
def test_conditioning_does_not_change_the_product(rotated, order):
    torch.manual_seed(0)
    x, weight = torch.randn(7, 64), torch.randn(12, 64)
    m = balance_multiplier(torch.logspace(-2, 3, 64), weight, 0.5)
    before, after = m if order != "after" else None, m.flip(0) if order != "before" else None
    turned = condition_weight(weight, before, after, rotated=rotated)
    y = conditioned(x, Conditioner(before, after, 64 if rotated else 1)) @ turned.T
    assert torch.allclose(y, x @ weight.T, atol=1e-3)
    assert torch.allclose(release_weight(turned, before, after, rotated=rotated), weight, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("path", ["onednn", "dense"])
def test_products_that_condition_rows_themselves(path, rotated, dtype):
    """The kernels give what they give for rows conditioned beforehand, in one pass, with a branch and without."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 9, 192).to(dtype), torch.randn(40, 192), torch.randn(40)
    signs = torch.randint(0, 2, (192,)) * 2.0 - 1
    how = Conditioner(signs * (0.5 + torch.rand(192)).bfloat16(), 0.5 + torch.rand(192), block_for(192) * rotated or 1)
    plain = conditioned(x, how)
    assert not torch.allclose(plain.float(), x.float(), atol=0.1)
    branch = torch.randn(4, 192, dtype=dtype), torch.randn(40, 4, dtype=dtype)
    int8, int4, nested = pack(*quantize_per_channel(weight), path), quantize_int4(weight, 32), quantize_nested(weight)
    for product in (
        lambda x, **way: int8_linear(x, int8, bias, **way),
        lambda x, **way: int4_linear(x, int4, bias, path=path, **way),
        lambda x, **way: int4_linear(x, nested, None, path=path, **way),
        lambda x, **way: int4_linear(x, int4, bias, "int8", branch, path=path, **way),
    ):
        fused, apart = product(x, how=how), product(plain)
        assert fused.dtype == dtype and sqnr(apart, fused) > (60 if dtype == torch.float32 else 34)
    if path == "dense":  # tensors that oneDNN blocked cannot be compared
        torch.library.opcheck(torch.ops.diffaccel.int8_linear, (x, int8.data, int8.scale, bias, path, 8, *how))


def test_rows_in_chunks_are_the_rows(monkeypatch):
    """Beyond a chunk, quantisation goes on with the same multipliers."""
    x, factor = torch.randn(50, 64), 0.5 + torch.rand(64)
    whole = quantize_per_token(x, 8, factor)
    assert torch.equal(whole[0], quantize_per_token(x * factor)[0])
    monkeypatch.setattr("diffaccel.kernels.per_token._CHUNK", 64 * 7)
    for a, b in zip(quantize_per_token(x, 8, factor), whole, strict=True):
        assert torch.equal(a, b)


def test_alpha_means_what_smoothquant_means_by_it():
    torch.manual_seed(0)
    squares, weight = torch.logspace(-3, 3, 32), torch.randn(16, 32) * torch.logspace(-1, 1, 32).flip(0)
    size = weight.square().mean(0)
    activations = squares * balance_multiplier(squares, weight, 1.0).square()  # evened out
    weights = size / balance_multiplier(squares, weight, 0.0).square()
    for even in (activations, weights):
        assert even.max() / even.min() < 1.05
    m = balance_multiplier(squares, weight, 0.5)
    assert m.max() == 1 and torch.equal(m.bfloat16().float(), m)
    product = lambda m: float((m.square() * squares).sum() * (size / m.square()).sum())  # noqa: E731
    assert product(m) < product(m * (1 + 0.2 * torch.rand(32))) and product(m) < product(torch.ones(32))


def test_channels_of_zeros_are_balanced_like_the_others():
    weight = torch.ones(4, 6)
    weight[:, 1] = 0
    squares = torch.tensor([1.0, 1.0, 0.0, 4.0, 16.0, float("nan")])
    m = balance_multiplier(squares, weight, 0.5)
    assert m.isfinite().all() and float(m[1]) == float(m[2]) == float(m[5]) and m.min() > 0
    assert torch.equal(balance_multiplier(torch.zeros(6), weight, 0.5), torch.ones(6))


def test_low_rank_takes_the_largest_part_and_refining_helps():
    torch.manual_seed(0)
    weight = torch.randn(96, 4) @ torch.randn(4, 80) * 5 + torch.randn(96, 80)
    state = torch.get_rng_state()
    rounded = lambda w: (w / (s := w.abs().amax(1, keepdim=True) / 7)).round() * s  # noqa: E731
    up, down = low_rank(weight, 4, torch.float32, rounded)
    assert torch.equal(torch.get_rng_state(), state)  # the user's noise stays as it is
    u, s, v = torch.linalg.svd(weight)
    best = (weight - u[:, :4] * s[:4] @ v[:4]).norm()
    assert (weight - up @ down).norm() < 1.01 * best
    error = lambda up, down: float((weight - up @ down - rounded(weight - up @ down)).norm())  # noqa: E731
    assert error(up, down) < 0.7 * float((weight - rounded(weight)).norm())
    assert error(*low_rank(weight, 4, torch.float32, rounded, refine=4)) < error(up, down)
    full = low_rank(weight, 500, torch.float32, rounded)
    assert full[0].shape == (96, 80) and torch.allclose(full[0] @ full[1], weight, atol=1e-3)


# --- on a linear with outliers ----------------------------------------------------------------------------------------


def measured(layer, x):
    """Artefacts of one call of a linear in a model of its own."""
    site = Site("transformer", "blocks.0.to_q", "attn.q", layer)
    recorder = ChannelRecorder([site], {site}, set())
    layer(x)
    recorder.remove()
    return Artefacts(dict(recorder.artefacts()))


def outlying(fixed):
    """A linear and inputs with a channel 60 times larger than the others: always the same one, or another per token."""
    torch.manual_seed(1)
    layer, x = nn.Linear(128, 96), torch.randn(64, 128)
    if fixed:
        x[:, 5] *= 60
        with torch.no_grad():
            layer.weight[:, 5] /= 60  # which the weight makes up for
    else:
        x[torch.arange(64), torch.randint(128, (64,))] *= 60
    return layer, x


@pytest.mark.parametrize(
    ("how", "fixed", "weights", "gain"),
    [
        ({"balance": 0.5}, True, "int8", 10),
        ({"balance": 0.5}, True, "int4", 3),
        ({"balance": 0.5, "rotate": True}, True, "int8", 10),
        ({"rotate": True}, False, "int8", 10),
        ({"balance": 0.5, "rotate": True}, False, "int8", 10),
        ({"balance": 0.5, "rotate": True, "first": "rotate"}, False, "int8", 10),
    ],
)
def test_outliers_in_a_channel(how, fixed, weights, gain, monkeypatch):
    monkeypatch.setenv("DIFFACCEL_KERNELS", "int8_linear=onednn;int4_linear=onednn")  # the one that rounds activations
    layer, x = outlying(fixed)
    artefacts = measured(layer, x)
    model, before = lonely(layer), layer(x).detach()

    def quality(**settings):
        section = Quantize(sites="*", weights=weights, **settings)
        with torch.no_grad(), accelerate(model, Plan(quantization=section, artefacts=artefacts)):
            assert sqnr([before], [x @ (layer.weight + 0).T + layer.bias]) > 15  # .weight gives what is multiplied with
            return sqnr([before], [layer(x)])

    assert quality(**how) > quality() + gain


def test_calibration_is_streamed_by_range_and_merges():
    layer = nn.Linear(16, 16)
    site = Site("transformer", "x", "attn.q", layer)
    torch.manual_seed(0)
    data = [torch.randn(3, 5, 16) * (i + 1) for i in range(4)]
    recorders = []
    for mine in (range(4), (0, 2), (1, 3)):
        recorder = ChannelRecorder([site], set(), set())
        for i in mine:
            recorder._row = (0, 0, 7, 7)[i]
            layer(data[i])
        recorder.remove()
        recorders.append(recorder)
    whole, first, second = recorders
    first.merge(second.state())
    for recorder in (whole, first):
        channels = Channels(Artefacts(dict(recorder.artefacts())), site)
        early, late = (torch.cat(d).flatten(0, 1).square().mean(0) for d in (data[:2], data[2:]))
        assert torch.allclose(channels.squares([(0.0, 0.5)]), early)
        assert torch.allclose(channels.squares([(0.9, 1.0)]), late)
        assert torch.allclose(channels.squares([(0.5, 0.6)]), (early + late) / 2)  # nothing was measured there
    assert len(dict(whole.artefacts())["quantization.transformer.x.squares"]) == RANGES


# --- through calibrate ------------------------------------------------------------------------------------------------

CALL = {"num_inference_steps": 3, "height": 32, "width": 32, "output_type": "latent"}


def pipeline():
    specimen = PIPELINES["pixart_sigma"]
    call = specimen.arguments(steps=3)
    return specimen, specimen.build(), {k: v for k, v in call.items() if k not in ("prompt", "generator")}


def test_a_balanced_plan_is_calibrated_saved_and_applied(tmp_path):
    specimen, pipe, call = pipeline()
    start = snapshot(pipe.transformer)
    section = Quantize(balance=0.5, rotate=True, weights="int4", group=32)
    with pytest.raises(PlanError, match=r"diffaccel\.calibrate"):
        accelerate(pipe, Plan(quantization=section))
    plan = calibrate(pipe, section, prompts=["a", "b c"], generator=torch.Generator().manual_seed(0), **call)
    assert unchanged(pipe.transformer, start)
    plan = Plan.load(plan.save(tmp_path))
    reference = specimen.call(pipe, steps=3)
    with accelerate(pipe, plan) as accel:
        assert next(iter(accel.report().techniques[0].facts["schemes"])) == "W4A8 g32 + balance 0.5, rotation"
        assert not same([reference], [specimen.call(pipe, steps=3)])
    assert unchanged(pipe.transformer, start) and same([reference], [specimen.call(pipe, steps=3)])
    other = Quantize(balance=0.5, rotate=True, first="rotate")
    with pytest.raises(PlanError, match=r"diffaccel\.calibrate"):  # that needs the rotated input
        accelerate(pipe, Plan(quantization=other, artefacts=plan.artefacts))


def test_calibration_goes_on_where_it_was_cut_off(tmp_path, monkeypatch):
    _, pipe, call = pipeline()
    section, prompts = Quantize(sites="attn.*", balance=0.5, rotate=True, first="rotate"), ["a", "b", "c"]
    seeded = lambda: [{"prompt": p, "generator": torch.Generator().manual_seed(ord(p))} for p in prompts]  # noqa: E731
    whole = calibrate(pipe, section, prompts=seeded(), **call)
    real, calls = type(pipe).__call__, []

    def failing(self, *args, **kwargs):
        calls.append(kwargs["prompt"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe), "__call__", failing)
    with pytest.raises(KeyboardInterrupt):
        calibrate(pipe, section, prompts=seeded(), folder=tmp_path, **call)
    assert not any(m._forward_pre_hooks for m in pipe.transformer.modules())
    again = calibrate(pipe, section, prompts=seeded(), folder=tmp_path, **call)
    assert calls == ["a", "b", "c", "c"]
    assert set(again.artefacts) == set(whole.artefacts)
    for name, tensor in whole.artefacts.items():
        torch.testing.assert_close(again.artefacts[name], tensor)
    with pytest.raises(PlanError, match="calibration of another"):
        calibrate(pipe, section, prompts=["d"], folder=tmp_path, **call)
    file = tmp_path / "calibration.safetensors"
    assert load_file(file)
    file.write_bytes(b"broken")
    with pytest.raises(PlanError, match="damaged"):
        calibrate(pipe, section, prompts=seeded(), folder=tmp_path, **call)


# --- protected tokens -------------------------------------------------------------------------------------------------


def text(seed, batch=2, tokens=7, size=80.0):
    """Texts [batch, tokens, 16] with a first token that is the same and ``size`` times larger."""
    x = torch.randn(batch, tokens, 16, generator=torch.Generator().manual_seed(seed))
    x[:, 0] = torch.linspace(-1, 1, 16) * size
    return x


def test_constant_outlying_tokens_are_found():
    def found(*texts):
        rows = ConstantRows()
        for x in texts:
            rows.begin()
            rows.see(x)
            rows.see(torch.randn(2, 7, 16))  # later calls of the same run tell nothing
        return rows.found()

    assert torch.equal(found(text(0), text(1)), text(0)[0, :1])
    assert torch.equal(found(text(0)), text(0)[0, :1])  # two texts in one batch
    assert found(text(0, batch=1)) is None and found(text(0, batch=1), text(0, batch=1)) is None  # one text only
    assert found(text(0, size=1.0), text(1, size=1.0)) is None  # constant, but like the others
    changed = text(1)
    changed[:, 0] += 10
    assert found(text(0), changed) is None
    assert found(torch.randn(4, 16)) is None


def test_protected_rows_are_put_in_where_the_input_is_the_measured_one():
    x, y = text(0), torch.zeros(2, 7, 3)
    x[1, 0] *= 2  # another text encoder's
    rows, outputs = text(0)[0, :1], torch.ones(1, 3)
    put = protect_rows(y, x, rows, outputs)
    assert torch.equal(put[0, 0], torch.ones(3)) and float(put.abs().sum()) == 3
    assert torch.equal(protect_rows(y[:, :0], x[:, :0], rows, outputs), y[:, :0])
    assert protect_rows(y[0], x[0], rows, outputs) is not None


def test_protection_through_a_plan():
    _, model = pixart()
    layer = model.transformer_blocks[0].attn2.to_k
    site = Site("transformer", "transformer_blocks.0.attn2.to_k", "cross.k", layer)
    recorder = ChannelRecorder([site], set(), {site})
    texts = [torch.randn(2, 7, layer.in_features) for _ in range(2)]
    for x in texts:
        x[:, 0] = torch.linspace(-50, 50, layer.in_features)
        recorder._rows[site.full_name].begin()
        layer(x)
    recorder.remove()
    artefacts = Artefacts(dict(recorder.artefacts()))
    exact = layer(texts[0]).detach()
    sites = "transformer.transformer_blocks.0.attn2.to_k"
    section = Quantize(sites=sites, weights="int4", protect=True, float_activations="")
    start = snapshot(model)
    with torch.no_grad(), accelerate(model, Plan(quantization=section, artefacts=artefacts)):
        protected = layer(texts[0])
        assert len(quantized(model)) == 1
    assert unchanged(model, start)
    assert torch.allclose(protected[:, 0], exact[:, 0], rtol=1e-5, atol=1e-5) and not torch.allclose(
        protected[:, 1], exact[:, 1], rtol=1e-3
    )

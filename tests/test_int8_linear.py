import copy
import json
import os
import pickle
import platform
import subprocess
import sys
import textwrap

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffaccel.kernels import _candidates
from diffaccel.kernels._candidates import Choice, Trial, choices, choose, forget, token_bucket, worst_row_error
from diffaccel.kernels.int8_linear import (
    activation_bits,
    int8_linear,
    int8_linear_ref,
    pack,
    quantize_per_channel,
    quantize_per_token,
)

# Relative error of the worst row against the same integers in float64: only the rounding of the result remains.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SHAPES = [(1, 1, 1), (1, 64, 48), (5, 7, 3), (17, 130, 67), (64, 128, 256), (40, 1153, 33)]  # M, K, N
CPU = torch.device("cpu")
PATHS = ["onednn"] + ["int_mm"] * (activation_bits() == 8)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFACCEL_CACHE", str(tmp_path))
    monkeypatch.delenv("DIFFACCEL_KERNELS", raising=False)
    torch.manual_seed(0)
    forget()
    yield
    forget()


def data(M, K, N, dtype=torch.float32):
    """Rows (of x and of the weight): gaussian, positive, negative, nearly constant, zero."""
    x, weight = torch.randn(M, K), torch.randn(N, K) * 0.05
    for v in (x, weight):
        v[1::5] = v[1::5].abs()
        v[2::5] = -v[2::5].abs()
        v[3::5] = 1 + 0.01 * v[3::5]
        v[4::5] = 0
    return x.to(dtype), weight, torch.randn(N)


def by_hand(x, qweight, scale, bias, bits):
    """The formula once more with nothing of the library's; float64 once x / row is rounded (float32, so that ties,
    frequent in half precision, fall to the same side)."""
    qmax = {8: 127, 7: 63}[bits]
    row = x.float().abs().amax(-1, keepdim=True) / qmax
    q = torch.where(row > 0, x.float() * (1 / row), 0.0).round().double()
    return (q @ qweight.double().t()) * row.double() * scale.double() + (0 if bias is None else bias.double())


def agrees(y, expected, dtype):
    return worst_row_error(y, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("M", "K", "N"), SHAPES)
@pytest.mark.parametrize("path", [*PATHS, "ref"])
def test_matches_float64(path, M, K, N, dtype):
    x, weight, bias = data(M, K, N, dtype)
    qweight, scale = quantize_per_channel(weight)
    for b in (bias, None, bias.to(dtype)):
        packed = None if path == "ref" else pack(qweight, scale, path)
        bits = 8 if packed is None else packed.bits
        y = int8_linear_ref(x, qweight, scale, b) if packed is None else int8_linear(x, packed, b)
        assert y.dtype == dtype and y.shape == (M, N)
        assert agrees(y, by_hand(x, qweight, scale, b, bits), dtype)


@pytest.mark.parametrize("M", [1, 16, 33])
def test_seven_bits_match_float64(M):
    """The form that is safe without VNNI is exact on every machine."""
    x, weight, bias = data(M, 256, 40)
    qweight, scale = quantize_per_channel(weight)
    packed = pack(qweight, scale, "onednn")
    y = torch.ops.diffaccel.int8_linear(x, packed.data, packed.scale, bias, "onednn", 7)
    assert agrees(y, by_hand(x, qweight, scale, bias, 7), torch.float32)
    assert quantize_per_token(x, 7)[0].abs().max() == 63


def test_quantize():
    x, weight, _ = data(12, 40, 30)
    for values, (q, scale), rows in [
        (weight, quantize_per_channel(weight), lambda s: s[:, None]),
        (x, quantize_per_token(x), lambda s: s),
    ]:
        error = (values - q.float() * rows(scale)).abs()
        assert q.dtype == torch.int8 and scale.dtype == torch.float32 and q.abs().max() == 127
        assert (error <= rows(scale) * 0.501).all() and (q[4::5] == 0).all() and (scale > 0).all()


def test_quantize_in_chunks_equals_whole(monkeypatch):
    x = torch.randn(3, 50, 64)
    whole = quantize_per_token(x)
    monkeypatch.setattr("diffaccel.kernels.per_token._CHUNK", 64 * 7)
    for a, b in zip(quantize_per_token(x), whole, strict=True):
        assert torch.equal(a, b)


def test_sqnr_of_gaussian_data():
    x, weight = torch.randn(256, 1152), torch.randn(320, 1152) * 0.03
    exact = (x.double() @ weight.double().t()).float()
    noise = int8_linear(x, pack(*quantize_per_channel(weight))) - exact
    sqnr = 20 * torch.log10(exact.norm() / noise.norm())
    assert sqnr > (38 if activation_bits() == 8 else 34)  # measured: 42 and 38 dB


def test_non_contiguous_many_dimensions_and_empty():
    x, weight, bias = data(24, 36, 20)
    packed = pack(*quantize_per_channel(weight))
    y = int8_linear(x, packed, bias)
    wide = torch.randn(24, 72)
    wide[:, ::2] = x
    assert torch.equal(int8_linear(wide[:, ::2], packed, bias), y)
    assert torch.equal(int8_linear(x.t().contiguous().t(), packed, bias), y)
    assert torch.equal(int8_linear(x.view(2, 3, 4, 36), packed, bias), y.view(2, 3, 4, 20))
    assert int8_linear(x[:0], packed, bias).shape == (0, 20)


def test_nan_stays_in_its_row():
    x, weight, bias = data(8, 64, 16)
    packed = pack(*quantize_per_channel(weight))
    y = int8_linear(x, packed, bias)
    x[3, 5] = float("nan")
    z = int8_linear(x, packed, bias)
    keep = torch.arange(8) != 3
    assert z[3].isnan().all() and torch.equal(z[keep], y[keep])


@pytest.mark.parametrize("path", ["auto", *PATHS, "dense"])
def test_packed_is_the_only_copy(path):
    qweight, scale = quantize_per_channel(torch.randn(384, 640))
    packed = pack(qweight, scale, path)
    assert packed.shape == (384, 640) and packed.nbytes <= 0.26 * 384 * 640 * 4
    for same in (packed, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(same.unpack(), qweight) and torch.equal(same.scale, scale)
    assert packed.to("cpu") is packed and packed.to("meta").shape == (384, 640)


def test_wrong_input_is_refused():
    qweight, scale = quantize_per_channel(torch.randn(8, 16))
    with pytest.raises(ValueError, match="quantize_per_channel"):
        pack(qweight.float(), scale)
    with pytest.raises(ValueError, match="no candidate 'onednm'"):
        pack(qweight, scale, "onednm")
    with pytest.raises(ValueError, match=r"expected x \[..., 16\]"):
        int8_linear(torch.randn(2, 15), pack(qweight, scale))


@pytest.mark.parametrize("path", ["auto", "dense"])
def test_opcheck(path):
    """On the plain form: opcheck looks at storages, and a blocked tensor has none (it is compiled below)."""
    qweight, scale = quantize_per_channel(torch.randn(24, 32))
    for x, bias in [(torch.randn(2, 5, 32), torch.randn(24)), (torch.randn(3, 32).half(), None)]:
        torch.library.opcheck(torch.ops.diffaccel.int8_linear.default, (x, qweight, scale, bias, path, 8))


class Layer(torch.nn.Module):
    def __init__(self, packed, bias):
        super().__init__()
        self.packed = packed
        self.bias = torch.nn.Parameter(bias, requires_grad=False)

    def forward(self, x):
        return torch.relu(int8_linear(x, self.packed, self.bias)) + 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("path", ["auto", "onednn", "dense"])
def test_compiles_without_graph_break(path, backend):
    x, weight, bias = data(9, 32, 24)
    layer = Layer(pack(*quantize_per_channel(weight), path), bias)
    expected = layer(x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    assert torch.equal(compiled(x), expected)
    torch.testing.assert_close(compiled(x[:5]), expected[:5])


def test_fake_tensors_measure_nothing():
    with FakeTensorMode():
        packed = pack(torch.ones(24, 32, dtype=torch.int8, device="cuda"), torch.ones(24, device="cuda"))
        y = int8_linear(torch.ones(2, 9, 32, device="cuda", dtype=torch.bfloat16), packed)
        assert y.shape == (2, 9, 24) and y.dtype == torch.bfloat16 and y.device.type == "cuda"
        assert choose("fake", ["M8"], CPU, ["a", "b"], pytest.fail, default="b") == "b"
    assert [c.source for c in choices()] == ["default"]


def test_a_saturating_kernel_is_left_out():
    """A kernel that adds pairs of products in int16, as on AVX2 without VNNI, must not pass the check."""

    def saturating(x, weight, scale, bias, bits):
        q, row = quantize_per_token(x, bits)
        pairs = ((q.int() + 128)[:, None] * weight[None].int()).unflatten(-1, (-1, 2)).sum(-1).clamp(-32768, 32767)
        return (pairs.sum(-1) - 128 * weight.int().sum(-1)).float() * scale * row

    module = sys.modules["diffaccel.kernels.int8_linear"]
    names = ["onednn", "dense"]
    trial = module._trial(16, 64, 24, torch.zeros(16, 64), names, activation_bits())
    x, weight = module.saturating_data(16, 64, 24, CPU)
    wrong = saturating(x, *quantize_per_channel(weight), None, 8)
    assert trial.error(wrong) > 100 * trial.tolerance["onednn"]
    assert trial.error(trial.runs["dense"]()) < trial.tolerance["dense"]


EMULATED = """
    import torch
    from diffaccel.kernels.int8_linear import *
    from diffaccel.kernels.int8_linear import _exact, _onednn
    torch.manual_seed(0)
    bits = activation_bits()
    for M, K, N in [(1, 64, 64), (33, 130, 67), (64, 1152, 48)]:
        x, w = torch.rand(M, K) * 0.01 + 1, torch.rand(N, K) + 0.1
        w[1::2] *= -1
        x[:, ::7] = -0.5
        q, s = quantize_per_channel(w)
        p = pack(q, s, "onednn")
        ref = int8_linear_ref(x, q, s, None, bits)
        assert (int8_linear(x, p) - ref).norm() < 1e-5 * ref.norm(), (M, K, N)
        assert (ref - x @ w.t()).norm() < 0.02 * ref.norm()
        # weights of 4 bits leave room for activations of 8: 2 * 255 * 8 stays far below 2**15
        q4, one = torch.randint(1, 8, (N, K), dtype=torch.int8), torch.ones(N)
        q4[1::2] = -8
        y = _onednn(x, torch.ops.onednn.qlinear_prepack(q4, None), one, None, 8)
        ref = int8_linear_ref(x, q4, one, None, 8)
        assert (y - ref).abs().max() <= 1e-6 * ref.abs().max(), (M, K, N)
    print(bits, _exact("int_mm", 8))
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="limits the x86 instruction set")
def test_without_vnni(tmp_path):
    """oneDNN limited to AVX2, whatever this machine has: int_mm saturates, the 7-bit form is exact."""
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "DIFFACCEL_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(EMULATED)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["7", "False"]


def toy_trial(slow=2e-3, fast=1e-3, error=0.0, calls=None):
    """Two candidates and a baseline whose "time" is the value they return."""
    times = {"slow": slow, "fast": fast}
    return Trial(
        runs={name: lambda t=t: torch.tensor([t, error if t == fast else 0.0]) for name, t in times.items()},
        error=lambda y: float(y[1]),
        tolerance={"slow": 0.1, "fast": 0.1},
        baseline=lambda: torch.tensor([4e-3, 0.0]),
    )


@pytest.fixture
def toy(monkeypatch):
    """choose() on a clock that reads each run's stated time."""
    monkeypatch.setattr(_candidates, "seconds_of", lambda run, device: round(float(run()[0]), 9))

    def pick(trial=toy_trial, shape=("M8",)):
        return choose("toy", shape, CPU, ["slow", "fast"], trial, default="slow")

    return pick


def refuse():
    raise AssertionError("measured again")


def test_fastest_correct_candidate(toy):
    assert toy() == "fast" and toy(refuse) == "fast"
    (choice,) = choices("toy")
    assert choice.source == "measured" and choice.speedup == pytest.approx(4)
    assert choice.seconds == pytest.approx({"slow": 2e-3, "fast": 1e-3, "baseline": 4e-3})
    assert toy(lambda: toy_trial(slow=1.03e-3), ["M16"]) == "slow"  # within the margin the first wins
    with pytest.warns(RuntimeWarning, match="candidate fast is wrong"):
        assert toy(lambda: toy_trial(error=0.2), ["M32"]) == "slow"
    with pytest.warns(RuntimeWarning, match="candidate fast is wrong"):
        assert toy(lambda: toy_trial(error=float("inf")), ["M64"]) == "slow"


def test_disk_cache(toy, tmp_path):
    assert toy() == "fast"
    forget()
    assert toy(refuse) == "fast" and choices()[0].source == "cache" and choices()[0].speedup == pytest.approx(4)
    assert [p.name for p in tmp_path.iterdir()] == ["kernels.json"]
    file = tmp_path / "kernels.json"
    good = json.loads(file.read_text())
    (key,) = good["choices"]
    assert torch.__version__ in key and "toy" in key and "M8" in key
    entries = ["fast", {"name": "fast"}, {"name": "gone", "seconds": {}, "error": {}}]
    damaged = [{**good, "format": 99}, {**good, "choices": 3}, [], *({**good, "choices": {key: e}} for e in entries)]
    for bad in ["", "{", "\0\xff", *map(json.dumps, damaged)]:
        forget()
        file.write_text(bad)
        assert toy() == "fast" and choices()[0].source == "measured"
    assert json.loads(file.read_text()) == good


def test_unwritable_cache(toy, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIFFACCEL_CACHE", str(tmp_path / "file" / "below"))
    assert toy() == "fast"


def test_a_disturbed_measurement_is_not_kept(toy, tmp_path, monkeypatch):
    readings = iter([1.0, 2.0, 3.0, *[10.0, 20.0, 30.0] * 30])
    monkeypatch.setattr(_candidates, "seconds_of", lambda run, device: next(readings))
    assert toy() == "slow" and not list(tmp_path.iterdir())


def test_override(toy, monkeypatch):
    monkeypatch.setenv("DIFFACCEL_KERNELS", "other=x; toy = slow ;")
    assert toy(refuse) == "slow" and choices()[0].source == "override"
    monkeypatch.setenv("DIFFACCEL_KERNELS", "toy=none")
    with pytest.warns(RuntimeWarning, match="toy=none"):
        assert toy() == "fast"
    monkeypatch.setenv("DIFFACCEL_KERNELS", "toy")
    with pytest.raises(ValueError, match="operator=candidate"):
        toy()


def test_override_decides_form_and_path(monkeypatch):
    x, weight, _ = data(40, 32, 24)
    quantized = quantize_per_channel(weight)
    monkeypatch.setenv("DIFFACCEL_KERNELS", "int8_linear=dense")
    packed = pack(*quantized)
    expected = x @ (quantized[0].float() * quantized[1][:, None]).t()
    assert not packed.data.is_mkldnn
    torch.testing.assert_close(int8_linear(x, packed), expected)


def test_real_choice_is_measured_once():
    x, weight, _ = data(40, 128, 96)
    packed = pack(*quantize_per_channel(weight))
    state = torch.get_rng_state()
    int8_linear(x, packed)
    int8_linear(x[:33], packed)
    (choice,) = choices("int8_linear")
    assert isinstance(choice, Choice) and "M64" in choice.shape and choice.name in ("onednn", "dense")
    assert set(choice.seconds) == {"onednn", "dense", "baseline"} and choice.error["onednn"] < 1e-5
    assert torch.equal(torch.get_rng_state(), state)


def test_token_bucket():
    assert [token_bucket(m) for m in (1, 2, 3, 1024, 1025, 10**6)] == [1, 2, 4, 1024, 2048, 4096]


def test_onednn_does_not_fall_back_to_its_reference():
    """With VNNI, int8 activations took seconds here; the scalar kernel needs 0.2 s and more on any processor."""
    packed = pack(*quantize_per_channel(torch.randn(440, 168)), "onednn")
    x = torch.randn(591, 168)
    assert min(_candidates.seconds_of(lambda: int8_linear(x, packed), x.device) for _ in range(5)) < 0.1

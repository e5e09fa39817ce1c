import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffaccel.kernels import fp8_linear
from diffaccel.kernels._candidates import choices, forget, worst_row_error
from diffaccel.kernels.fp8_linear import FP8, fp8_linear_ref, quantize_per_channel, quantize_per_token
from diffaccel.kernels.int8_linear import saturating_data

# Relative error of the worst row against the same e4m3 operands in float64.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SHAPES = [(1, 1, 1), (5, 7, 3), (17, 33, 70), (16, 48, 64)]  # M, N, K
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFACCEL_CACHE", str(tmp_path))
    monkeypatch.delenv("DIFFACCEL_KERNELS", raising=False)
    torch.manual_seed(0)
    forget()
    yield
    forget()


@pytest.fixture
def triton_on_cpu(monkeypatch):
    """The kernels in the interpreter, in place of a GPU's."""
    monkeypatch.setattr(fp8_linear, "_paths", lambda device: ("triton", "dense"))


def data(M, N, K, dtype=torch.float32):
    x, weight = saturating_data(M, K, N, CPU)
    return x.to(dtype), weight, torch.randn(N)


def by_hand(x, qweight, scale, bias):
    """The formula once more, in float64 but for what is rounded to e4m3."""
    row = (x.float().abs().amax(-1, keepdim=True) / 448).clamp(min=2.0**-100)
    q = (x.float() * (1 / row)).to(FP8).double()
    return (q @ qweight.double().t()) * row.double() * scale.double() + (0 if bias is None else bias.double())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_matches_float64(M, N, K, dtype, triton_on_cpu):
    x, weight, bias = data(M, N, K, dtype)
    qweight, scale = quantize_per_channel(weight)
    for b in (bias, None, bias.to(dtype)):
        for y in (fp8_linear_ref(x, qweight, scale, b), fp8_linear.fp8_linear(x, qweight, scale, b, "triton")):
            assert y.dtype == dtype and y.shape == (M, N)
            assert worst_row_error(y, by_hand(x, qweight, scale, b)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_dense_matches_float64(dtype):
    x, weight, bias = data(17, 33, 70, dtype)
    qweight, scale = quantize_per_channel(weight)
    y = fp8_linear.fp8_linear(x, qweight, scale, bias)
    expected = x.double() @ (qweight.double() * scale.double()[:, None]).t() + bias.double()
    assert y.dtype == dtype and worst_row_error(y, expected) < TOLERANCE[dtype]


def test_scaled_mm_takes_these_arguments():
    """The library's product exists on the CPU too."""
    x, weight, bias = data(17, 32, 64, torch.bfloat16)
    qweight, scale = quantize_per_channel(weight)
    y = fp8_linear._scaled_mm(x, qweight, scale, bias)
    assert worst_row_error(y, by_hand(x, qweight, scale, bias)) < 2 * TOLERANCE[torch.bfloat16]


def test_quantize():
    x = torch.randn(3, 4, 50)
    x[0, 1], x[2, 0] = 0, 1e-30
    q, scale = quantize_per_token(x)
    assert q.dtype == FP8 and scale.shape == (3, 4, 1) and q.float().abs().max() == 448 and (q[0, 1].float() == 0).all()
    assert ((q.float() * scale - x).abs() <= torch.maximum(x.abs() / 15.9, scale / 1000)).all()
    assert torch.equal(quantize_per_channel(x[1])[0].float(), q[1].float())
    assert quantize_per_channel(x[1])[1].shape == (4,)


def test_sqnr_of_gaussian_data():
    x, weight = torch.randn(64, 512), torch.randn(80, 512) * 0.03
    exact = (x.double() @ weight.double().t()).float()
    noise = fp8_linear_ref(x, *quantize_per_channel(weight)) - exact
    assert 20 * torch.log10(exact.norm() / noise.norm()) > 27  # measured: 28.5 dB


def test_layouts_and_empty():
    x, weight, bias = data(6, 5, 40)
    qweight, scale = quantize_per_channel(weight)
    y = fp8_linear.fp8_linear(x, qweight, scale, bias)
    assert torch.equal(fp8_linear.fp8_linear(x.view(2, 3, 40), qweight, scale, bias), y.view(2, 3, 5))
    torch.testing.assert_close(fp8_linear.fp8_linear(x.t().contiguous().t(), qweight, scale, bias), y)
    assert fp8_linear.fp8_linear(x[:0], qweight, scale, bias).shape == (0, 5)


def test_nan_stays_in_its_row(triton_on_cpu):
    x, weight, _ = data(8, 16, 64)
    qweight, scale = quantize_per_channel(weight)
    y = fp8_linear.fp8_linear(x, qweight, scale, path="triton")
    x[3, 5] = float("nan")
    z = fp8_linear.fp8_linear(x, qweight, scale, path="triton")
    keep = torch.arange(8) != 3
    assert z[3].isnan().all() and torch.equal(z[keep], y[keep])


def test_wrong_input_is_refused():
    x, weight, bias = data(6, 5, 40)
    qweight, scale = quantize_per_channel(weight)
    for args, message in [
        ((x, weight, scale), "quantize_per_channel"),
        ((x, qweight, scale[:4]), "quantize_per_channel"),
        ((x[:, 1:], qweight, scale), r"expected x \[..., 40\]"),
        ((x, qweight, scale, bias[1:]), r"bias \[5\]"),
        ((x, qweight, scale, bias, "scaled_mm"), "no candidate 'scaled_mm'"),
    ]:
        with pytest.raises(ValueError, match=message):
            fp8_linear.fp8_linear(*args)


def test_is_chosen_by_measurement(triton_on_cpu, monkeypatch):
    x, weight, _ = data(3, 9, 70)
    quantized = quantize_per_channel(weight)
    state = torch.get_rng_state()
    assert fp8_linear.fp8_linear(x, *quantized).shape == (3, 9)
    (choice,) = choices("fp8_linear")
    assert choice.error["triton"] < 1e-5 < choice.error["dense"] < 0.1
    assert set(choice.seconds) == {"triton", "dense", "baseline"} and torch.equal(torch.get_rng_state(), state)
    monkeypatch.setenv("DIFFACCEL_KERNELS", "fp8_linear=triton")
    assert torch.equal(fp8_linear.fp8_linear(x, *quantized), fp8_linear.fp8_linear(x, *quantized, path="triton"))


@pytest.mark.parametrize(("M", "N", "K"), [(1, 64, 64), (64, 60, 64), (64, 64, 60)])
def test_takes_shapes_that_scaled_mm_refuses(M, N, K, monkeypatch):
    monkeypatch.setattr(fp8_linear, "_paths", lambda device: ("scaled_mm", "triton", "dense"))
    monkeypatch.setattr(fp8_linear, "choose", lambda operator, shape, device, names, *_, **__: "+".join(names))
    names = fp8_linear._resolve(torch.ones(M, K), torch.ones(N, K))
    assert names == ("scaled_mm+triton+dense" if (N, K) == (64, 64) else "triton+dense")


def test_opcheck():
    """All but the schema, whose check compares inputs before and after with an operator that e4m3 lacks."""
    x, weight, bias = data(6, 5, 40)
    qweight, scale = quantize_per_channel(weight)
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for args in [(x.view(2, 3, 40), qweight, scale, bias, "auto"), (x.half(), qweight, scale, None, "dense")]:
        torch.library.opcheck(torch.ops.diffaccel.fp8_linear.default, args, test_utils=tests)


def test_compiles_without_graph_break(triton_on_cpu):
    x, weight, bias = data(6, 5, 40)
    quantized = quantize_per_channel(weight)

    def layer(x):
        return torch.relu(fp8_linear.fp8_linear(x * 2, *quantized, bias, "triton"))

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


def test_fake_tensors_measure_nothing():
    with FakeTensorMode():
        qweight = torch.ones(24, 32, device="cuda").to(FP8)
        x = torch.ones(2, 9, 32, device="cuda", dtype=torch.bfloat16)
        y = fp8_linear.fp8_linear(x, qweight, torch.ones(24, device="cuda"))
        assert y.shape == (2, 9, 24) and y.dtype == torch.bfloat16 and y.device.type == "cuda"
    assert not choices()

"""Static int8 activations: the kernels against the formula, ranges by step, what must be measured first."""

import warnings

import pytest
import torch
from mutants import mutant
from poison import poisoned_outputs, surrounded

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

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFACCEL_CACHE", str(tmp_path))
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

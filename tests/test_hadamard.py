import warnings

import pytest
import torch
from mutants import mutant
from poison import poisoned_outputs, surrounded
from scipy.linalg import hadamard as sylvester
from torch._subclasses.fake_tensor import FakeTensorMode

from diffaccel.kernels import hadamard as module
from diffaccel.kernels import hadamard_quantize as kernel
from diffaccel.kernels._candidates import choices, forget
from diffaccel.kernels.hadamard import block_for, hadamard, hadamard_quantize, hadamard_quantize_ref, hadamard_ref
from diffaccel.kernels.int8_linear import int8_linear_ref, quantize_per_channel, quantize_per_token

# Of the largest magnitude in the row.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    with warnings.catch_warnings():  # NumPy below the interpreter, on infinities
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@pytest.fixture(params=["dense", "triton"])
def path(request, monkeypatch):
    """As it runs on the CPU, and the kernel of CUDA in the interpreter."""
    monkeypatch.setattr(module, "_resolve", lambda *_: request.param)


def data(M, K, dtype=torch.float32):
    """x with an outlying channel, before (signs times a balance), after."""
    x = torch.randn(M, K)
    x[:, K // 3] *= 30
    before = (torch.randint(0, 2, (K,)) * 2 - 1) * (0.5 + torch.rand(K)).bfloat16().float()
    return surrounded(x.to(dtype)), surrounded(before), surrounded(0.5 + torch.rand(K))


def by_hand(x, before, after, block):
    """With the whole matrix of blocks, float64."""
    K = x.shape[-1]
    matrix = torch.block_diag(*[torch.tensor(sylvester(block)).double() / block**0.5] * (K // block))
    x = x if before is None else (x.float() * before).to(x.dtype)
    y = x.double() @ matrix
    return y if after is None else y * after.double()


def close(y, exact, tolerance):
    return ((y.double() - exact).abs() <= tolerance * exact.abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize(("K", "block"), [(1152, 128), (3072, 128), (320, 64), (2240, 64), (72, 8), (7, 1), (1, 1)])
def test_blocks(K, block):
    assert block_for(K) == block


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("K", "block"), [(384, None), (320, None), (320, 16), (72, None), (9, None)])
def test_matches_float64(K, block, dtype):
    x, before, after = data(7, K, dtype)
    for factors in [(None, None), (before, None), (before, after)]:
        exact = by_hand(x, *factors, block or block_for(K))
        y = hadamard(x, *factors, block)
        assert y.dtype == dtype and close(y, exact, TOLERANCE[dtype])
        assert close(hadamard_ref(x, *factors, block or block_for(K)), exact, 1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("M", "K", "block"), [(7, 384, None), (19, 320, None), (1, 48, None), (19, 96, 16)])
def test_quantizes_what_is_rotated(M, K, block, dtype, path):
    x, before, after = data(M, K, dtype)
    for factors in [(None, None), (before, after)]:
        for bits in (8, 7):
            with poisoned_outputs():
                q, scale = hadamard_quantize(x, *factors, block, bits)
            exact = by_hand(x, *factors, block or block_for(K))
            assert q.dtype == torch.int8 and scale.shape == (M, 1)
            torch.testing.assert_close(scale.double(), exact.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1))
            assert (q.double() - exact / scale.double()).abs().max() < 0.5 + 1e-3
            expected, _ = hadamard_quantize_ref(x, *factors, block or block_for(K), bits)
            assert (q != expected).float().mean() < 0.01  # where two are as near


def test_twice_is_nothing_and_products_stay():
    x, before, _ = data(9, 1152)
    signs = before.sign()
    torch.testing.assert_close(hadamard(hadamard(x, signs), None, signs), x, rtol=1e-4, atol=1e-4)
    weight = torch.randn(20, 1152)
    torch.testing.assert_close(hadamard(x, signs) @ hadamard(weight, signs).t(), x @ weight.t(), rtol=1e-3, atol=1e-3)


def test_spreads_outliers():
    """A channel a hundred times as large as the others: alone it decides the steps, rotated it shares them with 127."""
    x, weight = torch.randn(64, 256), torch.randn(32, 256)
    x[:, 5] *= 100
    signs = torch.randint(0, 2, (256,)) * 2.0 - 1
    exact = x.double() @ weight.double().t()

    def sqnr(x, weight):
        y = int8_linear_ref(x, *quantize_per_channel(weight)).double()
        return float(20 * torch.log10(exact.norm() / (y - exact).norm()))

    weight[:, 5] = 0.01 * torch.randn(32)  # else its product hides what the others lose
    exact = x.double() @ weight.double().t()
    assert sqnr(hadamard(x, signs), hadamard(weight, signs)) > sqnr(x, weight) + 6  # measured: 17.4
    q, scale = hadamard_quantize(x, signs)
    product = q.double() @ hadamard(weight, signs).double().t() * scale
    assert 20 * torch.log10(exact.norm() / (product - exact).norm()) > sqnr(x, weight) + 6


def test_broken_rows_stay_apart(path):
    x, before, after = data(9, 128)
    q, scale = hadamard_quantize(x, before, after)
    x[3, 5], x[4, 6], x[5] = torch.nan, torch.inf, 0
    other_q, other_scale = hadamard_quantize(x, before, after)
    keep = torch.tensor([0, 1, 2, 6, 7, 8])
    assert torch.equal(other_q[keep], q[keep]) and torch.equal(other_scale[keep], scale[keep])
    assert not other_scale[3:5].isfinite().any() and (other_q[5] == 0).all() and other_scale[5].isfinite()


def test_layouts_and_empty(path):
    x, before, after = data(6, 64)
    q, scale = hadamard_quantize(x, before, after)
    arranged = x.t().contiguous().t()
    assert torch.equal(hadamard_quantize(arranged, before, after)[0], q)
    three = hadamard_quantize(x.view(2, 3, 64), before, after)
    assert torch.equal(three[0], q.view(2, 3, 64)) and torch.equal(three[1], scale.view(2, 3, 1))
    assert torch.equal(hadamard(x.view(2, 3, 64)), hadamard(x).view(2, 3, 64))
    assert torch.equal(hadamard(arranged), hadamard(x)) and hadamard(x[:0]).shape == (0, 64)
    assert [t.shape for t in hadamard_quantize(x[:0])] == [(0, 64), (0, 1)]


def test_parts_are_the_same(monkeypatch):
    x, before, after = data(9, 64)
    whole = hadamard(x, before, after), *hadamard_quantize(x, before, after)
    monkeypatch.setattr(module, "_CHUNK", 200)
    for one, other in zip(whole, (hadamard(x, before, after), *hadamard_quantize(x, before, after)), strict=True):
        torch.testing.assert_close(one, other)


def test_wrong_input_is_refused():
    x, before, after = data(4, 96)
    for arguments in [(x, None, None, 64), (x, None, None, 3), (x, None, None, 0), (x[:, :0],)]:
        for function in (hadamard, hadamard_quantize):
            with pytest.raises(ValueError, match="power of two and divides K"):
                function(*arguments)
    with pytest.raises(ValueError, match=r"before and after \[96\]"):
        hadamard(x, before[1:], after)


def test_opcheck_and_compile(path):
    x, before, after = data(6, 64)
    for op, rest in ((torch.ops.diffaccel.hadamard, (64,)), (torch.ops.diffaccel.hadamard_quantize, (32, 8))):
        torch.library.opcheck(op.default, (x.view(2, 3, 64), before, after, *rest))

    def layer(x):
        q, scale = hadamard_quantize(x * 2, before)
        return hadamard(x, None, after) + q * scale

    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_is_chosen_by_measurement(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFACCEL_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "_has_kernel", lambda x: True)
    forget()
    x, before, _ = data(5, 64)
    state = torch.get_rng_state()
    q, _ = hadamard_quantize(x, before)
    (choice,) = choices("hadamard_quantize")
    assert set(choice.seconds) == {"triton", "dense", "baseline"} and max(choice.error.values()) < 0.02
    assert torch.equal(torch.get_rng_state(), state) and q.shape == (5, 64)
    hadamard_quantize(x, before, None, 8)  # too small for the kernel
    assert len(choices("hadamard_quantize")) == 1
    forget()


def test_fake():
    with FakeTensorMode():
        x = torch.ones(2, 9, 64, device="cuda", dtype=torch.bfloat16)
        q, scale = hadamard_quantize(x)
        assert q.shape == x.shape and q.dtype == torch.int8 and scale.shape == (2, 9, 1) and scale.device.type == "cuda"
        assert hadamard(x).dtype == torch.bfloat16


FAULTS = [
    # a bound or a mask
    ("tl.minimum(m, M - 1)", "tl.minimum(m, M - 2)"),
    ("tl.store(row_scale_ptr + m, row_scale, mask=m < M)", "tl.store(row_scale_ptr + m, row_scale)"),
    ("q_ptr + row + (start + k)", "q_ptr + row + (0 * start + k)"),
    ("& 0x7FFFFFFF, axis=1))\n", "& 0x7FFFFFFF, axis=1))\n        break\n"),
    # a wrong matrix, part or factor
    ("common ^= common >> 4", "common ^= common >> 5"),
    ("common ^= common >> 1", "common ^= common >> 3"),
    ("(x - middle.to(tl.float32)).to(tl.bfloat16)", "middle"),
    ("tl.load(before_ptr + k)", "tl.load(before_ptr + 0 * k)"),
    ("y * tl.load(after_ptr + k)", "tl.load(after_ptr + k)"),
    ("y *= BLOCK**-0.5", "y *= 1.01 * BLOCK**-0.5"),
]


def check_kernel(launch):
    x, before, after = data(19, 96)
    with poisoned_outputs():
        q, scale = (
            torch.empty((19, 96), dtype=torch.int8, device="cpu"),
            torch.empty((19, 1), dtype=torch.float32, device="cpu"),
        )
        launch(x, before, after, 32, 8, q, scale)
    expected, expected_scale = quantize_per_token(by_hand(x, before, after, 32).float())
    torch.testing.assert_close(scale, expected_scale)
    assert (q != expected).float().mean() < 0.01


@pytest.mark.parametrize(("right", "wrong"), FAULTS)
def test_planted_faults_are_noticed(right, wrong):
    with mutant(kernel, right, wrong) as copy, pytest.raises(AssertionError):
        check_kernel(copy.launch)


def test_the_check_itself_passes():
    check_kernel(kernel.launch)

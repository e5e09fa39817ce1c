import warnings

import pytest
import torch
from mutants import mutant
from poison import poisoned_outputs, surrounded
from torch._subclasses.fake_tensor import FakeTensorMode

from diffaccel.kernels import int8_linear, token_quantize
from diffaccel.kernels.token_quantize import QMAX, token_quantize_ref

FP8 = torch.float8_e4m3fn
# Relative error of the row scales against float64, for each dtype of x: all computation is in float32.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2e-6}
LENGTHS = [1, 7, 64, 1024, 1031]
# dtype of x, output, modulation, LayerNorm with weight and bias, with shift
FUSED = [(dtype, to, "slices", True, True) for dtype in TOLERANCE for to in QMAX]
FUSED += [(torch.bfloat16, torch.int8, "none", affine, False) for affine in (False, True)]
FUSED += [(torch.float16, torch.int8, "[B, K]", False, True), (torch.float32, FP8, "[B, 1, K]", True, False)]
FUSED += [(torch.bfloat16, FP8, "[B, S, K]", False, True)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    with warnings.catch_warnings():  # NumPy below the interpreter, on rows of NaN
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def data(M, K, dtype):
    """Rows: gaussian, positive, negative, nearly constant, zero, tiny."""
    x = torch.randn(M, K)
    x[1::6] = x[1::6].abs()
    x[2::6] = -x[2::6].abs()
    x[3::6] = 1 + 0.1 * x[3::6]
    x[4::6] = 0
    x[5::6] *= 1e-6
    return x.to(dtype)


def quantized(module, x, dtype=torch.int8, *args, **kwargs):
    with poisoned_outputs():
        return module.token_quantize(surrounded(x), dtype, *args, **kwargs)


def check_plain(module, K, dtype, to):
    """Bit for bit the reference, which for int8 is `int8_linear.quantize_per_token`."""
    x = data(6, K, dtype)
    q, scale = quantized(module, x, to)
    expected = token_quantize_ref(x, to)
    assert q.dtype == to and scale.dtype == torch.float32
    assert torch.equal(q.float(), expected[0].float()) and torch.equal(scale, expected[1])
    if to == torch.int8:
        assert all(map(torch.equal, (q, scale), int8_linear.quantize_per_token(x)))


def check_fused(module, K, dtype, to, modulation, affine, shifted):
    """y from float64; q may be off by the rounding, half a step, and not more."""
    B, S, eps = 2, 2, 1e-3
    x = data(B * S, K, dtype).view(B, S, K)
    weight, bias = (surrounded(torch.randn(K)), surrounded(torch.randn(K).to(dtype))) if affine else (None, None)
    shape = {"none": None, "[B, K]": (B, K), "[B, 1, K]": (B, 1, K), "[B, S, K]": (B, S, K), "slices": (B, 3 * K)}
    shape = shape[modulation]
    scale, shift = (None if shape is None else surrounded(torch.randn(shape).to(dtype)) for _ in range(2))
    if modulation == "slices":
        scale, shift = scale.chunk(3, dim=1)[1], shift.chunk(3, dim=1)[2]
    shift = shift if shifted else None
    q, row_scale = quantized(module, x, to, eps, weight, bias, scale, shift)

    y = x.double()
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
    if affine:
        y = y * weight.double() + bias.double()
    scale, shift = (m if m is None or m.ndim == 3 else m[:, None] for m in (scale, shift))
    y = y if scale is None else y * (1 + scale.double())
    y = y if shift is None else y + shift.double()
    expected = (y.abs().amax(-1, keepdim=True) / QMAX[to]).clamp(min=2.0**-100)
    close = TOLERANCE[dtype] * expected + 5e-6 / QMAX[to]  # nearly constant rows: x - mean has few bits
    assert ((row_scale - expected).abs() <= close).all()
    step = expected / 2 if to == torch.int8 else torch.maximum(y.abs() / 16, expected / 1024)
    assert ((q.double() * row_scale - y).abs() <= 1.0001 * step + 5e-6).all()


def check(module, monkeypatch):
    """Short and long rows, alone and fused; what the planted faults must not pass."""
    check_plain(module, 100, torch.float32, torch.int8)
    check_fused(module, 100, torch.float32, torch.int8, "slices", False, True)
    as_long_rows(module, monkeypatch)
    check_plain(module, 100, torch.float32, FP8)
    check_fused(module, 100, torch.float32, torch.int8, "slices", False, True)


def as_long_rows(module, monkeypatch):
    monkeypatch.setattr(module, "ROW", ())
    monkeypatch.setattr(module, "LONG_ROW", module.Config({"BLOCK_K": 64}, warps=1, stages=1))


@pytest.mark.parametrize("to", QMAX, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_reference(dtype, to, monkeypatch):
    for K in LENGTHS:
        check_plain(token_quantize, K, dtype, to)
    as_long_rows(token_quantize, monkeypatch)
    for K in (65, 128):
        check_plain(token_quantize, K, dtype, to)


@pytest.mark.parametrize("case", FUSED, ids=str)
def test_fused_matches_float64(case, monkeypatch):
    for K in (1, 33, 128):
        check_fused(token_quantize, K, *case)
    as_long_rows(token_quantize, monkeypatch)
    check_fused(token_quantize, 100, *case)


def test_longer_than_registers():
    assert token_quantize.config_for(15360).tiles["BLOCK_K"] == 16384
    assert token_quantize.config_for(24576) is token_quantize.LONG_ROW  # FLUX.2's longest
    check_plain(token_quantize, 16385, torch.bfloat16, torch.int8)


def test_ties_go_to_even():
    x = torch.tensor([[127, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 125.5]])
    q, scale = quantized(token_quantize, x)
    assert scale.item() == 1 and q.tolist() == [[127, 0, 2, 2, 0, -2, 126, 126]]
    x = torch.tensor([[448, 17, 19, -17, 0.5, 2.0**-10, 3 * 2.0**-10, 31.5, 247.9, 0.0146]])
    q, scale = quantized(token_quantize, x, FP8)
    assert scale.item() == 1 and q[0, :4].tolist() == [448, 16, 20, -16] and torch.equal(q.float(), x.to(FP8).float())


@pytest.mark.parametrize("to", QMAX, ids=str)
def test_rows_that_are_not_finite(to):
    x = torch.randn(5, 50)
    clean = quantized(token_quantize, x, to)
    x[1, 7], x[3, 0], x[3, 1] = float("nan"), float("inf"), float("nan")
    x[4, 9] = -float("inf")
    q, scale = quantized(token_quantize, x, to)
    assert scale[1].isnan() and scale[3].isnan() and scale[4].isinf()
    assert (q.float()[[1, 3, 4]] == 0).all()
    for a, b in zip((q, scale), clean, strict=True):
        assert torch.equal(a.float()[[0, 2]], b.float()[[0, 2]])
    torch.testing.assert_close(token_quantize_ref(x, to)[1], scale, equal_nan=True, rtol=0, atol=0)


def test_layouts_and_empty():
    x = torch.randn(2, 3, 20)
    q, scale = token_quantize.token_quantize(x)
    wide = torch.randn(2, 3, 40)
    wide[..., ::2] = x
    for same in (wide[..., ::2], x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert all(map(torch.equal, token_quantize.token_quantize(same), (q, scale)))
    assert all(map(torch.equal, token_quantize.token_quantize(x[0, 0]), (q[0, 0], scale[0, 0])))
    q, scale = token_quantize.token_quantize(x[:, :0], FP8)
    assert q.shape == (2, 0, 20) and q.dtype == FP8 and scale.shape == (2, 0, 1)


def test_signal_to_noise():
    x = torch.randn(16, 1024)
    for to, least in ((torch.int8, 40), (FP8, 31)):  # measured: 42 and 32 dB
        q, scale = token_quantize.token_quantize(x, to)
        assert 20 * torch.log10(x.norm() / (q.float() * scale - x).norm()) > least


def test_wrong_input_is_refused():
    x = torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match="int8"):
        token_quantize.token_quantize(x, torch.int16)
    with pytest.raises(ValueError, match=r"weight and bias \[8\]"):
        token_quantize.token_quantize(x, weight=torch.ones(7))
    for shape in [(3, 8), (2, 2, 8), (2, 7), (2, 3, 2, 8)]:
        with pytest.raises(ValueError, match="scale and shift"):
            token_quantize.token_quantize(x, scale=torch.ones(shape))


def test_opcheck():
    op = torch.ops.diffaccel.token_quantize.default
    x, m = torch.randn(1, 2, 20), torch.randn(1, 20)
    for args in [(x.half(), torch.int8, None, *[None] * 4), (x, FP8, 1e-6, m[0], m[0], m, m)]:
        torch.library.opcheck(op, args)


def test_compiles_without_graph_break():
    def block(x, scale, shift):
        q, row_scale = token_quantize.token_quantize(x * 2, torch.int8, 1e-6, scale=scale, shift=shift)
        return q.float() * row_scale

    x, scale, shift = torch.randn(2, 3, 20), torch.randn(2, 20), torch.randn(2, 20)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, scale, shift), block(x, scale, shift))


def test_without_triton_and_fake(monkeypatch):
    x = torch.randn(3, 20)
    with_triton = token_quantize.token_quantize(x)
    monkeypatch.setattr(token_quantize, "runs_triton", lambda x: False)
    assert all(map(torch.equal, token_quantize.token_quantize(x), with_triton))
    with FakeTensorMode():
        q, scale = token_quantize.token_quantize(torch.ones(2, 9, 32, device="cuda"), FP8)
    assert q.shape == (2, 9, 32) and q.dtype == FP8 and scale.shape == (2, 9, 1) and scale.device.type == "cuda"


FAULTS = [
    # an off-by-one bound
    ("keep = k < K\n    y = _row(", "keep = k < K - 1\n    y = _row("),
    ("total += _row(x_ptr, k, k < K)", "total += _row(x_ptr, k, k < K - 1)"),
    ("largest = tl.maximum(largest, _largest(y))", "largest = _largest(y)"),
    # a missing mask
    ("tl.load(ptr + k, mask=keep, other=0.0)", "tl.load(ptr + k)"),
    ("tl.store(q_ptr + k, q, mask=keep)", "tl.store(q_ptr + k, q)"),
    ("tl.where(keep, y - tl.sum(y) / K, 0.0)", "y - tl.sum(y) / K"),
    ("tl.where(k < K, _row(x_ptr, k, k < K) - mean, 0.0)", "_row(x_ptr, k, k < K) - mean"),
    # a wrong scale or place
    ("tl.div_rn(magnitude, QMAX)", "tl.div_rn(magnitude, QMAX + 1)"),
    ("row // tokens * stride", "row * stride"),
    ("y *= 1 + _row(scale_ptr", "y *= _row(scale_ptr"),
    ("tl.sum(total) / K", "tl.sum(total) / BLOCK_K"),
    ("& 0x7FFFFFFF)", "& 0x7FFFFFF0)"),
    ("round_even(q).to(tl.int8)", "q.to(tl.int8)"),
]


@pytest.mark.parametrize(("right", "wrong"), FAULTS)
def test_planted_faults_are_noticed(right, wrong, monkeypatch):
    with mutant(token_quantize, right, wrong) as module, pytest.raises(AssertionError):
        check(module, monkeypatch)


def test_the_check_itself_passes(monkeypatch):
    check(token_quantize, monkeypatch)

import warnings

import pytest
import torch
from mutants import mutant
from poison import poisoned_outputs, surrounded
from torch._subclasses.fake_tensor import FakeTensorMode

from diffaccel.kernels import fp8_gemm, int8_gemm, token_quantize
from diffaccel.kernels.ahead_of_time import SHARED_KIB
from diffaccel.kernels.fp8_gemm import MANY_TILES, config_for, fp8_gemm_ref

FP8 = torch.float8_e4m3fn
# Of sum|products| * scales + |bias|: float32 sums up to 300 products, then the result is rounded.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}
SHAPES = [(1, 1, 1), (5, 7, 3), (16, 32, 256), (17, 33, 70), (64, 128, 128), (65, 129, 257)]  # M, N, K
SMALL = int8_gemm.Config({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32}, warps=1, stages=1)
CONFIGS = [*int8_gemm.FEW_ROWS.values(), int8_gemm.FEW_TILES, MANY_TILES[89]]


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    with warnings.catch_warnings():  # NumPy below the interpreter, on infinities
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def rows(count, K):
    """e4m3 [count, K]. Rows: gaussian, 448, -448, nearly constant, so small that they are subnormal, zero."""
    q = torch.randn(count, K) * 100
    q[1::6], q[2::6], q[5::6] = 448, -448, 0
    q[3::6] = 400 + 20 * torch.rand(K)
    q[4::6] = torch.randn(K) * 2.0**-8
    return surrounded(q.clamp(-448, 448).to(FP8))


def operands(M, N, K, dtype=torch.float32):
    """q, weight, row scale, scale, bias."""
    scales = (surrounded(0.001 + 0.004 * torch.rand(shape)) for shape in ((M, 1), (N,)))
    return rows(M, K), rows(N, K), *scales, surrounded(torch.randn(N).to(dtype))


def check(module, M, N, K, dtype=torch.float32, with_bias=True):
    q, weight, row_scale, scale, bias = operands(M, N, K, dtype)
    bias = bias if with_bias else None
    with poisoned_outputs():
        y = module.fp8_gemm(q, weight, row_scale, scale, bias, dtype)
    assert y.dtype == dtype and y.shape == (M, N)
    scales = scale.double() * row_scale.double()
    product = (q.double() @ weight.double().t()) * scales
    bias = torch.zeros(N) if bias is None else bias
    allowed = TOLERANCE[dtype] * ((q.double().abs() @ weight.double().abs().t()) * scales + bias.double().abs()) + 1e-7
    assert ((y.double() - product - bias.double()).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_matches_float64(M, N, K, dtype):
    check(fp8_gemm, M, N, K, dtype)
    check(fp8_gemm, M, N, K, dtype, with_bias=False)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_configuration(config, monkeypatch):
    monkeypatch.setattr(fp8_gemm, "config_for", lambda *_: config)
    check(fp8_gemm, 19, 130, 300, torch.bfloat16)
    monkeypatch.setattr(fp8_gemm, "short_sums", lambda capability: False)
    check(fp8_gemm, 19, 130, 300, torch.bfloat16)


def test_groups_of_tiles(monkeypatch):
    """19 rows and 3 columns of tiles: two whole groups and a part."""
    monkeypatch.setattr(fp8_gemm, "config_for", lambda *_: SMALL)
    check(fp8_gemm, 16 * 18 + 1, 33, 40)


def test_not_finite_scales_stay_in_their_row():
    q, weight, row_scale, scale, bias = operands(6, 5, 40)
    clean = fp8_gemm.fp8_gemm(q, weight, row_scale, scale, bias)
    q[2], row_scale[2] = 0, float("inf")
    y = fp8_gemm.fp8_gemm(q, weight, row_scale, scale, bias)
    keep = torch.arange(6) != 2
    assert y[2].isnan().all() and torch.equal(y[keep], clean[keep])


def test_layouts_and_empty():
    q, weight, row_scale, scale, bias = operands(6, 5, 40)
    y = fp8_gemm.fp8_gemm(q, weight, row_scale, scale, bias)
    arranged = q.view(2, 3, 40), weight.t().contiguous().t(), row_scale.view(2, 3, 1), scale, bias
    assert torch.equal(fp8_gemm.fp8_gemm(*arranged), y.view(2, 3, 5))
    assert torch.equal(fp8_gemm.fp8_gemm(q[0], weight, row_scale[0], scale, bias), y[0])
    assert fp8_gemm.fp8_gemm(q[:0], weight, row_scale[:0], scale, bias).shape == (0, 5)


def test_wrong_input_is_refused():
    q, weight, row_scale, scale, _ = operands(6, 5, 40)
    with pytest.raises(ValueError, match=r"expected q \[..., K\]"):
        fp8_gemm.fp8_gemm(q[:, 1:], weight, row_scale, scale)
    with pytest.raises(ValueError, match="e4m3fn, row_scale and scale float32"):
        fp8_gemm.fp8_gemm(q, weight.float(), row_scale, scale)


def test_configurations():
    assert config_for(512, 3072, 3072, 90) is int8_gemm.FEW_TILES  # text tokens of FLUX
    for capability, known in ((89, 89), (90, 90), (103, 100), (121, 120)):
        assert config_for(4608, 3072, 3072, capability) is MANY_TILES[known]
    for capability, config in MANY_TILES.items():
        M, N, K = (config.tiles[f"BLOCK_{side}"] for side in "MNK")
        assert config.stages * (M + N) * K < SHARED_KIB[capability] * 1024


def test_opcheck():
    """All but the schema, whose check compares inputs before and after with an operator that e4m3 lacks."""
    op = torch.ops.diffaccel.fp8_gemm.default
    q, weight, row_scale, scale, bias = operands(4, 5, 40)
    for args in [
        (q, weight, row_scale, scale, bias, torch.float16),
        (q.view(2, 2, 40), weight, row_scale.view(2, 2, 1), scale, None, torch.float32),
    ]:
        before = [q.float(), weight.float(), row_scale.clone()]
        tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(op, args, test_utils=tests)
        assert all(map(torch.equal, (q.float(), weight.float(), row_scale), before))


def test_compiles_without_graph_break():
    def layer(x, weight, scale, bias):
        q, row_scale = token_quantize.token_quantize(x * 2, FP8)
        return torch.relu(fp8_gemm.fp8_gemm(q, weight, row_scale, scale, bias, x.dtype))

    _, weight, _, scale, bias = operands(4, 5, 40)
    x = torch.randn(2, 3, 40)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, scale, bias), layer(x, weight, scale, bias))


def test_without_triton_and_fake(monkeypatch):
    q, weight, row_scale, scale, bias = operands(4, 5, 40)
    y = fp8_gemm.fp8_gemm(q, weight, row_scale, scale, bias, torch.float32)
    monkeypatch.setattr(fp8_gemm, "runs_here", lambda *_: False)
    reference = fp8_gemm.fp8_gemm(q, weight, row_scale, scale, bias, torch.float32)
    assert torch.equal(reference, fp8_gemm_ref(q, weight, row_scale, scale, bias, torch.float32))
    torch.testing.assert_close(y, reference, rtol=1e-5, atol=1e-4)
    with FakeTensorMode():
        q, weight = (torch.ones(shape, device="cuda").to(FP8) for shape in ((2, 9, 32), (24, 32)))
        y = fp8_gemm.fp8_gemm(q, weight, torch.ones(2, 9, 1, device="cuda"), torch.ones(24, device="cuda"))
    assert y.shape == (2, 9, 24) and y.dtype == torch.bfloat16 and y.device.type == "cuda"


FAULTS = [
    # an off-by-one bound
    ("keep = k < K - start", "keep = k < K - start - 1"),
    ("tl.minimum(m, M - 1)", "tl.minimum(m, M - 2)"),
    ("mask=m < M, other=0.0", "mask=m < M - 1, other=0.0"),
    # a missing mask
    ("keep = k < K - start", "keep = k < K"),
    ("mask=(m < M)[:, None] & (n < N)[None, :]", "mask=(n < N)[None, :]"),
    ("mask=(m < M)[:, None] & (n < N)[None, :]", "mask=(m < M)[:, None]"),
    # a wrong scale or sum
    (" * scale[None, :] * row_scale[:, None]", " * scale[None, :]"),
    ("acc += tl.dot(", "acc = tl.dot("),
    ("y += tl.load(bias_ptr + n", "y -= tl.load(bias_ptr + n"),
]


def check_in_tiles(module, monkeypatch):
    monkeypatch.setattr(module, "config_for", lambda *_: SMALL)
    check(module, 39, 20, 50)


@pytest.mark.parametrize(("right", "wrong"), FAULTS)
def test_planted_faults_are_noticed(right, wrong, monkeypatch):
    with mutant(fp8_gemm, right, wrong) as module, pytest.raises(AssertionError):
        check_in_tiles(module, monkeypatch)


def test_the_check_itself_passes(monkeypatch):
    check_in_tiles(fp8_gemm, monkeypatch)

import subprocess
import warnings

import pytest
import torch
from mutants import mutant
from poison import poisoned_outputs, surrounded
from torch._subclasses.fake_tensor import FakeTensorMode

from diffaccel.kernels import int8_gemm, int8_linear, token_quantize
from diffaccel.kernels._candidates import choices, forget, worst_row_error
from diffaccel.kernels.ahead_of_time import SHARED_KIB
from diffaccel.kernels.int8_gemm import MANY_TILES, config_for, int8_gemm_ref

# Of |sum| * scales + |bias|: the sum is exact, what remains is three roundings in float32 and that of the result.
TOLERANCE = {torch.float32: 3e-7, torch.float16: 6e-4, torch.bfloat16: 4e-3}
SHAPES = [(1, 1, 1), (5, 7, 3), (16, 32, 256), (17, 33, 70), (64, 128, 128), (65, 129, 257)]  # M, N, K
SMALL = int8_gemm.Config({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32}, warps=1, stages=1)
CONFIGS = [*int8_gemm.FEW_ROWS.values(), int8_gemm.FEW_TILES, MANY_TILES[89], MANY_TILES[90]]


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    forget()
    with warnings.catch_warnings():  # NumPy below the interpreter, on infinities
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
    forget()


def rows(count, K):
    """int8 [count, K]. Rows: gaussian, 127, -127, nearly constant, zero."""
    q = (torch.randn(count, K) * 40).clamp(-127, 127)
    q[1::5], q[2::5], q[4::5] = 127, -127, 0
    q[3::5] = 125 + 2 * torch.rand(K).round()
    return surrounded(q.to(torch.int8))


def operands(M, N, K, dtype=torch.float32):
    """q, weight, row scale, scale, bias."""
    scales = (surrounded(0.005 + 0.02 * torch.rand(shape)) for shape in ((M, 1), (N,)))
    return rows(M, K), rows(N, K), *scales, surrounded(torch.randn(N).to(dtype))


def check(module, M, N, K, dtype=torch.float32, with_bias=True):
    q, weight, row_scale, scale, bias = operands(M, N, K, dtype)
    bias = bias if with_bias else None
    with poisoned_outputs():
        y = module.int8_gemm(q, weight, row_scale, scale, bias, dtype)
    assert y.dtype == dtype and y.shape == (M, N)
    product = (q.double() @ weight.double().t()) * scale.double() * row_scale.double()
    bias = torch.zeros(N) if bias is None else bias
    allowed = TOLERANCE[dtype] * (product.abs() + bias.double().abs()) + 1e-7
    assert ((y.double() - product - bias.double()).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_matches_float64(M, N, K, dtype):
    check(int8_gemm, M, N, K, dtype)
    check(int8_gemm, M, N, K, dtype, with_bias=False)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_configuration(config, monkeypatch):
    monkeypatch.setattr(int8_gemm, "config_for", lambda *_: config)
    check(int8_gemm, 19, 130, 300, torch.bfloat16)


def test_groups_of_tiles(monkeypatch):
    """19 rows and 3 columns of tiles: two whole groups and a part."""
    monkeypatch.setattr(int8_gemm, "config_for", lambda *_: SMALL)
    check(int8_gemm, 16 * 18 + 1, 33, 40)


@pytest.mark.parametrize("K", [130, 2048])
def test_sums_are_exact(K):
    """Beyond 2**24 too, where float32 no longer holds every integer."""
    q, weight = rows(10, K), rows(9, K)
    y = int8_gemm.int8_gemm(q, weight, torch.ones(10, 1), torch.ones(9), dtype=torch.float32)
    exact = (q[:, None].int() * weight[None].int()).sum(-1)
    assert exact.max() == 127 * 127 * K and torch.equal(y, exact.float())


def test_not_finite_scales_stay_in_their_row():
    q, weight, row_scale, scale, bias = operands(6, 5, 40)
    clean = int8_gemm.int8_gemm(q, weight, row_scale, scale, bias)
    q[2], row_scale[2] = 0, float("inf")
    y = int8_gemm.int8_gemm(q, weight, row_scale, scale, bias)
    keep = torch.arange(6) != 2
    assert y[2].isnan().all() and torch.equal(y[keep], clean[keep])


def test_layouts_and_empty():
    q, weight, row_scale, scale, bias = operands(6, 5, 40)
    y = int8_gemm.int8_gemm(q, weight, row_scale, scale, bias)
    arranged = q.view(2, 3, 40), weight.t().contiguous().t(), row_scale.view(2, 3, 1), scale, bias
    assert torch.equal(int8_gemm.int8_gemm(*arranged), y.view(2, 3, 5))
    assert torch.equal(int8_gemm.int8_gemm(q[0], weight, row_scale[0], scale, bias), y[0])
    assert int8_gemm.int8_gemm(q[:0], weight, row_scale[:0], scale, bias).shape == (0, 5)


def test_wrong_input_is_refused():
    q, weight, row_scale, scale, _ = operands(6, 5, 40)
    for wrong in [
        (q[:, 1:], weight, row_scale, scale),
        (q, weight, row_scale[:, 0], scale),
        (q, weight[0], row_scale, scale),
    ]:
        with pytest.raises(ValueError, match=r"expected q \[..., K\]"):
            int8_gemm.int8_gemm(*wrong)
    with pytest.raises(ValueError, match=r"torch.int8, row_scale and scale float32"):
        int8_gemm.int8_gemm(q.float(), weight, row_scale, scale)
    with pytest.raises(ValueError, match="at most K = 131071"):
        int8_gemm.int8_gemm(torch.ones(1, 2**17).char(), torch.ones(1, 2**17).char(), torch.ones(1, 1), torch.ones(1))


def test_configurations():
    assert config_for(16, 18432, 3072, 90).tiles["BLOCK_M"] == 16  # modulation
    assert config_for(17, 3072, 3072, 90).tiles["BLOCK_M"] == 32
    assert config_for(512, 3072, 3072, 90) is int8_gemm.FEW_TILES  # text tokens of FLUX
    assert config_for(4608, 3072, 3080, 90) is int8_gemm.ODD_ROWS
    for capability, known in ((80, 80), (86, 80), (89, 89), (90, 90), (103, 100), (121, 120)):
        assert config_for(4608, 3072, 3072, capability) is MANY_TILES[known]
    for capability, many in MANY_TILES.items():
        for config in (*int8_gemm.FEW_ROWS.values(), int8_gemm.FEW_TILES, many):
            M, N, K = (config.tiles[f"BLOCK_{side}"] for side in "MNK")
            assert config.stages * (M + N) * K < SHARED_KIB[capability] * 1024


def test_opcheck():
    op = torch.ops.diffaccel.int8_gemm.default
    q, weight, row_scale, scale, bias = operands(4, 5, 40)
    torch.library.opcheck(op, (q, weight, row_scale, scale, bias, torch.float16))
    torch.library.opcheck(op, (q.view(2, 2, 40), weight, row_scale.view(2, 2, 1), scale, None, torch.float32))


def test_compiles_without_graph_break():
    def layer(x, weight, scale, bias):
        q, row_scale = token_quantize.token_quantize(x * 2)
        return torch.relu(int8_gemm.int8_gemm(q, weight, row_scale, scale, bias, x.dtype))

    _, weight, _, scale, bias = operands(4, 5, 40)
    x = torch.randn(2, 3, 40)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, scale, bias), layer(x, weight, scale, bias))


def test_without_triton_and_fake(monkeypatch):
    q, weight, row_scale, scale, bias = operands(4, 5, 40)
    y = int8_gemm.int8_gemm(q, weight, row_scale, scale, bias, torch.float32)
    monkeypatch.setattr(int8_gemm, "runs_here", lambda *_: False)
    reference = int8_gemm.int8_gemm(q, weight, row_scale, scale, bias, torch.float32)
    assert torch.equal(reference, int8_gemm_ref(q, weight, row_scale, scale, bias, torch.float32))
    torch.testing.assert_close(y, reference)
    with FakeTensorMode():
        q, weight = torch.ones(2, 9, 32, device="cuda").char(), torch.ones(24, 32, device="cuda").char()
        y = int8_gemm.int8_gemm(q, weight, torch.ones(2, 9, 1, device="cuda"), torch.ones(24, device="cuda"))
    assert y.shape == (2, 9, 24) and y.dtype == torch.bfloat16 and y.device.type == "cuda"


FAULTS = [
    # an off-by-one bound
    ("keep = k < K - start", "keep = k < K - start - 1"),
    ("tl.minimum(m, M - 1)", "tl.minimum(m, M - 2)"),
    ("mask=m < M, other=0.0", "mask=m < M - 1, other=0.0"),
    ("range(0, K, BLOCK_K)", "range(0, K - BLOCK_K, BLOCK_K)"),
    # a missing mask
    ("keep = k < K - start", "keep = k < K"),
    ("mask=(m < M)[:, None] & (n < N)[None, :]", "mask=(n < N)[None, :]"),
    ("mask=(m < M)[:, None] & (n < N)[None, :]", "mask=(m < M)[:, None]"),
    # a wrong scale or place
    (" * scale[None, :] * row_scale[:, None]", " * scale[None, :]"),
    ("y += tl.load(bias_ptr + n", "y -= tl.load(bias_ptr + n"),
    ("tile % height) * BLOCK_M", "tile % 8) * BLOCK_M"),
]


def check_in_tiles(module, monkeypatch):
    monkeypatch.setattr(module, "config_for", lambda *_: SMALL)
    check(module, 39, 20, 50)


@pytest.mark.parametrize(("right", "wrong"), FAULTS)
def test_planted_faults_are_noticed(right, wrong, monkeypatch):
    with mutant(int8_gemm, right, wrong) as module, pytest.raises(AssertionError):
        check_in_tiles(module, monkeypatch)


def test_the_check_itself_passes(monkeypatch):
    check_in_tiles(int8_gemm, monkeypatch)


class TestInTheLinearLayer:
    """Kernels that run in the interpreter take the place of a GPU's."""

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    def test_matches_the_definition(self, dtype):
        x, weight = int8_linear.saturating_data(6, 70, 9, torch.device("cpu"))
        qweight, scale = int8_linear.quantize_per_channel(weight)
        x, bias = x.to(dtype), torch.randn(9)
        y = int8_linear._RUN["triton"](x, qweight, scale, bias, 8)
        assert worst_row_error(y, int8_linear.int8_linear_ref(x, qweight, scale, bias)) < 2 * TOLERANCE[dtype]

    def test_is_chosen_by_measurement(self, monkeypatch):
        monkeypatch.setattr(int8_linear, "_paths", lambda device: ("triton", "dense"))
        packed = int8_linear.pack(*int8_linear.quantize_per_channel(torch.randn(9, 70)))
        y = int8_linear.int8_linear(torch.randn(3, 70), packed)
        (choice,) = choices("int8_linear")
        assert y.shape == (3, 9) and choice.error["triton"] < 1e-5 and set(choice.seconds) > {"triton", "dense"}

    @pytest.mark.parametrize(("M", "N", "K"), [(16, 64, 64), (17, 64, 64), (64, 60, 64), (64, 64, 60)])
    def test_takes_shapes_that_int_mm_refuses(self, M, N, K, monkeypatch):
        monkeypatch.setattr(int8_linear, "has_triton", lambda device, capability: True)
        monkeypatch.setattr(int8_linear, "choose", lambda operator, shape, device, names, *_, **__: "+".join(names))
        with FakeTensorMode():
            x, weight = torch.ones(M, K, device="cuda"), torch.ones(N, K, device="cuda").char()
            int_mm = "int_mm+" if (M, N, K) == (17, 64, 64) else ""
            assert int8_linear._resolve(x, weight, 8) == int_mm + "triton+dense"

    def test_what_triton_raises_disqualifies_it(self, monkeypatch, tmp_path):
        def broken(*_):
            raise subprocess.CalledProcessError(1, "cc")

        monkeypatch.setenv("DIFFACCEL_CACHE", str(tmp_path))  # nothing is known of this shape
        monkeypatch.setattr(int8_linear, "_paths", lambda device: ("triton", "dense"))
        monkeypatch.setitem(int8_linear._RUN, "triton", broken)
        packed = int8_linear.pack(*int8_linear.quantize_per_channel(torch.randn(13, 72)))
        with pytest.warns(RuntimeWarning, match="candidate triton failed.*'cc' returned non-zero"):
            int8_linear.int8_linear(torch.randn(3, 72), packed)
        assert choices("int8_linear")[0].name == "dense"

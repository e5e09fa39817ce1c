import warnings

import pytest
import torch
from mutants import mutant
from poison import poisoned_outputs, surrounded
from torch._subclasses.fake_tensor import FakeTensorMode

from diffaccel.kernels import w4a16_gemm
from diffaccel.kernels.ahead_of_time import SHARED_KIB
from diffaccel.kernels.packed_weight import half, unpack
from diffaccel.kernels.w4a8_gemm import fitted_to_groups
from diffaccel.kernels.w4a16_gemm import FEW_ROWS, FEW_TILES, MANY_TILES, ODD_ROWS

TOLERANCE = {torch.float16: 6e-4, torch.bfloat16: 4e-3}  # of the largest magnitude among the terms
SHAPES = [(1, 1, 1, 32), (5, 7, 3, None), (16, 32, 256, 128), (17, 33, 71, 32), (20, 40, 192, 64)]  # M, N, K, group
SMALL = w4a16_gemm.Config({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32}, warps=1, stages=1)


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    with warnings.catch_warnings():  # NumPy below the interpreter, on infinities
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def operands(M, N, K, group, dtype, nested, rank):
    """The arguments of `w4a16_gemm`, each between poison."""
    x = surrounded(torch.randn(M, K).to(dtype))
    nibbles, low = (surrounded(torch.randint(0, 256, (N, half(K)), dtype=torch.uint8)) for _ in range(2))
    multiplier = surrounded(torch.randint(-14, 15, (N, -(-K // (group or K)))).to(torch.int8))
    scale, bias = surrounded(0.005 + 0.02 * torch.rand(N)), surrounded(torch.randn(N).to(dtype))
    low_rank = [surrounded(torch.randn(rows, rank).to(dtype)) for rows in (M, N)] if rank else None
    return x, nibbles, multiplier if group else None, scale, bias, low if nested else None, low_rank, group


def check(module, M, N, K, group, dtype=torch.bfloat16, nested=False, rank=0):
    x, nibbles, multiplier, scale, bias, low, low_rank, _ = given = operands(M, N, K, group, dtype, nested, rank)
    with poisoned_outputs():
        y = module.w4a16_gemm(*given)
    assert y.dtype == dtype and y.shape == (M, N)
    weight = unpack(nibbles, multiplier, K, group, low).double() * scale.double()[:, None]
    exact = x.double() @ weight.t() + bias.double()
    # Sums are rounded in float32, by up to 1e-6 of what is summed, the result by the dtype's half step.
    size = 1e-6 * (x.double().abs() @ weight.abs().t() + bias.double().abs())
    if low_rank is not None:
        reduced, up = (t.double() for t in low_rank)
        exact, size = exact + reduced @ up.t(), size + 1e-6 * (reduced.abs() @ up.abs().t())
    assert ((y.double() - exact).abs() <= TOLERANCE[dtype] * exact.abs() + size + 1e-7).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("M", "N", "K", "group"), SHAPES)
def test_matches_float64(M, N, K, group, dtype):
    check(w4a16_gemm, M, N, K, group, dtype, nested=K % 2 == 1, rank=20 if group else 0)


@pytest.mark.parametrize("config", [*FEW_ROWS.values(), FEW_TILES, ODD_ROWS, MANY_TILES[80], MANY_TILES[120]], ids=str)
def test_every_configuration(config, monkeypatch):
    monkeypatch.setattr(w4a16_gemm, "config_for", lambda M, N, K, group, *_: fitted_to_groups(config, K, group))
    check(w4a16_gemm, 19, 130, 160, 32, nested=True)


def test_codes_are_exact_in_both_dtypes():
    """Against the identity every code comes back."""
    for dtype in TOLERANCE:
        _, nibbles, multiplier, _, _, low, *_ = operands(1, 20, 128, 64, dtype, True, 0)
        y = w4a16_gemm.w4a16_gemm(torch.eye(128, dtype=dtype), nibbles, multiplier, torch.ones(20), low=low, group=64)
        assert torch.equal(y.t().float(), unpack(nibbles, multiplier, 128, 64, low).float())


def test_nan_stays_in_its_row():
    given = operands(6, 5, 40, 32, torch.float16, False, 0)
    clean = w4a16_gemm.w4a16_gemm(*given)
    given[0][2, 7] = torch.nan
    y = w4a16_gemm.w4a16_gemm(*given)
    keep = torch.arange(6) != 2
    assert y[2].isnan().all() and torch.equal(y[keep], clean[keep])


def test_layouts_and_empty():
    x, *rest, low_rank, group = operands(6, 5, 40, 32, torch.float16, True, 8)
    y = w4a16_gemm.w4a16_gemm(x, *rest, low_rank, group)
    branch = low_rank[0].view(2, 3, 8), low_rank[1]
    assert torch.equal(w4a16_gemm.w4a16_gemm(x.view(2, 3, 40), *rest, branch, group), y.view(2, 3, 5))
    assert w4a16_gemm.w4a16_gemm(x[:0], *rest, None, group).shape == (0, 5)


def test_wrong_input_is_refused():
    x, *rest = operands(6, 5, 40, 32, torch.float16, False, 0)
    with pytest.raises(ValueError, match="expected x bfloat16 or float16"):
        w4a16_gemm.w4a16_gemm(x.float(), *rest)
    with pytest.raises(ValueError, match="low_rank in its dtype"):
        w4a16_gemm.w4a16_gemm(x, *rest[:-2], (torch.ones(6, 4), torch.ones(5, 4)), 32)
    with pytest.raises(ValueError, match=r"expected x \[..., K\]"):
        w4a16_gemm.w4a16_gemm(x[:, :38], *rest)


def test_configurations():
    assert w4a16_gemm.config_for(16, 18432, 3072, 64, False, 90) == (FEW_ROWS[16], False)
    assert w4a16_gemm.config_for(4608, 3072, 3072, 64, False, 90) == (MANY_TILES[90], False)
    assert w4a16_gemm.config_for(4608, 3072, 3072, 64, False, 121) == (MANY_TILES[120], False)
    assert w4a16_gemm.config_for(4608, 3072, 3072, 64, True, 90) == (FEW_TILES, False)
    assert w4a16_gemm.config_for(512, 1152, 1152, None, False, 90) == (FEW_TILES, False)
    assert w4a16_gemm.config_for(4608, 3072, 3080, 64, False, 90) == (ODD_ROWS, True)
    for config in (*FEW_ROWS.values(), FEW_TILES, ODD_ROWS, *MANY_TILES.values()):
        M, N, K = (config.tiles[f"BLOCK_{side}"] for side in "MNK")
        assert config.stages * (4 * M + 2 * N) * K < min(SHARED_KIB.values()) * 1024


def test_opcheck():
    op = torch.ops.diffaccel.w4a16_gemm.default
    for group, nested, rank in [(32, True, 8), (None, False, 0)]:
        *given, low_rank, group = operands(4, 5, 40, group, torch.float16, nested, rank)
        torch.library.opcheck(op, (*given, *(low_rank or (None, None)), group))


def test_without_triton_and_fake(monkeypatch):
    given = operands(4, 5, 40, 32, torch.float16, True, 8)
    y = w4a16_gemm.w4a16_gemm(*given)
    monkeypatch.setattr(w4a16_gemm, "runs_here", lambda *_: False)
    torch.testing.assert_close(y, w4a16_gemm.w4a16_gemm(*given))
    with FakeTensorMode():
        x, nibbles = torch.ones(2, 9, 33, device="cuda").half(), torch.ones(24, 17, device="cuda").byte()
        y = w4a16_gemm.w4a16_gemm(x, nibbles, None, torch.ones(24, device="cuda"))
    assert y.shape == (2, 9, 24) and y.dtype == torch.float16 and y.device.type == "cuda"


FAULTS = [
    # an off-by-one bound
    ("keep = k < HALF - start", "keep = k < HALF - start - 1"),
    ("(k < K - HALF - start)", "(k < K - HALF - start - 1)"),
    ("tl.minimum(m, M - 1)", "tl.minimum(m, M - 2)"),
    ("range(0, HALF, BLOCK_K)", "range(0, HALF - BLOCK_K, BLOCK_K)"),
    # a missing mask
    ("(k < K - HALF - start)", "(k < K - start)"),
    ("mask=(m < M)[:, None] & (n < N)[None, :]", "mask=(n < N)[None, :]"),
    ("mask=(m < M)[:, None] & (n < N)[None, :]", "mask=(m < M)[:, None]"),
    # a wrong place or plane
    ("tl.load(x_ptrs + HALF", "tl.load(x_ptrs"),
    ("low_ptr + place", "nibble_ptr + place"),
    ("        if low_ptr is not None:\n            low_ptrs += BLOCK_K\n", ""),
    ("y = acc * tl.load(scale_ptr + n", "y = acc * tl.load(scale_ptr + n // 2"),
]


def check_in_tiles(module, monkeypatch):
    monkeypatch.setattr(module, "config_for", lambda M, N, K, group, *_: fitted_to_groups(SMALL, K, group))
    check(module, 39, 20, 147, 64, nested=True, rank=20)


@pytest.mark.parametrize(("right", "wrong"), FAULTS)
def test_planted_faults_are_noticed(right, wrong, monkeypatch):
    with mutant(w4a16_gemm, right, wrong) as module, pytest.raises(AssertionError):
        check_in_tiles(module, monkeypatch)


def test_the_check_itself_passes(monkeypatch):
    check_in_tiles(w4a16_gemm, monkeypatch)

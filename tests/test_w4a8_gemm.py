import warnings

import pytest
import torch
from mutants import mutant
from poison import poisoned_outputs, surrounded
from torch._subclasses.fake_tensor import FakeTensorMode

from diffaccel.kernels import w4a8_gemm, w4a16_gemm
from diffaccel.kernels.ahead_of_time import SHARED_KIB
from diffaccel.kernels.packed_weight import half, unpack
from diffaccel.kernels.w4a8_gemm import (
    FEW_ROWS,
    FEW_TILES,
    MANY_TILES,
    NESTED_TILES,
    ODD_ROWS,
    fitted_to_groups,
)

# Of |sum| * scales + |rest|: sums are exact, what remains are roundings in float32 and that of the result.
TOLERANCE = {torch.float32: 5e-7, torch.float16: 6e-4, torch.bfloat16: 4e-3}
# M, N, K, group. 192 / 32: one group a tile; 130: multipliers are gathered; 71: the last column shares with nothing.
SHAPES = [(1, 1, 1, 32), (5, 7, 3, None), (16, 32, 256, 128), (17, 33, 71, 32), (20, 40, 192, 64), (33, 65, 130, 64)]
SMALL = w4a8_gemm.Config({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32}, warps=1, stages=1)


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    with warnings.catch_warnings():  # NumPy below the interpreter, on infinities
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def planes(N, K, group):
    """nibbles, multiplier and low with every value that there is, each between poison."""
    nibbles = torch.randint(0, 256, (N, half(K)), dtype=torch.uint8)
    multiplier = None
    if group is not None:
        multiplier = surrounded(torch.randint(-14, 15, (N, -(-K // group))).to(torch.int8))
    return surrounded(nibbles), multiplier, surrounded(torch.randint(0, 256, nibbles.shape, dtype=torch.uint8))


def scales(*shape):
    return surrounded(0.005 + 0.02 * torch.rand(shape))


def operands(M, N, K, group, dtype, nested, rank):
    """The arguments of `w4a8_gemm`."""
    q = surrounded(torch.randint(-127, 128, (M, K)).to(torch.int8))
    nibbles, multiplier, low = planes(N, K, group)
    low_rank = [surrounded(torch.randn(rows, rank).to(dtype)) for rows in (M, N)] if rank else None
    bias = surrounded(torch.randn(N).to(dtype))
    low = low if nested else None
    return q, nibbles, multiplier, scales(M, 1), scales(N), bias, low, low_rank, group, dtype


def check(module, M, N, K, group, dtype=torch.float32, nested=False, rank=0):
    q, nibbles, multiplier, row_scale, scale, bias, low, low_rank, *_ = given = operands(
        M, N, K, group, dtype, nested, rank
    )
    with poisoned_outputs():
        y = module.w4a8_gemm(*given)
    assert y.dtype == dtype and y.shape == (M, N)
    codes = unpack(nibbles, multiplier, K, group, low)
    product = (q.double() @ codes.double().t()) * scale.double() * row_scale.double()
    exact, size = product + bias.double(), product.abs() + bias.double().abs()
    if low_rank is not None:
        reduced, up = (t.double() for t in low_rank)
        exact, size = exact + reduced @ up.t(), size + reduced.abs() @ up.abs().t()
    assert ((y.double() - exact).abs() <= TOLERANCE[dtype] * size + 1e-7).all()


@pytest.mark.parametrize(("M", "N", "K", "group"), SHAPES)
def test_matches_float64(M, N, K, group):
    check(w4a8_gemm, M, N, K, group)
    check(w4a8_gemm, M, N, K, group, nested=True, rank=20)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_matches_float64_in_half_precision(dtype):
    check(w4a8_gemm, 17, 33, 71, 32, dtype, nested=True, rank=20)


@pytest.mark.parametrize(
    "config", [*FEW_ROWS.values(), FEW_TILES, ODD_ROWS, MANY_TILES[80], MANY_TILES[120], NESTED_TILES[80]], ids=str
)
def test_every_configuration(config, monkeypatch):
    monkeypatch.setattr(w4a8_gemm, "config_for", lambda M, N, K, group, *_: fitted_to_groups(config, K, group))
    check(w4a8_gemm, 19, 130, 160, 32, torch.bfloat16, nested=True)


def test_multipliers_of_minus_sixteen_do_not_overflow():
    """They go with nibbles -7..7."""
    nibbles, multiplier = torch.full((3, 16), 0x1F, dtype=torch.uint8), torch.full((3, 1), -16, dtype=torch.int8)
    q, ones = torch.ones(2, 32).char(), torch.ones(3)
    y = w4a8_gemm.w4a8_gemm(q, nibbles, multiplier, torch.ones(2, 1), ones, group=32, dtype=torch.float32)
    assert torch.equal(y, torch.full((2, 3), 16.0 * (-16 * 7 + 16 * 7)))
    assert torch.equal(unpack(nibbles, multiplier, 32, 32)[:, ::31], torch.tensor([-112, 112]).char().repeat(3, 1))


def test_not_finite_scales_stay_in_their_row_and_channel():
    given = list(operands(6, 5, 40, 32, torch.float32, False, 0))
    clean = w4a8_gemm.w4a8_gemm(*given)
    given[3][2], given[4][3] = torch.nan, torch.nan
    y = w4a8_gemm.w4a8_gemm(*given)
    rows, channels = torch.arange(6) != 2, torch.arange(5) != 3
    assert y[2].isnan().all() and y[:, 3].isnan().all()
    assert torch.equal(y[rows][:, channels], clean[rows][:, channels])


def test_layouts_and_empty():
    q, nibbles, multiplier, row_scale, scale, bias, low, low_rank, group, dtype = operands(
        6, 5, 40, 32, torch.float16, True, 8
    )
    y = w4a8_gemm.w4a8_gemm(q, nibbles, multiplier, row_scale, scale, bias, low, low_rank, group, dtype)
    reduced, up = low_rank
    arranged = (q.view(2, 3, 40), nibbles.t().contiguous().t(), multiplier, row_scale.view(2, 3, 1), scale, bias, low)
    branch = (reduced.view(2, 3, 8), up.t().contiguous().t())
    assert torch.equal(w4a8_gemm.w4a8_gemm(*arranged, branch, group, dtype), y.view(2, 3, 5))
    empty = w4a8_gemm.w4a8_gemm(q[:0], nibbles, multiplier, row_scale[:0], scale, bias, None, None, group, dtype)
    assert empty.shape == (0, 5)


def test_wrong_input_is_refused():
    given = operands(6, 5, 40, 32, torch.float32, True, 8)
    q, nibbles, multiplier, row_scale, scale, bias, low, (reduced, up), *_ = given
    for place, wrong, message in [
        (0, q[:, 2:], r"expected x \[..., K\]"),
        (0, q.float(), "expected q int8"),
        (1, nibbles[:, 1:], r"expected x \[..., K\]"),
        (1, nibbles.char(), "nibbles and low uint8"),
        (2, None, r"expected x \[..., K\]"),
        (2, multiplier[:, 1:], r"expected x \[..., K\]"),
        (2, multiplier.int(), "multiplier int8"),
        (3, row_scale[:, 0], "row_scale float32"),
        (4, scale.double(), "scale float32"),
        (5, bias[1:], r"expected x \[..., K\]"),
        (6, low[1:], r"expected x \[..., K\]"),
        (7, (reduced, up[:, 1:]), r"expected x \[..., K\]"),
        (7, (reduced.half(), up), r"expected x \[..., K\]"),
        (8, 24, r"expected x \[..., K\]"),
    ]:
        arguments = list(given)
        arguments[place] = wrong
        with pytest.raises(ValueError, match=message):
            w4a8_gemm.w4a8_gemm(*arguments)
    long = torch.ones(1, 2**17).char()
    with pytest.raises(ValueError, match="at most K = 131071"):
        w4a8_gemm.w4a8_gemm(long, torch.ones(1, 2**16).byte(), None, torch.ones(1, 1), torch.ones(1))


def test_configurations():
    def tiles(*shape):
        config, gather = w4a8_gemm.config_for(*shape)
        return config.tiles["BLOCK_M"], config.tiles["BLOCK_K"], gather

    assert tiles(16, 18432, 3072, None, False, 90) == (16, 128, False)  # modulation
    assert tiles(16, 18432, 3072, 128, False, 90) == (16, 128, False)
    assert tiles(16, 18432, 3072, 64, False, 90) == (16, 64, False)
    assert tiles(512, 1152, 1152, 64, False, 90) == (64, 64, False)  # text tokens
    assert tiles(4608, 3072, 3072, 64, False, 80) == (128, 64, False)
    assert tiles(4608, 3072, 3072, 32, False, 80) == (128, 32, False)
    assert tiles(4608, 3072, 3072, 64, True, 80) == (64, 64, False)
    assert tiles(4608, 3072, 3072, 64, True, 103) == (128, 64, False)
    assert tiles(4608, 3072, 320, 64, False, 89) == (128, 32, False)  # half of it is 2.5 groups
    assert tiles(4608, 3072, 3080, 64, False, 89) == (32, 32, True)
    for table in (MANY_TILES, NESTED_TILES):
        for capability, many in table.items():
            for config in (*FEW_ROWS.values(), FEW_TILES, many):
                M, N, K = (config.tiles[f"BLOCK_{side}"] for side in "MNK")
                assert config.stages * (2 * M + 2 * N) * K < SHARED_KIB[capability] * 1024


def test_opcheck():
    op = torch.ops.diffaccel.w4a8_gemm.default
    for group, nested, rank, dtype in [(32, True, 8, torch.float16), (None, False, 0, torch.float32)]:
        *given, low_rank, group, dtype = operands(4, 5, 40, group, dtype, nested, rank)
        torch.library.opcheck(op, (*given, *(low_rank or (None, None)), group, dtype))


def test_without_triton_and_fake(monkeypatch):
    given = operands(4, 5, 40, 32, torch.float32, True, 8)
    y = w4a8_gemm.w4a8_gemm(*given)
    monkeypatch.setattr(w4a8_gemm, "runs_here", lambda *_: False)
    torch.testing.assert_close(y, w4a8_gemm.w4a8_gemm(*given))
    with FakeTensorMode():
        q, nibbles = torch.ones(2, 9, 33, device="cuda").char(), torch.ones(24, 17, device="cuda").byte()
        y = w4a8_gemm.w4a8_gemm(q, nibbles, None, torch.ones(2, 9, 1, device="cuda"), torch.ones(24, device="cuda"))
    assert y.shape == (2, 9, 24) and y.dtype == torch.bfloat16 and y.device.type == "cuda"


FAULTS = [
    # an off-by-one bound
    ("keep = k < HALF - start", "keep = k < HALF - start - 1"),
    ("(k < K - HALF - start)", "(k < K - HALF - start - 1)"),
    ("tl.minimum(m, M - 1)", "tl.minimum(m, M - 2)"),
    ("tl.minimum(n, N - 1).to(tl.int64)[None, :] * HALF", "tl.minimum(n, N - 2).to(tl.int64)[None, :] * HALF"),
    ("range(0, HALF, BLOCK_K)", "range(0, HALF - BLOCK_K, BLOCK_K)"),
    ("range(0, R, BLOCK_R)", "range(0, R - BLOCK_R, BLOCK_R)"),
    # a missing mask
    ("(k < K - HALF - start)", "(k < K - start)"),
    ("(m < M)[:, None] & (r < R)[None, :]", "(m < M)[:, None]"),
    ("mask=(m < M)[:, None] & (n < N)[None, :])\n\n\ndef", "mask=(n < N)[None, :])\n\n\ndef"),
    # a wrong place, multiplier or plane
    ("(packed & 15).to(tl.int8) - 8", "(packed & 7).to(tl.int8) - 8"),
    ("return (packed & 15).to(tl.int8) - 8, (packed", "return (packed >> 4).to(tl.int8) - 8, (packed"),
    ("(packed >> 4).to(tl.int8) - 8", "(packed >> 4).to(tl.int8) - 7"),
    ("n, N, K, start + HALF, GROUP", "n, N, K, start, GROUP"),
    ("* tl.cdiv(K, GROUP)", "* (K // GROUP)"),
    ("second += still_more", "second += more"),
    (" * scale[None, :] * row_scale[:, None]", " * scale[None, :]"),
]


def check_in_tiles(module, monkeypatch):
    def config_for(M, N, K, group, *_):
        return fitted_to_groups(SMALL, K, group)

    monkeypatch.setattr(module, "config_for", config_for)
    check(module, 39, 20, 147, 64, torch.float16, nested=True, rank=20)


@pytest.mark.parametrize(("right", "wrong"), FAULTS)
def test_planted_faults_are_noticed(right, wrong, monkeypatch):
    with mutant(w4a8_gemm, right, wrong) as module, pytest.raises(AssertionError):
        check_in_tiles(module, monkeypatch)


def test_the_check_itself_passes(monkeypatch):
    check_in_tiles(w4a8_gemm, monkeypatch)
    check(w4a8_gemm, 39, 20, 128, 64, nested=True, rank=20)


def test_one_group_a_tile_in_the_right_place():
    """The other branch of `multipliers`, with a fault planted there."""
    fault = ("ptrs = row + column // GROUP", "ptrs = row + column // (2 * GROUP)")
    with mutant(w4a8_gemm, *fault) as module, pytest.raises(AssertionError):
        check(module, 39, 20, 256, 64)
    check(w4a8_gemm, 39, 20, 256, 64)
    assert w4a16_gemm.codes_of is w4a8_gemm.codes_of  # which the other kernel's tests rely on

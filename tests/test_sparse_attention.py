"""The Triton block-sparse attention in Triton's interpreter, against float64."""

import pytest
import torch
from mutants import mutant
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")
from diffaccel.kernels import sparse_attention as module
from diffaccel.kernels._launch import INTERPRETED
from diffaccel.kernels.block_pattern import BlockPattern

pytestmark = pytest.mark.skipif(not INTERPRETED.value, reason="needs TRITON_INTERPRET=1")
# rtol, atol against float64. Outputs are averages of unit normal values.
TOLERANCE = {torch.float32: (1e-5, 2e-6), torch.float16: (2e-3, 2e-3), torch.bfloat16: (1.6e-2, 1.6e-2)}
# B, H, Hkv, N, M, heads of the lists, block size, D, Dv: lengths 1, odd and exact; a last tile that is partial, and one
# that lies behind the last key; grouped heads; blocks that are no power of two.
SHAPES = [
    (1, 1, 1, 1, 1, 1, 16, 64, 64),
    (2, 2, 2, 1, 50, 1, 16, 40, 40),
    (1, 2, 1, 33, 64, 2, 32, 72, 24),
    (1, 4, 2, 64, 64, 1, 64, 32, 96),
    (1, 2, 2, 70, 129, 2, 48, 96, 32),
    (1, 1, 1, 40, 192, 1, 128, 64, 64),
    (1, 1, 1, 20, 20, 1, 16, 256, 256),
    (1, 1, 1, 130, 130, 1, 64, 128, 160),
]


def holes(mask, where):
    return mask.masked_fill(where, -torch.inf)


MASKS = {
    "bool": lambda B, H, N, M: torch.rand(N, M) < 0.7,
    "bool per batch and head": lambda B, H, N, M: torch.rand(B, H, N, M) < 0.1,
    "key padding": lambda B, H, N, M: torch.rand(B, 1, 1, M) < 0.7,
    "additive": lambda B, H, N, M: torch.randn(N, M),
    "additive per head": lambda B, H, N, M: holes(torch.randn(1, H, N, M), torch.rand(1, H, N, 1) < 0.2),
    "additive key padding": lambda B, H, N, M: holes(torch.zeros(B, 1, 1, M), torch.rand(B, 1, 1, M) < 0.3),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _outputs_start_as_nan():
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    yield
    torch.use_deterministic_algorithms(False)


def amid_nan(B, heads, tokens, size, dtype=torch.float32):
    """Random [B, heads, tokens, size] with NaN in memory on every side, strided as diffusers does."""
    buffer = torch.full((B + 1, tokens + 5, heads + 1, size + 8), torch.nan, dtype=dtype)
    view = buffer[:B, 2 : 2 + tokens, :heads, :size]
    return view.normal_().transpose(1, 2)


def arguments(B, H, Hkv, N, M, heads, block_size, D, Dv, dtype=torch.float32, density=0.6):
    """q, k, v, lists and block size; the queries of the last block keep nothing if there are several."""
    keep = torch.rand(heads, -(-N // block_size), -(-M // block_size)) < density
    keep[0, 0, -1] = True  # what lies at the end of the keys is used
    if keep.shape[1] > 1:
        keep[0, -1] = False
    lists = BlockPattern.from_mask(keep, block_size)
    q, k, v = amid_nan(B, H, N, D, dtype), amid_nan(B, Hkv, M, D, dtype), amid_nan(B, Hkv, M, Dv, dtype)
    return q, k, v, lists.kv_num_blocks, lists.kv_indices, block_size


def check(kernels, q, k, v, num, indices, block_size, mask=None, scale=None):
    """Raises AssertionError unless ``kernels.sparse_attention`` gives what the definition gives in float64."""
    out, lse = kernels.sparse_attention(q, k, v, num, indices, block_size, mask, scale, return_lse=True)
    doubles = None if mask is None else mask.double() if mask.dtype.is_floating_point else mask
    reference = module.sparse_attention_ref(
        q.double(), k.double(), v.double(), num, indices, block_size, doubles, scale
    )  # fmt: skip
    assert out.shape == reference[0].shape and out.dtype == q.dtype and out.transpose(1, 2).is_contiguous()
    rtol, atol = TOLERANCE[q.dtype]
    torch.testing.assert_close(out.double(), reference[0], rtol=rtol, atol=atol)
    torch.testing.assert_close(lse, reference[1], rtol=1e-4, atol=1e-4)
    return out, lse


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape):
    check(module, *arguments(*shape))


def test_reference_by_hand():
    q, k, v, *_ = arguments(1, 1, 1, 32, 32, 1, 16, 8, 8)
    num, indices = torch.tensor([[[1, 0]]]), torch.tensor([[[[1, 0], [0, 1]]]])
    out, lse = module.sparse_attention_ref(q, k, v, num, indices, 16, scale=0.5)
    scores = q[:, :, :16] @ k[:, :, 16:].mT / 2
    torch.testing.assert_close(out[:, :, :16], scores.softmax(-1) @ v[:, :, 16:])
    torch.testing.assert_close(lse[:, :, :16], scores.exp().sum(-1).log())
    assert (out[:, :, 16:] == 0).all() and (lse[:, :, 16:] == -torch.inf).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_masks_and_dtypes(kind, dtype):
    shape = (2, 2, 1, 35, 50, 2, 16, 16, 16)
    mask = MASKS[kind](2, 2, 35, 50)
    check(module, *arguments(*shape, dtype), mask.to(dtype) if mask.is_floating_point() else mask)


@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_scale(scale):
    check(module, *arguments(1, 1, 1, 20, 40, 1, 16, 16, 16), torch.rand(20, 40) < 0.5, scale)


def test_without_a_key_the_output_is_zero():
    q, k, v, num, indices, size = arguments(1, 2, 2, 40, 40, 2, 16, 16, 16)
    mask = torch.ones(1, 2, 40, 40, dtype=torch.bool)
    mask[:, 0] = False  # one head sees nothing, the other everything
    for added in (mask, torch.zeros(1, 2, 40, 40).masked_fill(~mask, -torch.inf)):
        out, lse = check(module, q, k, v, num, indices, size, added)
        assert (out[:, 0] == 0).all() and (lse[:, 0] == -torch.inf).all()
    out, lse = check(module, q, k, v, torch.zeros_like(num), indices, size)
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_lists_for_each_sample_in_any_order():
    q, k, v, *_ = arguments(2, 2, 2, 40, 70, 1, 16, 16, 16)
    num = torch.randint(1, 6, (2, 2, 3), dtype=torch.int32)
    indices = torch.rand(2, 2, 3, 5).argsort(-1).int()
    check(module, q, k, v, num, indices, 16)


def test_blocks_not_listed_are_not_read():
    q, k, v, *_ = arguments(1, 1, 1, 32, 80, 1, 16, 16, 16)
    k[:, :, 16:32] = v[:, :, 16:32] = torch.nan
    num, indices = torch.tensor([[[3, 1]]]).int(), torch.tensor([[[[0, 2, 4, 1, 3], [3, 0, 1, 2, 4]]]]).int()
    out, _ = module.sparse_attention(q, k, v, num, indices, 16)
    clean = module.sparse_attention_ref(q, k.nan_to_num(0), v.nan_to_num(0), num, indices, 16)[0]
    torch.testing.assert_close(out, clean)


@pytest.mark.parametrize("lse", [False, True])
def test_opcheck(lse):
    args = arguments(1, 2, 1, 20, 30, 2, 16, 8, 16)
    torch.library.opcheck(module._op, (*args, torch.rand(1, 1, 20, 30) < 0.7, 0.5, lse))


def test_compiles_into_one_graph():
    args = arguments(1, 2, 2, 20, 30, 2, 16, 8, 8)

    def block(q, *rest):
        return module.sparse_attention(q * 2, *rest)[0] + 1

    torch.testing.assert_close(torch.compile(block, backend="aot_eager", fullgraph=True)(*args), block(*args))


def test_where_triton_cannot_run_the_reference_does(monkeypatch):
    monkeypatch.setattr(module, "runs_triton", lambda x: False)
    args = arguments(1, 2, 1, 20, 30, 2, 16, 8, 8)
    out, lse = check(module, *args)
    torch.library.opcheck(module._op, (*args, None, 0.5, True))
    assert module.sparse_attention(*args)[1] is None and lse.shape == out.shape[:3]


def test_real_size_on_a_fake_gpu():
    with FakeTensorMode():
        q, k, v = (torch.empty(1, 4608, 24, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
        num = torch.empty(1, 24, 72, device="cuda", dtype=torch.int32)
        indices = torch.empty(1, 24, 72, 72, device="cuda", dtype=torch.int32)
        out, lse = module.sparse_attention(q, k, v, num, indices, 64, return_lse=True)
    assert out.shape == q.shape and out.stride() == q.stride() and out.device.type == "cuda"
    assert lse.shape == (1, 24, 4608) and lse.dtype == torch.float32


def test_mistakes_are_named():
    q, k, v, num, indices, size = arguments(1, 2, 2, 40, 40, 2, 16, 16, 16)
    for wrong, message in [
        ((q, k[:, :, 1:], v, num, indices, size), "do not fit"),
        ((q, k, v, num, indices, 8), "multiples of 16"),
        ((q, k, v, num, indices, 32), "lists must be"),
        ((q, k, v, num.repeat(1, 2, 1), indices.repeat(1, 2, 1, 1), size), "lists must be"),
        ((q, k, v, num, indices, size, None, -1.0), "scale must not be negative"),
    ]:
        with pytest.raises(ValueError, match=message):
            module.sparse_attention(*wrong)


@pytest.mark.parametrize("block_size", [16, 48, 64, 96, 128, 256])
def test_tiles_divide_the_block(block_size):
    for capability in (80, 89, 90, 100, 120):
        for D in (32, 64, 128, 256):
            for dtype in TOLERANCE:
                for masks in [(False, False), (True, False), (True, True)]:
                    config = module.config_for(D, dtype, block_size, capability, *masks)
                    assert all(block_size % tile == 0 and tile >= 16 for tile in config.tiles.values())
                    assert config.warps in (1, 2, 4, 8)


FAULTS = {
    "keys behind the last": ("M % block_size != 0, return_lse", "False, return_lse"),
    "a whole last tile in a partial block": ("M % block_size != 0, return_lse", "M % 32 != 0, return_lse"),
    "off by one": ("left = M - first", "left = M - first + 1"),
    "one block too few": ("tl.load(num_ptr + line) * TILES", "(tl.load(num_ptr + line) - 1) * TILES"),
    "no mask": ('kind = "none" if attn_mask is None', 'kind = "none" if True'),
    "mask of another row": ("mask_row[:, None] * stride_mn", "(mask_row // 2)[:, None] * stride_mn"),
    "no scale": ("scale * LOG2E.value, 1e-30", "LOG2E.value, 1e-30"),
    "base e": ("scale * LOG2E.value, 1e-30", "scale, 1e-30"),
    "sum not rescaled": ("total * alpha + tl.sum", "total + tl.sum"),
    "wrong key head": ("kv_head = h // group", "kv_head = h * 0"),
    "unwritten queries": ("mask=(query < N)[:, None]", "mask=(query < N - 1)[:, None]"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_would_be_noticed(fault):
    mask = MASKS["bool"](1, 2, 40, 136) if "mask" in fault else None
    args = arguments(1, 2, 2, 40, 192 if "whole" in fault else 136, 2, 128, 8, 8, density=1)
    check(module, *args, mask)
    with mutant(module, *FAULTS[fault]) as broken, pytest.raises(AssertionError):
        check(broken, *args, mask)

"""Token permutation in Triton's interpreter: it moves values, so the result is exact."""

import pytest
import torch
from mutants import mutant
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")
from diffaccel.kernels import permute_tokens as module
from diffaccel.kernels._launch import INTERPRETED
from diffaccel.kernels.block_pattern import inverse_order

pytestmark = pytest.mark.skipif(not INTERPRETED.value, reason="needs TRITON_INTERPRET=1")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# B, H, N, D, orders: lengths 1, odd and exact.
SHAPES = [(1, 1, 1, 1, 1), (2, 3, 65, 40, 3), (1, 2, 64, 64, 1), (2, 2, 130, 72, 2), (1, 1, 7, 256, 1)]


@pytest.fixture(autouse=True)
def _outputs_start_as_nan():
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    yield
    torch.use_deterministic_algorithms(False)


def inputs(B, H, N, D, orders, dtype=torch.float32):
    """x [B, H, N, D] with NaN in memory on every side, strided as diffusers does, and an order."""
    buffer = torch.full((B + 1, N + 5, H + 1, D + 3), torch.nan, dtype=dtype)
    x = buffer[:B, 2 : 2 + N, :H, :D].normal_().transpose(1, 2)
    return x, torch.rand(orders, N).argsort(-1)


def check(kernels, x, order):
    """Raises AssertionError unless ``kernels.permute_tokens`` moves every token where it belongs."""
    y = kernels.permute_tokens(x, order)
    assert y.dtype == x.dtype and y.transpose(1, 2).is_contiguous()
    for h in range(x.shape[1]):
        assert torch.equal(y[:, h], x[:, h, order[h % len(order)]])
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moves_tokens_there_and_back(shape, dtype):
    x, order = inputs(*shape, dtype)
    y = check(module, x, order)
    assert torch.equal(module.permute_tokens_ref(x, order), y)
    assert torch.equal(check(module, y, inverse_order(order)), x)


def test_any_strides_and_integer_orders():
    x, order = inputs(2, 3, 20, 16, 3)
    for view in (x[:, :, ::2], x[..., ::3], x.mT.contiguous().mT, x[:, :1].expand(2, 3, 20, 16)):
        check(module, view, order[:, : view.shape[2]].argsort(-1).int())


@pytest.mark.parametrize("orders", [1, 2])
def test_opcheck(orders):
    torch.library.opcheck(module._op, inputs(1, 2, 10, 8, orders))


def test_compiles_into_one_graph():
    x, order = inputs(1, 2, 10, 8, 2)
    compiled = torch.compile(lambda x: module.permute_tokens(x * 2, order) + 1, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module.permute_tokens(x, order) * 2 + 1)


def test_where_triton_cannot_run_the_reference_does(monkeypatch):
    monkeypatch.setattr(module, "runs_triton", lambda x: False)
    check(module, *inputs(2, 3, 20, 8, 3))
    torch.library.opcheck(module._op, inputs(1, 2, 10, 8, 1))


def test_real_size_on_a_fake_gpu():
    with FakeTensorMode():
        x = torch.empty(2, 75600, 40, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        y = module.permute_tokens(x, torch.empty(40, 75600, device="cuda", dtype=torch.int32))
    assert y.shape == x.shape and y.stride() == x.stride() and y.device.type == "cuda"


def test_mistakes_are_named():
    x, order = inputs(1, 2, 10, 8, 2)
    with pytest.raises(ValueError, match="do not fit"):
        module.permute_tokens(x, order[:, :9])
    with pytest.raises(ValueError, match="int32 or int64"):
        module.permute_tokens(x, order.float())


FAULTS = {
    "last token unwritten": ("inside = (token < N)", "inside = (token < N - 1)"),
    "first head's order for all": ("0 if len(order) == 1 else N, H, N,", "0, H, N,"),
    "one token off": ("other=0).to(tl.int64)", "other=0).to(tl.int64) + 1"),
    "last value unwritten": ("(d < D)[None, :]", "(d < D - 1)[None, :]"),
    "scattered, not gathered": ("source[:, None] * stride_xn", "token[:, None] * stride_xn"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_would_be_noticed(fault):
    x, order = inputs(2, 3, 70, 24, 3)
    check(module, x, order)
    with mutant(module, *FAULTS[fault]) as broken, pytest.raises(AssertionError):
        check(broken, x, order)

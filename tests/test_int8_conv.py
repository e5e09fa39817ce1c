import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from diffaccel.kernels import int8_conv as module
from diffaccel.kernels._candidates import choices, forget
from diffaccel.kernels.int8_conv import Geometry, int8_conv, int8_conv_ref, pack_filters, quantize_filters
from diffaccel.kernels.int8_linear import activation_bits

# Of the largest magnitude in the result, against the same integers in float64.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SAME = Geometry(padding=(1, 1))
# B, C, H, W, N, (kh, kw), geometry
SHAPES = {
    "3x3": (2, 8, 7, 9, 5, (3, 3), SAME),
    "odd channels": (1, 3, 6, 5, 7, (3, 3), SAME),
    "1x1": (2, 8, 4, 4, 16, (1, 1), Geometry()),
    "strided": (1, 8, 9, 8, 8, (3, 3), Geometry((2, 2), (1, 1))),
    "uneven": (1, 4, 9, 8, 6, (3, 2), Geometry((2, 1), (0, 2), (1, 2))),
    "groups": (1, 8, 6, 6, 12, (3, 3), Geometry((1, 1), (1, 1), (1, 1), 4)),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFACCEL_CACHE", str(tmp_path))
    monkeypatch.delenv("DIFFACCEL_KERNELS", raising=False)
    torch.manual_seed(0)
    forget()
    with warnings.catch_warnings():  # NumPy below the interpreter, on infinities
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
    forget()


def data(shape, dtype=torch.float32):
    """x, one sample ten times as large as the other; weight of every sign; bias; geometry."""
    B, C, H, W, N, kernel, geometry = SHAPES[shape]
    x = torch.randn(B, C, H, W) * torch.tensor([1.0, 10.0])[:B, None, None, None]
    x[:, :, : H // 2].abs_()
    weight = torch.randn(N, C // geometry.groups, *kernel)
    weight[1::4], weight[2::4] = weight[1::4].abs(), -weight[2::4].abs()
    return x.to(dtype), weight, torch.randn(N), geometry


def by_hand(x, qweight, scale, bias, geometry, bits, static=None):
    """The formula once more, in float64."""
    most = 2 ** (bits - 1) - 1
    peak = x.float().abs().amax((1, 2, 3), keepdim=True) if static is None else 127 * static
    row = (peak / most).clamp(min=2.0**-100)
    q = (x.float() * (1 / row)).round().clamp(-most, most).double()
    moves = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    y = F.conv2d(q, qweight.double(), None, *moves) * scale.double()[:, None, None] * row.double()
    return y + bias.double()[:, None, None]


def close(y, exact, tolerance):
    return ((y.double() - exact).abs() <= tolerance * exact.abs().amax((1, 2, 3), keepdim=True)).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_candidate_matches_float64(shape, dtype):
    x, weight, bias, geometry = data(shape, dtype)
    qweight, scale = quantize_filters(weight)
    static = x.float().abs().amax() / 150  # some are clipped
    for step in (None, static):
        bits = activation_bits()
        y = int8_conv(x, pack_filters(qweight, scale, geometry, "onednn"), bias, step)
        exact = by_hand(x, qweight, scale, bias, geometry, bits, step)
        assert y.dtype == dtype and y.shape == exact.shape and close(y, exact, TOLERANCE[dtype])
        assert close(int8_conv_ref(x, qweight, scale, bias, geometry, bits, step), exact, TOLERANCE[dtype])
        if geometry.groups == 1:  # as on CUDA; the product of rows in the interpreter
            for path in ("int_mm", "triton"):
                y = module._RUN[path](x, qweight, scale, bias, step, geometry, 8).to(dtype)
                exact = by_hand(x, qweight, scale, bias, geometry, 8, step)
                assert y.shape == exact.shape and close(y, exact, 2 * TOLERANCE[dtype])
    dense = int8_conv(x, pack_filters(qweight, scale, geometry, "dense"), bias)
    moves = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    exact = F.conv2d(x.double(), qweight.double() * scale.double()[:, None, None, None], bias.double(), *moves)
    assert close(dense, exact, TOLERANCE[dtype])


def test_samples_have_their_own_scale():
    """The small one does not suffer from the large one beside it."""
    x, weight, bias, geometry = data("3x3")
    packed = pack_filters(*quantize_filters(weight), geometry, "onednn")
    together = int8_conv(x, packed, bias)
    for i in range(2):
        assert torch.equal(together[i], int8_conv(x[i : i + 1], packed, bias)[0])


def test_broken_samples_stay_apart():
    x, weight, bias, geometry = data("3x3")
    packed = pack_filters(*quantize_filters(weight), geometry, "onednn")
    clean = int8_conv(x, packed, bias)
    for value in (torch.nan, torch.inf):
        x[0, 3, 2, 2] = value
        y = int8_conv(x, packed, bias)
        assert not y[0].isfinite().any() and torch.equal(y[1], clean[1])
    x[0] = 0
    torch.testing.assert_close(int8_conv(x, packed, bias)[0], bias[:, None, None].expand(5, 7, 9))


def test_filters():
    weight = torch.randn(5, 3, 2, 2)
    weight[1], weight[2] = 0, 0.3
    q, scale = quantize_filters(weight)
    assert q.abs().max() == 127 and (q[1] == 0).all() and (q[2] == 127).all()
    assert ((q * scale[:, None, None, None] - weight).abs() <= scale[:, None, None, None] * 0.501).all()


def test_memory_format_is_kept():
    x, weight, bias, geometry = data("3x3")
    for path in ("onednn", "dense"):
        packed = pack_filters(*quantize_filters(weight), geometry, path)
        y = int8_conv(x, packed, bias)
        z = int8_conv(x.contiguous(memory_format=torch.channels_last), packed, bias)
        assert y.is_contiguous() and z.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, z)
    assert int8_conv(x[:0], packed, bias).shape == (0, 5, 7, 9)


def test_is_chosen_by_measurement(monkeypatch):
    x, weight, bias, geometry = data("3x3")
    state = torch.get_rng_state()
    packed = pack_filters(*quantize_filters(weight), geometry)
    int8_conv(x, packed, bias)
    (choice,) = choices("int8_conv")
    assert choice.error["onednn"] < 1e-5 < choice.error["dense"] < 0.2
    assert set(choice.seconds) == {"onednn", "dense", "baseline"} and torch.equal(torch.get_rng_state(), state)
    monkeypatch.setenv("DIFFACCEL_KERNELS", "int8_conv=dense")
    packed = pack_filters(*quantize_filters(weight), geometry)
    assert not packed.data.is_mkldnn
    assert torch.equal(int8_conv(x, packed, bias), module._dense(x, packed.data, packed.scale, bias, None, geometry, 8))
    assert choices("int8_conv")[-1].name == "dense"


def test_is_fast_where_it_should_be():
    """3.6 times as fast as float32 in a quiet moment."""
    packed = pack_filters(*quantize_filters(torch.randn(256, 256, 3, 3)), SAME)
    int8_conv(torch.randn(1, 256, 16, 16), packed)
    assert choices("int8_conv")[0].name == "onednn"


@pytest.mark.parametrize(("pixels", "C", "N", "int_mm"), [(5, 8, 8, True), (4, 8, 8, False), (5, 7, 8, False)])
def test_takes_shapes_that_int_mm_refuses(pixels, C, N, int_mm, monkeypatch):
    monkeypatch.setattr(module, "_paths", lambda device, groups: ("int_mm", "triton", "dense"))
    monkeypatch.setattr(module, "choose", lambda operator, shape, device, names, *_, **__: "+".join(names))
    x, weight = torch.ones(1, C, pixels, 4), torch.ones(N, C, 1, 1).char()
    names = module._resolve(x, weight, Geometry(), 8, None)
    assert names == ("int_mm+" if int_mm else "") + "triton+dense"


def test_copies():
    x, weight, bias, geometry = data("groups")
    qweight, scale = quantize_filters(weight)
    packed = pack_filters(qweight, scale, geometry)
    assert packed.data.is_mkldnn and packed.nbytes == qweight.numel() + 4 * 12
    y = int8_conv(x, packed, bias)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), packed.to("cpu")):
        assert torch.equal(other.unpack(), qweight) and other.geometry == geometry
        assert torch.equal(int8_conv(x, other, bias), y)
    assert packed.to("meta").data.device.type == "meta"


def test_wrong_input_is_refused():
    x, weight, bias, geometry = data("3x3")
    qweight, scale = quantize_filters(weight)
    packed = pack_filters(qweight, scale, geometry)
    for arguments, message in [
        ((x[0], packed), r"expected x \[B, 8, H, W\]"),
        ((x[:, :4], packed), r"expected x \[B, 8, H, W\]"),
        ((x, packed, bias[1:]), r"bias \[5\]"),
        ((x, packed, bias, torch.ones(2)), "one static scale"),
    ]:
        with pytest.raises(ValueError, match=message):
            int8_conv(*arguments)
    for arguments, message in [
        ((weight, scale, geometry), "quantize_filters"),
        ((qweight[0], scale, geometry), "quantize_filters"),
        ((qweight, scale[1:], geometry), "quantize_filters"),
        ((qweight, scale, Geometry(groups=2)), "groups that divide the 5"),
        ((qweight, scale, geometry, "triton"), "no candidate 'triton'"),
    ]:
        with pytest.raises(ValueError, match=message):
            pack_filters(*arguments)


def test_opcheck():
    """On the plain form: opcheck looks at storages, and a blocked tensor has none (it is compiled below)."""
    x, weight, bias, geometry = data("strided")
    qweight, scale = quantize_filters(weight)
    op = torch.ops.diffaccel.int8_conv.default
    torch.library.opcheck(op, (x, qweight, scale, bias, None, geometry.flat(), "dense", 8))
    x, step = x.half().contiguous(memory_format=torch.channels_last), torch.tensor(0.1)
    torch.library.opcheck(op, (x, qweight, scale, None, step, geometry.flat(), "auto", 8))


def test_compiles_without_graph_break():
    x, weight, bias, geometry = data("3x3")
    packed = pack_filters(*quantize_filters(weight), geometry, "onednn")

    def layer(x):
        return torch.relu(int8_conv(x * 2, packed, bias))

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


def test_fake_tensors_measure_nothing():
    with FakeTensorMode():
        qweight, scale = torch.ones(24, 32, 3, 3, device="cuda").char(), torch.ones(24, device="cuda")
        packed = pack_filters(qweight, scale, SAME)
        y = int8_conv(torch.ones(2, 32, 9, 8, device="cuda", dtype=torch.bfloat16), packed)
        assert y.shape == (2, 24, 9, 8) and y.dtype == torch.bfloat16 and y.device.type == "cuda"
    assert not choices()

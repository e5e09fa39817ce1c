import warnings

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from diffaccel.kernels import int4_linear, int8_linear
from diffaccel.kernels._candidates import choices, forget, worst_row_error
from diffaccel.kernels.fit_int4 import quantize_int4, quantize_nested
from diffaccel.kernels.int4_activations import quantize_per_token_int4
from diffaccel.kernels.int4_linear import ACTIVATIONS, int4_linear_ref
from diffaccel.kernels.int8_linear import activation_bits, saturating_data
from diffaccel.kernels.packed_weight import Int4Weight, unpack

# Relative error of the worst row against the same integers in float64.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
FORMS = {
    "group 32": lambda weight: quantize_int4(weight, 32),
    "channel": lambda weight: quantize_int4(weight, None),
    "nested": lambda weight: quantize_nested(weight, 64),
    "high plane": lambda weight: quantize_nested(weight, 64).high,
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


@pytest.fixture
def triton_on_cpu(monkeypatch):
    """The kernels in the interpreter, in place of a GPU's."""

    def paths(device, activations, dtype):
        return ("triton", "dense") if activations != "float" or dtype != torch.float32 else ("dense",)

    monkeypatch.setattr(int4_linear, "_paths", paths)


def data(M, N, K, dtype=torch.float32, rank=4):
    x, weight = saturating_data(M, K, N, torch.device("cpu"))
    return x.to(dtype), weight, torch.randn(N), (torch.randn(rank, K).to(dtype), torch.randn(N, rank).to(dtype))


def by_hand(x, packed, bias, activations, low_rank, bits):
    """The formula once more, in float64."""
    x64, codes, scale = x.double(), packed.codes().double(), packed.scale.double()
    y = x64 @ codes.t() * scale
    if activations == "int4":
        codes4, row = quantize_per_token_int4(
            x, packed.group if isinstance(packed, Int4Weight) and packed.group else 64, bits
        )
        y = codes4.double() @ codes.t() * scale * row.double()
    if activations == "int8":
        most = 2 ** (bits - 1) - 1
        row = (x.float().abs().amax(-1, keepdim=True) / most).clamp(min=2.0**-100)
        y = (x.float() * (1 / row)).round().double() @ codes.t() * scale * row.double()
    if low_rank is not None:
        y = y + F.linear(x, low_rank[0]).double() @ low_rank[1].double().t()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 1), (9, 33, 71), (17, 48, 128)])
def test_every_candidate_matches_float64(M, N, K, dtype, form):
    x, weight, bias, low_rank = data(M, N, K, dtype)
    packed, bits = FORMS[form](weight), activation_bits()
    for activations in ACTIVATIONS:
        for path in int4_linear._paths(x.device, activations, dtype):
            y = int4_linear.int4_linear(x, packed, bias, activations, low_rank, path)
            kind = "float" if path == "dense" and activations == "int8" else activations
            assert y.dtype == dtype and y.shape == (M, N)
            assert worst_row_error(y, by_hand(x, packed, bias, kind, low_rank, bits)) < TOLERANCE[dtype]
            y = int4_linear.int4_linear(x, packed, activations=activations, path=path)
            assert worst_row_error(y, by_hand(x, packed, None, kind, None, bits)) < TOLERANCE[dtype]
        y = int4_linear_ref(x, packed, bias, activations, low_rank, bits)
        assert worst_row_error(y, by_hand(x, packed, bias, activations, low_rank, bits)) < TOLERANCE[dtype]


@pytest.mark.parametrize("bits", [8, 7])
def test_activations_of_4_bits(bits):
    """Nibbles times a multiplier for each group, which reaches to its largest magnitude; half a step of error."""
    x = torch.randn(6, 2, 130)
    x[0, 0], x[1, 0, 3], x[2, :, :32] = 0, torch.nan, 0.01
    codes, scale = quantize_per_token_int4(x, 32, bits)
    assert codes.shape == x.shape and scale.shape == (6, 2, 1) and codes.int().abs().max() <= (105 if bits == 8 else 63)
    assert (codes[0, 0] == 0).all() and scale[1, 0].isnan() and scale[1, 1].isfinite()
    good = torch.cat([x[2:].flatten(0, 1), x[1, 1:]])
    codes, scale = quantize_per_token_int4(good, 32, bits)
    for part in range(0, 130, 32):
        values, integers = good[:, part : part + 32], codes[:, part : part + 32].double()
        step = torch.ceil(values.abs().amax(-1, keepdim=True) / 7 / scale - 1e-5).clamp(min=1)
        assert (integers % step == 0).all()
        assert ((integers * scale - values).abs() <= step * scale * 0.501).all()


def test_the_integer_candidate_exists_here():
    """Without it this machine would have tested nothing but dense products."""
    assert int4_linear._paths(torch.device("cpu"), "int8", torch.float32) == ("onednn", "dense")


@pytest.mark.parametrize("form", FORMS)
def test_triton_matches_float64(form, triton_on_cpu):
    for dtype in TOLERANCE:
        x, weight, bias, low_rank = data(9, 33, 71, dtype)
        packed = FORMS[form](weight)
        for activations in ACTIVATIONS if dtype != torch.float32 else ("int8", "int4"):
            y = int4_linear.int4_linear(x, packed, bias, activations, low_rank, "triton")
            assert worst_row_error(y, by_hand(x, packed, bias, activations, low_rank, 8)) < TOLERANCE[dtype]


def test_both_planes_are_the_int8_layer():
    """To the bit: same codes, same scale, same product."""
    x, weight, bias, _ = data(20, 24, 128)
    qweight, scale = int8_linear.quantize_per_channel(weight)
    nested = quantize_nested(weight)
    same = (nested.codes() == qweight).all(1)
    packed = int8_linear.pack(qweight, scale, "onednn")
    y = int4_linear.int4_linear(x, nested, bias, path="onednn")
    assert same.sum() > 12 and torch.equal(y[:, same], int8_linear.int8_linear(x, packed, bias)[:, same])


@pytest.mark.parametrize("path", ["onednn", "int_mm", "dense"])
def test_channels_in_parts_are_the_same(path, monkeypatch):
    """So no more than a part is ever unpacked at once."""
    x, weight, bias, low_rank = data(20, 200, 72)
    planes, branch = int4_linear._planes(quantize_nested(weight, 32)), (F.linear(x, low_rank[0]), low_rank[1])
    run, parts = int4_linear._RUN[path, "int8"], []
    whole = run(x, planes, bias, branch)

    def recording(nibbles, *rest):
        parts.append(len(nibbles))
        return unpack(nibbles, *rest)

    monkeypatch.setattr(int4_linear, "_CODES", {"cpu": 64 * 72})
    monkeypatch.setattr(int4_linear, "unpack", recording)
    torch.testing.assert_close(run(x, planes, bias, branch), whole)
    assert parts == [64, 64, 64, 8]


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_nan_stays_in_its_row_and_channel(activations, triton_on_cpu, monkeypatch):
    x, weight, bias, _ = data(8, 16, 64)
    weight[5, 3] = torch.inf
    packed = quantize_int4(weight)
    for dtype in (torch.float32, torch.float16):
        for path in int4_linear._paths(x.device, activations, dtype):
            clean = x.to(dtype)
            y = int4_linear.int4_linear(clean, packed, bias, activations, path=path)
            dirty = clean.clone()
            dirty[3, 5] = torch.nan
            z = int4_linear.int4_linear(dirty, packed, bias, activations, path=path)
            rows, channels = torch.arange(8) != 3, torch.arange(16) != 5
            assert y[:, 5].isnan().all() and y[:, channels].isfinite().all() and z[3].isnan().all()
            assert torch.equal(z[rows][:, channels], y[rows][:, channels])


def test_layouts_and_empty():
    x, weight, bias, low_rank = data(6, 5, 40)
    packed = quantize_int4(weight, 32)
    for activations in ACTIVATIONS:
        y = int4_linear.int4_linear(x, packed, bias, activations, low_rank)
        z = int4_linear.int4_linear(x.view(2, 3, 40), packed, bias, activations, low_rank)
        assert torch.equal(z, y.view(2, 3, 5))
        z = int4_linear.int4_linear(x.t().contiguous().t(), packed, bias, activations, low_rank)
        torch.testing.assert_close(z, y)
        assert int4_linear.int4_linear(x[:0], packed, bias, activations, low_rank).shape == (0, 5)


def test_wrong_input_is_refused():
    x, weight, bias, (down, up) = data(6, 5, 40)
    packed = quantize_int4(weight, 32)
    for arguments, message in [
        ((x[:, 1:], packed), r"expected x \[..., 40\]"),
        ((x, packed, bias[1:]), r"bias \[5\]"),
        ((x, packed, bias, "int2"), "one of .*'int8', 'int4', 'float'"),
        ((x, packed, bias, "int8", (down[:, 1:], up)), r"low_rank \[R, 40\]"),
        ((x, packed, bias, "int8", (down, up[:, 1:])), r"low_rank \[R, 40\]"),
        ((x, packed, bias, "int8", (down.half(), up)), "in torch.float32"),
        ((x, packed, bias, "int8", None, "triton"), "no candidate 'triton'"),
        ((x, packed, bias, "float", None, "onednn"), "no candidate 'onednn'"),
    ]:
        with pytest.raises(ValueError, match=message):
            int4_linear.int4_linear(*arguments)


@pytest.mark.parametrize("form", FORMS)
def test_is_chosen_by_measurement(form, triton_on_cpu, monkeypatch):
    x, weight, _, _ = data(3, 9, 70)
    packed = FORMS[form](weight)
    state = torch.get_rng_state()
    assert int4_linear.int4_linear(x, packed).shape == (3, 9)
    (choice,) = choices("int4_linear")
    assert choice.error["triton"] < 1e-5 < choice.error["dense"] < 0.1
    assert set(choice.seconds) == {"triton", "dense", "baseline"} and torch.equal(torch.get_rng_state(), state)
    monkeypatch.setenv("DIFFACCEL_KERNELS", "int4_linear=triton")
    assert torch.equal(int4_linear.int4_linear(x, packed), int4_linear.int4_linear(x, packed, path="triton"))


def test_wins_where_it_should():
    """On a wide layer the integers are the faster ones on every machine that has them: here by about 3."""
    weight = torch.randn(1152, 1152) * 0.02
    int4_linear.int4_linear(torch.randn(512, 1152), quantize_int4(weight))
    (choice,) = choices("int4_linear")
    assert choice.name == "onednn" and choice.error["onednn"] < 1e-5


@pytest.mark.parametrize(("M", "N", "K"), [(16, 64, 64), (17, 64, 64), (64, 60, 64), (64, 64, 60)])
def test_takes_shapes_that_int_mm_refuses(M, N, K, monkeypatch):
    monkeypatch.setattr(int4_linear, "choose", lambda operator, shape, device, names, *_, **__: "+".join(names))
    planes = int4_linear._planes(quantize_int4(torch.randn(N, K)))
    paths = int4_linear._paths(torch.device("cuda"), "int8", torch.float16)
    int_mm = "int_mm+" if (M, N, K) == (17, 64, 64) else ""
    assert (
        int4_linear._resolve(torch.ones(M, K), planes, "int8", ("int_mm", "triton", "dense")) == int_mm + "triton+dense"
    )
    assert paths[0] == "int_mm" and paths[-1] == "dense"


def test_opcheck():
    x, weight, bias, low_rank = data(6, 5, 40)
    op = torch.ops.diffaccel.int4_linear.default
    nested = int4_linear._planes(quantize_nested(weight, 32))
    torch.library.opcheck(op, (x.view(2, 3, 40), *nested[:4], bias, *low_rank, 40, 32, "int8", "onednn"))
    channel = int4_linear._planes(quantize_int4(weight, None))
    torch.library.opcheck(op, (x.half(), *channel[:4], None, None, None, 40, None, "float", "auto"))


def test_compiles_without_graph_break():
    x, weight, bias, low_rank = data(6, 5, 40)
    nested = quantize_nested(weight)

    def layer(x):
        y = int4_linear.int4_linear(x * 2, nested, bias, path="onednn")
        return torch.relu(y + int4_linear.int4_linear(x, nested.high, bias, "float", low_rank))

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


def test_fake_tensors_measure_nothing():
    with FakeTensorMode():
        packed = quantize_int4(torch.ones(24, 32), None).to("cuda")
        y = int4_linear.int4_linear(torch.ones(2, 9, 32, device="cuda", dtype=torch.bfloat16), packed)
        assert y.shape == (2, 9, 24) and y.dtype == torch.bfloat16 and y.device.type == "cuda"
    assert not choices()

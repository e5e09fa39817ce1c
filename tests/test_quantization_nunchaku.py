"""The export that diffusers' nunchaku_lite loads: keys, shapes, order in memory; and it means the same weight."""

import importlib
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import load_file
from test_quantization import quantized
from zoo import ZOO

from diffaccel import InputError, Plan, PlanError, Quantize, accelerate, quantize
from diffaccel.plan import Artefacts
from diffaccel.quantization.nunchaku import export_nunchaku, nunchaku_tensors

pytestmark = pytest.mark.filterwarnings("ignore:diffaccel")

SETTINGS = {"weights": "int4", "group": 64, "low_rank": 24, "activations": "float"}


def model():
    """Widths of 128 and 512, with a cross-attention to 128."""
    torch.manual_seed(0)
    config = {**ZOO["pixart_sigma"].config, "num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 1}
    return PixArtTransformer2DModel(**{**config, "cross_attention_dim": 128, "caption_channels": 128}).eval()


def balanced(net):
    """`Quantize(balance=...)` needs no pipeline where the artefacts are made here."""
    artefacts = {}
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Linear):
            squares = torch.logspace(-2, 2, module.in_features)[torch.randperm(module.in_features)]
            artefacts[f"quantization.transformer.{name}.squares"] = squares.expand(8, -1).contiguous()
            artefacts[f"quantization.transformer.{name}.seen"] = torch.ones(8, dtype=torch.bool)
    return accelerate(net, Plan(quantization=Quantize(balance=0.5, **SETTINGS), artefacts=Artefacts(artefacts)))


@pytest.fixture
def loader(monkeypatch):
    """diffusers' own loader, whose kernels are not here: none is called by what is looked at."""
    fake = ModuleType("kernels")
    fake.get_kernel = lambda *args, **kwargs: SimpleNamespace(ops=None)
    monkeypatch.setitem(sys.modules, "kernels", fake)
    quantizer = importlib.import_module("diffusers.quantizers.nunchaku.nunchaku_quantizer")
    monkeypatch.setattr(quantizer.NunchakuLiteQuantizer, "validate_environment", lambda *args, **kwargs: None)
    utils = importlib.import_module("diffusers.utils")
    monkeypatch.setattr(utils, "is_kernels_available", lambda: True)
    monkeypatch.setattr(utils, "is_kernels_version", lambda *args: False)
    monkeypatch.setattr("diffusers.utils.constants.DIFFUSERS_TRUST_REMOTE_KERNELS", True)
    yield importlib.import_module("diffusers.quantizers.nunchaku.utils")
    sys.modules.pop("diffusers.quantizers.nunchaku.utils", None)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_their_loader_takes_it(loader, dtype, tmp_path):
    net = model()
    accel = balanced(net)
    layers = {n: m for n, m in net.named_modules() if m in quantized(net)}
    expected = {n: nunchaku_tensors(layer, 32, getattr(torch, dtype)) for n, layer in layers.items()}
    assert export_nunchaku(net, tmp_path / "a", dtype=dtype) == tmp_path / "a"
    accel.bake()
    export_nunchaku(net, tmp_path / "b", dtype=dtype)
    files = [load_file(tmp_path / x / "diffusion_pytorch_model.safetensors") for x in "ab"]
    assert all(torch.equal(files[0][k], files[1][k]) for k in files[0]) and files[0].keys() == files[1].keys()
    loaded = PixArtTransformer2DModel.from_pretrained(tmp_path / "b")
    assert all(isinstance(loaded.get_submodule(name), loader.SVDQW4A4Linear) for name in layers)
    for name, tensors in expected.items():
        theirs = dict(loaded.get_submodule(name).named_parameters())
        assert theirs.keys() == tensors.keys() and all(torch.equal(theirs[n], t) for n, t in tensors.items())
        assert {t.dtype for n, t in theirs.items() if n != "qweight"} == {getattr(torch, dtype)}
    loader.check_strict_state_dict_match(loaded, {**files[0], **dict(loaded.named_buffers())})
    config = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert config["svdq_w4a4"]["rank"] == 32 and set(config["svdq_w4a4"]["targets"]) == set(layers)


# --- the order in memory, element by element -------------------------------------------------------------------------


def place_of_code(n, k, K):
    """Word and nibble of a code, from the lanes of mma.m16n8k64 that read it."""
    tile = (n // 128) * (K // 64) + k // 64
    lanes = ((tile * 8 + n % 128 // 16) * 8 + n % 8) * 4 + k % 32 // 8
    return lanes * 4 + n % 16 // 8 * 2 + k % 64 // 32, k % 8


def place_in_block(a, b):
    """Of an element of 16 x 16."""
    return ((a % 8) * 4 + b % 8 // 2) * 8 + (a // 8) * 4 + (b // 8) * 2 + b % 2


@pytest.mark.parametrize("group", [64, 128, None])
def test_unpacked_it_is_the_same_weight(group):
    net = model()
    quantize(net, sites="ff.in", **{**SETTINGS, "group": group})
    layer = net.transformer_blocks[0].ff.net[0].proj
    N, K = layer.weight_shape
    packed = nunchaku_tensors(layer, 32, torch.bfloat16)
    words = packed["qweight"].view(torch.int32).flatten().tolist()
    codes = torch.empty(N, K)
    for n in range(N):
        for k in range(K):
            word, nibble = place_of_code(n, k, K)
            code = words[word] >> (4 * nibble) & 0xF
            codes[n, k] = code - 16 if code > 7 else code
    first = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]  # rows in the order in which lanes 0 to 3 read them
    order = torch.tensor([128 * t + 16 * p + row for t in range(N // 128) for p in range(8) for row in first])
    by_tile = packed["wscales"].flatten().view(N // 128, K // 64, 128)
    scales = torch.empty(N, K // 64)
    scales[order] = by_tile.permute(0, 2, 1).reshape(N, -1).float()
    bias = torch.empty(N)
    bias[order] = packed["bias"].float()
    assert torch.equal(bias, layer.bias.bfloat16().float())
    assert torch.equal(packed["smooth_factor"], torch.ones(K, dtype=torch.bfloat16))
    down, up = torch.empty(32, K), torch.empty(N, 32)
    flat_down, flat_up = packed["proj_down"].flatten().float(), packed["proj_up"].flatten().float()
    for r in range(32):
        for k in range(K):
            down[r, k] = flat_down[((k // 16) * 2 + r // 16) * 256 + place_in_block(r % 16, k % 16)]
        for n in range(N):
            up[n, r] = flat_up[((n // 16) * 2 + r // 16) * 256 + place_in_block(n % 16, r % 16)]
    weight = codes * scales.repeat_interleave(64, 1) + up @ down
    ours = layer.weight + 0
    assert float((weight - ours).norm() / ours.norm()) < 4e-3  # bfloat16 scales
    assert not down[24:].any() and down[:24].any(1).all()


def test_the_input_is_divided_in_the_4_bit_product_only():
    net = model()
    balanced(net)
    layer = net.transformer_blocks[0].attn1.to_q
    assert float(layer.before.min()) < 0.5
    plain = nunchaku_tensors(layer, 32, torch.float16)
    first = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    order = torch.tensor([16 * p + row for p in range(8) for row in first])
    smooth = torch.empty(128)
    smooth[order] = plain["smooth_factor"].float()
    assert torch.allclose(1 / smooth, layer.before.float(), rtol=1e-3)
    flat = plain["proj_down"].flatten().float()
    row = torch.tensor([flat[(k // 16) * 2 * 256 + place_in_block(3, k % 16)] for k in range(128)])
    assert torch.allclose(row, layer.down[3].float() * layer.before.float(), rtol=2e-3, atol=1e-5)


# --- what it cannot hold --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "match"),
    [
        ([Quantize()], "weights=int8, not int4"),
        ([Quantize(weights="int4", group=32)], "groups of 32"),
        ([Quantize(weights="int4", group=64, rotate=True)], "rotated"),
        ([Quantize(), Quantize(weights="int4", group=64, steps=(0.5, 1.0))], "weights=nested"),
        ([Quantize(weights="int4", steps=(0.5, 1.0))], "other weights at other steps"),
        ([Quantize(weights="int4", sites="final")], r"\[32, 128\], whose sides"),
    ],
)
def test_refused(sections, match, tmp_path):
    net = model()
    with accelerate(net, Plan(quantization=sections)), pytest.raises(PlanError, match=match):
        export_nunchaku(net, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_refused_arguments(tmp_path):
    net = model()
    with pytest.raises(PlanError, match=r"diffaccel\.quantize"):
        export_nunchaku(net, tmp_path)
    quantize(net, weights="int4")
    with pytest.raises(PlanError, match="float32"):
        export_nunchaku(net, tmp_path, dtype="float32")
    with pytest.raises(PlanError, match=r"pipe\.transformer"):
        export_nunchaku(net.transformer_blocks, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="another folder"):
        export_nunchaku(net, tmp_path / "file")
    net.transformer_blocks[0].attn1.to_q.scale.mul_(1e8)
    with pytest.raises(PlanError, match="leaves the range of float16"):
        export_nunchaku(net, tmp_path / "x", dtype="float16")

"""The roofline's shapes are those of the models, its bounds add up, and the committed page is what the script makes."""

import importlib.util
from pathlib import Path

import pytest
import torch
from real_size import build_fake, fake_forward, shallow
from torch import nn
from torch.overrides import TorchFunctionMode

from diffaccel.kernels import roofline
from diffaccel.kernels.roofline import ATTENTIONS, GPUS, LINEARS, Attention, Linear

A100, RTX4090, H100 = GPUS
MODELS = {roofline.FLUX: ("flux_dev", 1), roofline.SDXL: ("sdxl", 2), roofline.WAN: ("wan21_14b", 1)}


class _Attentions(TorchFunctionMode):
    """Shapes of the attention calls."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            self.seen.add(tuple(args[0].shape if args else kwargs["query"].shape))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("model", MODELS)
def test_shapes_are_those_of_the_model(model):
    name, batch = MODELS[model]
    denoiser, seen = shallow(build_fake(name)), set()

    def see(layer, inputs, _):
        x = inputs[0]
        seen.add((x.numel() // x.shape[-1], *layer.weight.shape))

    for layer in denoiser.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(see)
    with _Attentions() as attentions:
        fake_forward(name, denoiser)
    for shape in (s for s in LINEARS if s.model == model):
        assert (shape.M // batch, shape.N, shape.K) in seen, shape
    for shape in (s for s in ATTENTIONS if s.model == model):
        assert (1, shape.heads // batch, shape.tokens, shape.size) in attentions.seen, shape


def test_bounds_by_hand():
    square = Linear("", "", 8192, 8192, 8192)
    assert roofline.linear_seconds(square, A100, "bf16") == pytest.approx(2 * 8192**3 / 312e12)
    assert roofline.linear_seconds(square, A100, "fp8") is None and roofline.linear_gain(square, A100, "fp8") is None
    assert 1.8 < roofline.linear_gain(square, A100, "int8") < 2
    assert 3.5 < roofline.linear_gain(square, RTX4090, "int8") < 4
    assert roofline.linear_gain(square, H100, "int8") == roofline.linear_gain(square, H100, "fp8")
    one = Linear("", "", 1, 18432, 3072)
    assert roofline.linear_seconds(one, H100, "bf16") == pytest.approx(2 * 18432 * 3072 / 3.35e12, rel=0.01)
    long = Attention("", "", 40, 75600, 128)
    assert roofline.attention_seconds(long, H100) == pytest.approx(4 * 40 * 75600**2 * 128 / 989.4e12)
    assert 1.9 < roofline.attention_gain(long, H100, 0.5) < 2


def test_remarks_say_where_ours_cannot_win():
    by_name = {(s.model, s.where): s for s in LINEARS}
    assert "cannot win against fp8" in roofline.linear_remark(by_name[roofline.WAN, "ff.in"], H100)
    assert "ahead of fp8" in roofline.linear_remark(by_name[roofline.WAN, "ff.in"], RTX4090)
    assert "a second launch" in roofline.linear_remark(by_name[roofline.SDXL, "cross.k/v"], H100)
    assert "reading the weight" in roofline.linear_remark(by_name[roofline.FLUX, "modulation"], A100)
    short = next(s for s in ATTENTIONS if s.where == "32 x 32")
    assert "cannot win" in roofline.attention_remark(short, H100)


def test_committed_page_is_what_the_script_makes():
    file = Path(__file__).resolve().parent.parent / "scripts" / "kernel_tables.py"
    spec = importlib.util.spec_from_file_location("kernel_tables", file)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert "\n".join(script.roofline_tables()) in script.PAGE.read_text()

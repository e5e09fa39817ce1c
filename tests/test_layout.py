"""Where the tokens of an attention call lie: from arguments, and from the probe."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from zoo import ZOO

from diffaccel import BlockSparse, Plan, accelerate
from diffaccel.attention.layout import Geometry, Layout, Span, span_of

pytestmark = pytest.mark.filterwarnings("ignore:diffaccel. sparse attention is slower")

PLAN = Plan(attention=[BlockSparse(density=0.5, block_size=16, steps=(0.0, 1.0))])

# From the models' sources: grid of the odd size, tokens before it, tokens after it.
KNOWN = {
    "dit": [((9, 9), 0, 0)],
    "sd3": [((9, 7), 0, 12)],
    "sd35_medium": [((9, 7), 0, 0), ((9, 7), 0, 12)],
    "auraflow": [((9, 7), 20, 0)],  # 8 registers, then text
    "cogview4": [((9, 7), 12, 0)],
    "flux": [((9, 7), 12, 0)],
    "qwen_image": [((9, 7), 12, 0)],
    "ideogram4": [((9, 7), 12, 0)],
    "hunyuan_image": [((9, 7), 0, 20)],
    "z_image": [((9, 7), 0, 1), ((9, 7), 0, 33)],  # both parts padded to multiples of 32
    "wan": [((3, 5, 7), 0, 0)],
    "ltx": [((3, 5, 7), 0, 0)],
    "cogvideox": [((3, 5, 7), 12, 0)],
    "hunyuan_video": [((3, 5, 7), 0, 12)],
    "hunyuan_framepack": [((3, 5, 7), 51, 18)],  # earlier frames, then latents, then text and image embedding
    "kandinsky5": [((3, 5, 7), 0, 0)],
    "unet_sd15": [((9, 7), 0, 0), ((18, 14), 0, 0)],
    "svd": [((10, 14), 0, 0)],
    "curio": [((9, 7), 3, 0)],
}


@pytest.mark.parametrize("name", KNOWN)
def test_learned_layouts(name):
    specimen = ZOO[name]
    model = specimen.build()
    with torch.no_grad(), accelerate(model, PLAN) as accel:
        model(**specimen.inputs(1, "odd"))
        found = accel.report().techniques[0].facts["layouts"]
    assert sorted(_parsed(text) for text in found) == sorted(KNOWN[name])


def _parsed(text):
    grid, _, rest = text.partition(" (")
    sides = {side: int(n) for n, side in (p.split() for p in rest.partition("tokens: ")[2].split(" and ") if p)}
    return tuple(int(n) for n in grid.split(" x ")), sides.get("before", 0), sides.get("after", 0)


def test_models_without_text_among_their_tokens_run_once():
    for name, calls in (("wan", 1), ("flux", 3)):
        specimen = ZOO[name]
        model = specimen.build()
        count = []
        handle = model.get_submodule("proj_out" if name == "wan" else "x_embedder").register_forward_hook(
            lambda *_, count=count: count.append(1)
        )
        with torch.no_grad(), accelerate(model, PLAN):
            model(**specimen.inputs())
            assert len(count) == calls
            model(**specimen.inputs())
            assert len(count) == calls + 1
        handle.remove()


def test_fake_tensors_assume_nothing_about_text():
    specimen = ZOO["sd3"]
    model = specimen.build()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = {name: mode.from_tensor(value) for name, value in specimen.inputs().items()}
        with torch.no_grad(), accelerate(model, PLAN) as accel:
            output = model(**inputs)[0]
            model(**inputs)
            report = accel.report().techniques[0]
    assert output.shape == inputs["hidden_states"].shape
    assert report.facts["calls_sparse"] == 6
    assert report.facts["layouts"] == ["76 (one row)"]
    assert any("nothing assumed about text" in note for note in report.notes)


def geometry(shape, config=None, **arguments):
    return Geometry({"x": torch.zeros(shape), **arguments}, config or {}, "x")


def test_grids_from_latents():
    patched = geometry((1, 4, 3, 10, 14), {"patch_size": (1, 2, 2)})
    assert patched.grid(105) == ((3, 5, 7), "latents")
    assert patched.grid(35) == ((5, 7), "latents")  # one frame after the other
    assert patched.grid(104) is None
    assert geometry((1, 3, 4, 10, 14), {"patch_size": 2, "in_channels": 4}).grid(105) == ((3, 5, 7), "latents")
    assert geometry((1, 3, 10, 14, 4), {"patch_size": 2, "in_channels": 4}).grid(105) == ((3, 5, 7), "latents")
    assert geometry((1, 4, 18, 14)).grid(20) == ((5, 4), "latents")  # a network that halves with rounding up
    assert geometry((1, 4, 18, 14), {"patch_size": 2}).grid(18 * 14) is None  # more than all patches


def test_grids_from_coordinates_must_be_in_order():
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(9.0), torch.arange(7.0))
    assert geometry((1, 63, 16), img_ids=ids).grid(63) == ((9, 7), "img_ids")
    assert geometry((1, 63, 16), img_ids=ids.flip(0)[:, [0, 2, 1]].flip(1)).grid(63) is None
    joint = torch.cat([torch.zeros(12, 3), ids])
    assert geometry((1, 63, 16), ids=joint).layout(75, Span(12, 75)) == Layout((9, 7), 12, 0, "ids")


def test_grids_from_numbers():
    assert geometry((1, 105, 16), num_frames=3, height=5, width=7).grid(105) == ((3, 5, 7), "sizes given")
    assert geometry((1, 63, 16), img_shapes=[[(1, 9, 7)]]).grid(63) == ((9, 7), "img_shapes")


def test_unknown_grid_is_one_row_and_said():
    layout = geometry((1, 63, 16)).layout(75, Span(12, 75))
    assert (layout.grid, layout.before, layout.after) == ((63,), 12, 0)
    assert "one row" in layout.note


def test_span():
    plain = torch.arange(1.0, 11.0).repeat(2, 1)
    assert span_of(plain, plain) == Span(0, 0)
    changed = plain.clone()
    changed[:, 3:8] += 1
    assert span_of(plain, changed) == Span(3, 8)
    changed[1] = plain[1]
    changed[1, 5:10] += 1  # the other sample's text is longer: only what is image in both counts as text-free
    assert span_of(plain, changed) == Span(5, 10)
    changed[:, 0] += 1
    assert span_of(plain, changed).scattered

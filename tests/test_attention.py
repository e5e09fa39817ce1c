"""Sparse attention on denoisers of all kinds: equal to a masked reference, and off again to the bit."""

import math
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName
from torch.overrides import TorchFunctionMode
from zoo import ZOO

from diffaccel import BlockSparse, Plan, PlanError, accelerate
from diffaccel.denoiser import find_denoisers
from diffaccel.errors import DiffAccelError
from diffaccel.kernels.window_mask import window_blocks

pytestmark = pytest.mark.filterwarnings("ignore:diffaccel. sparse attention is slower")

BLOCK = 16
MODELS = (
    *("pixart_sigma", "sd3", "lumina2", "z_image", "flux", "chroma", "qwen_image", "curio"),
    *("wan", "ltx", "cogvideox", "hunyuan_video", "mochi", "unet_sd15", "animatediff"),
)
UNETS = ("unet_sd15", "animatediff")


@pytest.fixture(autouse=True)
def _sparse_path(monkeypatch):
    """These sequences are so short that the kernel would choose a dense path."""
    monkeypatch.setenv("DIFFACCEL_KERNELS", "block_sparse_attention=blocks")


def plan(density=0.5, **settings):
    return Plan(attention=[BlockSparse(**{"density": density, "block_size": BLOCK, "steps": (0.0, 1.0), **settings})])


def out(specimen, model, batch=1, size="even", **more):
    with torch.no_grad():
        return specimen.outputs(model(**specimen.inputs(batch, size, **more)))


def distance(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class MaskedReference(TorchFunctionMode):
    """Self-attention by plain matrices and a token mask, from what the zoo says of the model."""

    def __init__(self, specimen, grid, density):
        super().__init__()
        sizes = [s for s in grid[1:] if s > 1]
        self.grids = [sizes]
        if specimen.name in UNETS:
            self.grids = [[2 * grid.height, 2 * grid.width], [grid.height, grid.width]]
        self.text, self.density = specimen.text, density

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return self.attend(*args, **kwargs) if func is F.scaled_dot_product_attention else func(*args, **kwargs)

    def attend(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        tokens = query.shape[2]
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        grid = next((g for g in self.grids if math.prod(g) == tokens), None)
        extra = 0
        if grid is None and self.text in ("before", "after") and tokens > math.prod(self.grids[0]):
            grid, extra = self.grids[0], tokens - math.prod(self.grids[0])
        if grid is not None and tokens == key.shape[2] and tokens > 3 * BLOCK:
            sides = (extra, 0) if self.text == "before" else (0, extra)
            keep = window_blocks(grid, *sides, density=self.density, block_size=BLOCK)
            keep = keep.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[:, :tokens, :tokens]
            scores = scores.masked_fill(~keep, -math.inf)
        return scores.softmax(-1).nan_to_num() @ value


@pytest.mark.parametrize("name", MODELS)
def test_equals_masked_reference_and_comes_off(name):
    specimen = ZOO[name]
    model = specimen.build()
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    plain = out(specimen, model, 2, "odd")
    with torch.no_grad(), MaskedReference(specimen, specimen.grid(2, "odd"), 0.5):
        expected = specimen.outputs(model(**specimen.inputs(2, "odd")))
    with accelerate(model, plan(1.0)):
        assert distance(out(specimen, model, 2, "odd"), plain) < 1e-5
    with accelerate(model, plan(0.5)) as accel:
        first = out(specimen, model, 2, "odd")
        assert distance(first, expected) < 2e-4
        assert distance(first, plain) > 1e-3
        assert same(out(specimen, model, 2, "odd"), first), "the learning call and the next one differ"
        facts = accel.report().techniques[0].facts
        assert facts["calls_sparse"] > 0
        assert facts["path"] == ["gathered blocks (set by DIFFACCEL_KERNELS)"]
    assert same(out(specimen, model, 2, "odd"), plain)
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes


@pytest.mark.parametrize("name", ["flux", "wan", "unet_sd15"])
def test_size_and_batch_change_between_calls(name):
    specimen = ZOO[name]
    model = specimen.build()
    wanted = [(1, "even"), (2, "odd"), (1, "even"), (2, "even")]
    expected = []
    for batch, size in wanted:
        with accelerate(model, plan()):
            expected.append(out(specimen, model, batch, size))
    with accelerate(model, plan()):
        for (batch, size), one in zip(wanted, expected, strict=True):
            assert same(out(specimen, model, batch, size), one)


def test_steps_and_last_section_win():
    specimen = ZOO["wan"]
    model = specimen.build()
    with accelerate(model, plan(0.5)):
        half = out(specimen, model)
    with accelerate(model, plan(0.3)):
        third = out(specimen, model)
    sections = [
        BlockSparse(density=0.5, block_size=BLOCK, steps=(0.5, 1.0)),
        BlockSparse(density=0.3, block_size=BLOCK, steps=(0.9, 1.0)),
    ]
    plain = out(specimen, model)
    with accelerate(model, Plan(attention=sections)) as accel:
        accel.clock.start(5)
        seen = []
        for _ in range(5):
            seen.append(out(specimen, model))
            accel.clock.advance()
        facts = accel.report().techniques[0].facts
    for output, expected in zip(seen, [plain, plain, half, half, third], strict=True):
        assert same(output, expected)
    assert facts["calls_sparse"] == 3 * 3
    assert facts["calls_dense"] == {"outside its steps": 2 * 3}
    assert set(facts["density"]) == {"0.3", "0.5"}


def test_reasons_for_dense_calls():
    specimen = ZOO["hunyuan_video"]
    model = specimen.build()
    with accelerate(model, plan()) as accel:
        out(specimen, model)
        facts = accel.report().techniques[0].facts
    assert facts == facts | {"calls_sparse": 4, "calls_dense": {"fewer than 4 blocks of tokens": 1}}
    with accelerate(model, plan(block_size=64)) as accel:  # all sequences are too short
        assert same(out(specimen, model), out(specimen, model))
        facts = accel.report().techniques[0].facts
    assert facts["calls_sparse"] == 0
    assert facts["calls_dense"] == {"fewer than 4 blocks of tokens": 10}


def test_text_refiner_stays_dense():
    """Its tokens do not come from the latents, however many they are."""
    specimen = ZOO["lumina2"]
    model = specimen.build()
    inputs = specimen.inputs()
    inputs["encoder_hidden_states"] = torch.randn(1, 60, 32, generator=torch.Generator().manual_seed(5))
    inputs["encoder_attention_mask"] = torch.ones(1, 60, dtype=torch.bool)
    with torch.no_grad(), accelerate(model, plan()) as accel:
        model(**inputs)
        report = accel.report().techniques[0]
    assert report.facts["calls_dense"] == {"no image tokens": 2}
    assert report.facts["layouts"] == ["8 x 8 (latents)", "8 x 8 (latents), other tokens: 60 before"]


def test_caption_length_changes_the_tokens_of_one_shape():
    """Lumina 2 drops padding: arguments of the same shape come to another number of tokens."""
    specimen = ZOO["lumina2"]
    model = specimen.build()

    def call(length):
        inputs = specimen.inputs()
        inputs["encoder_attention_mask"][:, length:] = False
        with torch.no_grad():
            return specimen.outputs(model(**inputs))

    with accelerate(model, plan()):
        alone = call(4)
    with accelerate(model, plan()) as accel:
        first = call(9)
        assert same(call(4), alone)
        assert same(call(9), first)
        facts = accel.report().techniques[0].facts
    assert facts["layouts"] == ["8 x 8 (latents)", *(f"8 x 8 (latents), other tokens: {n} before" for n in (4, 9))]
    assert facts["calls_sparse"] == 3 * 4


def test_slower_than_dense_is_applied_and_said():
    specimen = ZOO["wan"]
    model = specimen.build()
    with (
        accelerate(model, plan()) as accel,
        pytest.warns(UserWarning, match="slower than dense here") as caught,
    ):
        out(specimen, model)
        out(specimen, model, size="odd")
    assert len(caught) == 1
    report = accel.report().techniques[0]
    assert report.facts["calls_sparse"] == 6
    assert any("slower than dense" in note for note in report.notes)


def test_other_backends_are_set_aside_at_planned_sites_only():
    specimen = ZOO["wan"]
    model = specimen.build()
    with accelerate(model, plan()):
        expected = out(specimen, model)
    processors = [site.module.processor for site in find_denoisers(model)[0].attentions]
    for processor in processors:
        processor._attention_backend = AttentionBackendName.FLEX
    planned = {id(site.module.processor) for site in find_denoisers(model)[0].attentions if site.role == "attn"}
    with accelerate(model, plan()) as accel:
        for processor in processors:
            native = processor._attention_backend is AttentionBackendName.NATIVE
            assert native == (id(processor) in planned)
        assert distance(out(specimen, model), expected) < 1e-5
        assert any("backend flex" in note for note in accel.report().techniques[0].notes)
    assert all(processor._attention_backend is AttentionBackendName.FLEX for processor in processors)


def test_a_backend_set_while_attached_is_set_aside_and_left_afterwards():
    specimen = ZOO["wan"]
    model = specimen.build()
    with accelerate(model, plan()) as accel:
        expected = out(specimen, model)
        processors = [site.module.processor for site in find_denoisers(model)[0].attentions]
        for processor in processors:
            processor._attention_backend = AttentionBackendName.FLEX
        assert distance(out(specimen, model), expected) < 1e-5
        assert any("backend flex" in note for note in accel.report().techniques[0].notes)
    assert all(processor._attention_backend is AttentionBackendName.FLEX for processor in processors)


def test_planned_sites_that_never_call_attention():
    specimen = ZOO["sana"]  # linear attention
    model = specimen.build()
    plain = out(specimen, model)
    with accelerate(model, plan()), pytest.raises(DiffAccelError, match=r"none of them called scaled_dot_product"):
        out(specimen, model)
    assert same(out(specimen, model), plain)


def test_some_sites_never_called_are_named():
    specimen = ZOO["flux3"]
    model = specimen.build()
    with accelerate(model, plan()) as accel:
        out(specimen, model)
        notes = accel.report().techniques[0].notes
    assert any(
        note.startswith("planned, but never called: transformer.mode_blocks.image_cond.0.attn") for note in notes
    )


def test_refusals_change_nothing():
    model = ZOO["wan"].build()
    before = {n: set(vars(m)) for n, m in model.named_modules()}
    with pytest.raises(PlanError, match="matches cross-attention only"):
        accelerate(model, plan(sites="cross"))
    with pytest.raises(PlanError, match="matches none"):
        accelerate(model, plan(sites="*nowhere*"))
    object.__setattr__(
        model, "_parallel_config", SimpleNamespace(context_parallel_config=SimpleNamespace(ring_degree=2))
    )
    with pytest.raises(PlanError, match=r"ring_degree=2"):
        accelerate(model, plan())
    object.__delattr__(model, "_parallel_config")
    assert {n: set(vars(m)) for n, m in model.named_modules()} == before


def test_two_models_of_one_class_in_two_threads():
    specimen = ZOO["flux"]
    models = [specimen.build(), specimen.build()]
    plain = out(specimen, models[0])
    with accelerate(models[0], plan()):
        expected = out(specimen, models[0])
    first, second = accelerate(models[0], plan()), accelerate(models[1], plan(1.0))
    results = {0: [], 1: []}

    def work(index):
        for _ in range(5):
            results[index].append(out(specimen, models[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(one, expected) for one in results[0])
    assert all(distance(one, plain) < 1e-5 for one in results[1])
    first.remove()
    assert same(out(specimen, models[0]), plain)
    second.remove()
    assert same(out(specimen, models[1]), plain)


def test_random_numbers_are_not_used():
    specimen = ZOO["flux"]
    model = specimen.build()
    with accelerate(model, plan()):
        before = torch.get_rng_state()
        out(specimen, model)
        assert torch.equal(torch.get_rng_state(), before)

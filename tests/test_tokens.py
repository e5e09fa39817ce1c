"""Token merging: which keys go together, exact where they are the same, and right on any denoiser."""

import pytest
import torch
import torch.nn.functional as F
from zoo import ZOO
from zoo_pipelines import PIPELINES

from diffaccel import BlockSparse, MergeTokens, Plan, PlanError, StepCache, accelerate
from diffaccel.tokens.attach import _Image
from diffaccel.tokens.merge import features, merge, neighbours_in_space, neighbours_in_time


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attention(query, key, value, groups, begin=0):
    key, value, sizes = merge(key, value, groups, begin)
    return F.scaled_dot_product_attention(query, key, value, sizes), key.shape[2]


def test_equal_keys_are_merged_without_effect():
    """Pairs of equal tokens, half of all merged: attention is the same, since a merged key counts twice."""
    query, one = noise(2, 3, 32, 8), noise(2, 3, 16, 8, seed=1)
    key = one.repeat_interleave(2, 2)
    value = noise(2, 3, 16, 8, seed=2).repeat_interleave(2, 2)
    for window in (4, 8, 32):
        groups = neighbours_in_space(features(key), 0.5, window)
        got, left = attention(query, key, value, groups)
        assert left == 16
        torch.testing.assert_close(got, F.scaled_dot_product_attention(query, key, value), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75])
def test_the_most_similar_pairs_of_each_window(ratio):
    """Against a second writing with loops."""
    n, window, stride = 30, 8, 2 if ratio <= 0.5 else 4
    keys = noise(1, n, 6)
    unit = F.normalize(keys[0], dim=-1)
    pairs = []
    for begin in range(0, n // window * window, window):
        inside = range(begin, begin + window)
        into = [i for i in inside if i % stride == 0]
        for source in set(inside) - set(into):
            best = max(into, key=lambda i: float(unit[source] @ unit[i]))
            pairs.append((float(unit[source] @ unit[best]), source, best))
    expected = {s: d for _, s, d in sorted(pairs, reverse=True)[: int(n * ratio)]}
    groups = neighbours_in_space(keys, ratio, window)
    kept = groups.kept[0].tolist()
    got = {s: kept[t] for s, t in zip(groups.sources[0].tolist(), groups.targets[0].tolist(), strict=True)}
    assert got == expected
    assert kept == [i for i in range(n) if i not in expected]


def test_means_and_sizes():
    key = torch.arange(8.0).view(1, 1, 8, 1)
    groups = neighbours_in_space(torch.ones(1, 8, 2), 0.5, 4)  # all alike: each goes to the first of its window
    merged, values, sizes = merge(key, 10 * key, groups, 0)
    total = (merged[0, 0, :, 0] * sizes.exp()[0, 0, 0]).sum()
    assert merged.shape[2] == 4 and float(total) == pytest.approx(float(key.sum()))
    torch.testing.assert_close(values, 10 * merged)
    assert sizes.exp().sum() == 8


def test_along_time_the_frame_before():
    frames, per_frame = 5, 6  # the last frame has no partner
    base = noise(1, per_frame, 4)
    keys = torch.cat([base, base + 0.01, -base, noise(1, per_frame, 4, seed=3), base], 1)
    groups = neighbours_in_time(keys, 0.2, frames)
    assert sorted(groups.sources[0].tolist()) == list(range(per_frame, 2 * per_frame))
    kept = groups.kept[0].tolist()
    for source, target in zip(groups.sources[0].tolist(), groups.targets[0].tolist(), strict=True):
        assert kept[target] == source - per_frame


def test_samples_are_merged_each_by_itself():
    keys = noise(3, 64, 8)
    together = neighbours_in_space(keys, 0.4, 16)
    for i in range(3):
        alone = neighbours_in_space(keys[i : i + 1], 0.4, 16)
        assert torch.equal(together.kept[i], alone.kept[0])


def test_which_keys_are_the_image():
    image = _Image(64, 4)
    assert image.span(64) == (0, 64)  # all of it
    assert image.span(16) == (0, 16)  # a frame, or a deeper level of a UNet
    assert image.span(76) == (12, 64)  # 12 tokens of text, before or behind: neither end is touched
    assert image.span(40) is None and image.span(200) is None


def test_text_is_never_merged():
    key, value = noise(1, 2, 40, 8), noise(1, 2, 40, 8, seed=1)
    groups = neighbours_in_space(features(key[:, :, 8:32]), 0.5, 8)
    merged, _, sizes = merge(key, value, groups, 8)
    assert torch.equal(merged[:, :, :8], key[:, :, :8]) and torch.equal(merged[:, :, -8:], key[:, :, 32:])
    assert merged.shape[2] == 40 - 12 and not sizes[..., :8].any() and not sizes[..., -8:].any()


# fmt: off
KINDS = [
    "cogvideox", "dit", "flux", "hunyuan_dit", "latte", "pixart_sigma", "sd3", "svd", "unet_sd15", "unet_sdxl",
    "wan",
]
# fmt: on


@pytest.mark.parametrize("name", KINDS)
def test_any_denoiser(name):
    """Some keys less change the output a little; it comes off to the bit."""
    specimen = ZOO[name]
    model, inputs = specimen.build(), specimen.inputs(batch=2)
    with torch.no_grad():
        plain = specimen.outputs(model(**inputs))
        with accelerate(model, Plan(tokens=[MergeTokens(ratio=0.3, steps=(0.0, 1.0), window=16)])) as accel:
            got = specimen.outputs(model(**inputs))
            report = accel.report().techniques[0]
        again = specimen.outputs(model(**inputs))
    assert report.facts["calls_merged"] > 0, report
    for a, b, c in zip(got, plain, again, strict=True):
        assert torch.equal(b, c) and not torch.equal(a, b)
        assert (a - b).norm() < 0.6 * b.norm()


def test_outside_its_steps_nothing_changes():
    specimen = PIPELINES["wan"]
    pipe = specimen.build()
    plain = specimen.call(pipe, steps=4)
    with accelerate(pipe, Plan(tokens=[MergeTokens(steps=(0.9, 1.0), axis="time", ratio=0.25)])) as accel:
        changed = specimen.call(pipe, steps=4)
        facts = accel.report().techniques[0].facts
    assert facts["calls_merged"] == 2 * len(pipe.transformer.blocks)  # both branches of the last step
    assert not torch.equal(changed, plain) and changed.isfinite().all()
    assert torch.equal(specimen.call(pipe, steps=4), plain)


def test_with_a_step_cache_and_compiled_blocks():
    torch._dynamo.reset()
    specimen = ZOO["wan"]
    model, inputs = specimen.build(), specimen.inputs()
    plan = Plan(tokens=[MergeTokens(steps=(0.0, 1.0), window=16)], caching=StepCache(threshold=100))
    with torch.no_grad(), accelerate(model, plan):
        expected = model(**inputs)[0]
        model.compile_repeated_blocks(backend="eager")
        torch.testing.assert_close(model(**inputs)[0], expected, atol=1e-5, rtol=1e-5)
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(model(**inputs)[0], expected, atol=1e-5, rtol=1e-5)


def test_settings(tmp_path):
    with pytest.raises(PlanError, match="use one of them"):
        Plan(tokens=[MergeTokens()], attention=[BlockSparse()])
    with pytest.raises(PlanError, match=r"MergeTokens\.ratio must be a number in \(0, 0.5\]"):
        MergeTokens(axis="time", ratio=0.6)
    with pytest.raises(PlanError, match="multiple of 4"):
        MergeTokens(window=6)
    with pytest.raises(PlanError, match="matches cross-attention only"):
        accelerate(ZOO["wan"].build(), Plan(tokens=[MergeTokens(sites="cross")]))
    plan = Plan(tokens=MergeTokens(axis="time"))
    assert Plan.load(plan.save(tmp_path)) == plan and not plan.without("tokens").tokens

"""Policies of sparse attention on denoisers and pipelines of all kinds."""

import math

import pytest
import torch
from zoo import ZOO
from zoo_pipelines import PIPELINES

from diffaccel import BlockSparse, Plan, PlanError, accelerate, calibrate
from diffaccel.attention.layout import Layout
from diffaccel.attention.masks import completed, image_blocks, unpacked
from diffaccel.attention.orders import token_order
from diffaccel.attention.section import ORDERS
from diffaccel.kernels.online_sparse import OnlinePattern, chosen_blocks, online_sparse_attention

pytestmark = pytest.mark.filterwarnings("ignore:diffaccel. sparse attention is slower")
BLOCK = 16
POLICIES = {
    "arrow": {"policy": "arrow"},
    "online": {"policy": "online"},
    "mass": {"policy": "mass"},
    "per head": {"reorder": True},
    "fixed": {"reorder": "fixed"},
    "influence": {"policy": "influence", "reorder": True},
    "spatial-temporal": {"policy": "spatial-temporal"},
}


@pytest.fixture(autouse=True)
def _sparse_path(monkeypatch):
    """These sequences are so short that the kernel would choose a dense path."""
    monkeypatch.setenv("DIFFACCEL_KERNELS", "block_sparse_attention=blocks")


def section(**settings):
    return BlockSparse(**{"density": 0.5, "block_size": BLOCK, "steps": (0.0, 1.0), **settings})


def arguments(name, **more):
    call = PIPELINES[name].arguments(steps=4, **more)
    prompts = call.pop("prompt", None)
    return (prompts[:1] if prompts else [{}]), call


def calibrated(name, pipe, **settings):
    prompts, call = arguments(name)
    return calibrate(pipe, section(**settings), prompts=prompts, **call)


@pytest.mark.parametrize("settings", [{"reorder": True, "density": 2.0}, {"policy": "sparge"}, {"reorder": "fwhh"}])
def test_wrong_settings_name_the_value(settings):
    with pytest.raises(PlanError, match=r"2\.0|sparge|fwhh"):
        section(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": "window", "reorder": True},
        {"policy": "online", "reorder": "fixed"},
        {"policy": "arrow", "reorder": "hilbert"},
        {"policy": "window", "allocate": "error"},
    ],
)
def test_settings_that_do_not_go_together(settings):
    with pytest.raises(PlanError, match=r"does not go with|needs a measured policy"):
        section(**settings)


def test_sets_of_masks_share_the_second_half():
    s = section(steps=(0.2, 1.0), masks=3)
    assert s.edges == pytest.approx((0.2, 0.4, 0.6, 1.0))
    assert [s.mask_at(p) for p in (0.0, 0.2, 0.39, 0.4, 0.6, 0.8, 1.0)] == [0, 0, 0, 1, 2, 2, 2]
    assert section(masks=1).mask_at(0.7) == 0


def test_uncalibrated_plans_are_refused():
    model = ZOO["wan"].build()
    with pytest.raises(PlanError, match=r"diffaccel.calibrate"):
        accelerate(model, Plan(attention=section(reorder=True)))
    with pytest.raises(PlanError, match="nothing to calibrate on: fewer than 4 blocks of tokens"):
        calibrated("wan", PIPELINES["wan"].build(), reorder=True, block_size=512)


@pytest.mark.parametrize(
    ("name", "labels"),
    [("wan", tuple(POLICIES)), *((name, ("online", "per head")) for name in ("flux", "sd3", "sd15"))],
)
def test_every_policy_runs_and_comes_off(name, labels):
    pipe, specimen = PIPELINES[name].build(), PIPELINES[name]
    expected = specimen.call(pipe, steps=4)
    outputs = {}
    for label in labels:
        settings = POLICIES[label]
        made = section(**settings)
        plan = calibrated(name, pipe, **settings) if made.needs_calibration else Plan(attention=made)
        assert torch.equal(specimen.call(pipe, steps=4), expected), "calibration leaves no trace"
        with accelerate(pipe, plan) as accel:
            outputs[label] = specimen.call(pipe, steps=4)
            facts = accel.report().techniques[0].facts
            assert facts["calls_sparse"] > 0
            assert 0.4 < sum(facts["density"]["0.5"]) / len(facts["density"]["0.5"]) < 0.95, "text is dense beside it"
        assert not torch.equal(outputs[label], expected)
    assert torch.equal(specimen.call(pipe, steps=4), expected)
    assert not torch.equal(outputs["per head"], outputs["online"])


@pytest.mark.parametrize("settings", [{"reorder": True}, {"reorder": "hilbert"}, {"policy": "online"}])
def test_density_one_is_dense_attention(settings):
    pipe, specimen = PIPELINES["wan"].build(), PIPELINES["wan"]
    made = section(density=1.0, **settings)
    plan = calibrated("wan", pipe, density=1.0, **settings) if made.needs_calibration else Plan(attention=made)
    expected = specimen.call(pipe, steps=4)
    with accelerate(pipe, plan):
        assert (specimen.call(pipe, steps=4) - expected).abs().max() < 1e-3


def test_what_is_applied_is_what_was_measured(monkeypatch):
    """The keys that a head attends to are those of its own order and mask, by a dense reference."""
    pipe = PIPELINES["wan"].build()
    plan = calibrated("wan", pipe, reorder=True, masks=2)
    prefix = next(n for n in plan.artefacts if n.endswith(".orders")).removesuffix("orders")
    orders = [ORDERS[i] for i in plan.artefacts[prefix + "orders"].tolist()]
    layout = Layout(tuple(plan.artefacts[prefix + "grid"].tolist()), 0, 0, "latents")
    n = image_blocks(layout, BLOCK)
    masks = unpacked(plan.artefacts[prefix + "masks"], n)
    assert masks.shape[:2] == (2, len(orders))
    assert masks.float().mean((2, 3)) == pytest.approx(round(0.5 * n * n) / n**2, abs=1e-6)

    from diffaccel.attention import intercept

    seen, real = [], intercept.block_sparse_attention

    def spy(q, k, v, pattern, **options):
        out = real(q, k, v, pattern, **options)
        seen.append((q, k, v, out))
        return out

    monkeypatch.setattr(intercept, "block_sparse_attention", spy)
    prompts, call = arguments("wan")
    with accelerate(pipe, plan):
        pipe(prompt=prompts, **call)
    per_call = len(find_sites(pipe))
    q, k, v, out = seen[-per_call]  # the first site in the last step
    for h, name in enumerate(orders):
        order = token_order(name, layout)
        keep = completed(masks[1, h : h + 1], layout, BLOCK)[0]
        keep = keep.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: layout.tokens, : layout.tokens]
        keep = keep[order.argsort()][:, order.argsort()]
        scores = q[:, h] @ k[:, h].mT / math.sqrt(q.shape[-1])
        expected = scores.masked_fill(~keep, -math.inf).softmax(-1) @ v[:, h]
        torch.testing.assert_close(out[:, h], expected, rtol=1e-4, atol=1e-5)


def find_sites(pipe):
    from diffaccel.denoiser import find_denoisers

    return [site for site in find_denoisers(pipe)[0].attentions if site.role == "attn"]


def test_a_calibrated_plan_survives_saving(tmp_path):
    pipe, specimen = PIPELINES["wan"].build(), PIPELINES["wan"]
    plan = calibrated("wan", pipe, reorder=True)
    loaded = Plan.load(plan.save(tmp_path / "plan"))
    assert loaded == plan
    with accelerate(pipe, plan):
        expected = specimen.call(pipe, steps=5)
    with accelerate(pipe, loaded):
        assert torch.equal(specimen.call(pipe, steps=5), expected)


@pytest.mark.parametrize("other_grid", ["dense", "resample"])
def test_another_grid(other_grid):
    pipe, specimen = PIPELINES["wan"].build(), PIPELINES["wan"]
    plan = calibrated("wan", pipe, reorder=True, other_grid=other_grid)
    larger = {"width": 2 * specimen.arguments().get("width", 32)}
    expected = specimen.call(pipe, steps=3, **larger)
    with accelerate(pipe, plan) as accel:
        output = specimen.call(pipe, steps=3, **larger)
        report = accel.report().techniques[0]
    if other_grid == "dense":
        assert torch.equal(output, expected)
        assert any(reason.startswith("calibrated on a grid") for reason in report.facts["calls_dense"])
    else:
        assert not torch.equal(output, expected) and report.facts["calls_sparse"] > 0
        assert any("resampled" in note for note in report.notes)


@pytest.mark.parametrize("allocate", ["share", "error"])
def test_allocation_spends_the_same_density(allocate):
    pipe = PIPELINES["wan"].build()
    plan = calibrated("wan", pipe, reorder=True, allocate=allocate, masks=2)
    shares = []
    for name, bits in plan.artefacts.items():
        if name.endswith(".masks"):
            grid = plan.artefacts[name.removesuffix("masks") + "grid"].tolist()
            shares.append(unpacked(bits, image_blocks(Layout(tuple(grid), 0, 0, ""), BLOCK)).float().mean((2, 3)))
    by_head = torch.stack(shares)
    assert float(by_head.mean()) == pytest.approx(0.5, abs=0.08)
    assert by_head.std() > 0.01, "heads differ"


def test_online_keeps_the_blocks_with_the_largest_means():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 90, 8) for _ in range(3))
    order = torch.randperm(90)
    pattern = OnlinePattern.of(order, image=5, keep=2, block_size=16)
    keep = chosen_blocks(q[:, :, order], k[:, :, order], 5, 2, 16)
    means = [x[:, :, order][:, :, :80].unflatten(2, (5, 16)).mean(3) for x in (q, k)]
    share = (means[0] @ means[1].mT / math.sqrt(8)).softmax(-1).mean(0)
    share[:, range(5), range(5)] = 2
    assert torch.equal(keep[:, :5, :5], share >= share.topk(2).values[..., 1:])
    assert keep[:, 5].all() and keep[:, :, 5].all(), "text, and the block that holds both, stay dense"
    tokens = keep.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :90, :90][:, order.argsort()][
        ..., order.argsort()
    ]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=tokens[None])
    torch.testing.assert_close(online_sparse_attention(q, k, v, pattern), expected, rtol=1e-4, atol=1e-5)
    assert pattern.density == pytest.approx(float(keep.float().mean()))

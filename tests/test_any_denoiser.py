"""Every technique, and all of them together, on every denoiser of the zoo: works, says what it did, undone to the bit.

Nothing here may depend on a denoiser's class. A technique that cannot act on one must say so before anything changes.
"""

import pytest
import torch
from zoo import ZOO, trajectory
from zoo_pipelines import PIPELINES

from diffaccel import BlockSparse, DiffAccelError, Plan, PlanError, Quantize, StepCache, accelerate

PLANS = {
    "quantization": Plan(quantization=[Quantize()]),
    "attention": Plan(attention=[BlockSparse(density=0.5, steps=(0.0, 1.0), block_size=16)]),
    "caching": Plan(caching=StepCache(threshold=100, max_skips=2, min_steps=1)),
}
TOGETHER = Plan(quantization=[Quantize()], attention=PLANS["attention"].attention, caching=PLANS["caching"].caching)


def run(specimen, model, steps):
    with torch.no_grad():
        return [specimen.outputs(model(**kwargs)) for kwargs in trajectory(specimen, steps)]


def equal(a, b):
    return all(torch.equal(x, y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True))


def finite(outputs):
    return all(torch.isfinite(t).all() for step in outputs for t in step)


def change(a, b):
    """Relative change of the outputs of a trajectory."""
    a, b = (torch.cat([t.flatten().double() for step in o for t in step]) for o in (a, b))
    return float((a - b).norm() / b.norm())


@pytest.mark.filterwarnings("ignore:diffaccel")  # slower than dense at toy sizes, which it says
@pytest.mark.parametrize("name", ZOO)
def test_techniques_alone_and_together(name):
    specimen = ZOO[name]
    model = specimen.build()
    before = run(specimen, model, 4)
    applied = []
    for technique, plan in PLANS.items():
        try:
            accel = accelerate(model, plan)
        except PlanError as refusal:
            assert len(str(refusal)) > 30  # a reason, not a shrug
            assert equal(run(specimen, model, 1), before[:1])
            continue
        try:
            after = run(specimen, model, 4)
        except DiffAccelError as refusal:  # linear attention, say: only a call can show that none is made
            assert technique == "attention" and "scaled_dot_product_attention" in str(refusal)
            accel.remove()
            assert equal(run(specimen, model, 1), before[:1])
            continue
        report = accel.report().techniques[0]
        assert report.technique == technique and report.sites > 0
        assert finite(after)
        if technique == "quantization":
            assert 0 < change(after, before) < 0.2
            assert report.facts["bytes_after"] < 0.3 * report.facts["bytes_before"]
        if technique == "caching":
            assert report.facts["reused"] > 0 or report.notes
        accel.remove()
        assert equal(run(specimen, model, 1), before[:1])
        applied.append(technique)
    assert "caching" in applied
    together = Plan(**{t: PLANS[t].sections(t) if t != "caching" else PLANS[t].caching for t in applied})
    with accelerate(model, together) as accel:
        assert finite(run(specimen, model, 4))
        assert [t.technique for t in accel.report().techniques] == applied
    assert equal(run(specimen, model, 4), before)


@pytest.mark.filterwarnings("ignore:diffaccel")
@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_under_everything(name):
    specimen = PIPELINES[name]
    pipe = specimen.build()
    before = specimen.call(pipe, steps=8)
    linear_attention = name == "sana"
    plan = Plan(quantization=TOGETHER.quantization, caching=TOGETHER.caching) if linear_attention else TOGETHER
    with accelerate(pipe, plan) as accel:
        fast = specimen.call(pipe, steps=8)
        assert torch.isfinite(fast).all() and fast.shape == before.shape and not torch.equal(fast, before)
        assert torch.equal(specimen.call(pipe, steps=8), fast)  # a second run starts afresh
        caching = accel.report().to_dict()["techniques"]["caching"]
        assert caching["reused"] > 0 and caching["computed"] > 0
        assert torch.isfinite(specimen.call(pipe, steps=4, batch=2 if name != "svd" else 1)).all()
    assert torch.equal(specimen.call(pipe, steps=8), before)

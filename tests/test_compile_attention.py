"""Compiled before or after, twenty blocks share the graphs of their class, and nothing is compiled after warm-up."""

import dataclasses
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from zoo import ZOO

from diffaccel import BlockSparse, Plan, accelerate
from diffaccel.attention.calibrate import calibrate_section

pytestmark = pytest.mark.filterwarnings("ignore:diffaccel. sparse attention is slower")

STEPS = 4
# Three phases: dense, then two densities; a third of the blocks keeps to the first.
PLAN = Plan(
    attention=[
        BlockSparse(density=0.5, block_size=16, steps=(0.3, 1.0)),
        BlockSparse(density=0.3, block_size=16, steps=(0.6, 1.0), sites="attn !*.1?.*"),
    ]
)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def deep(name, **layers):
    return dataclasses.replace(ZOO[name], config={**ZOO[name].config, **layers})


def run(specimen, model, accel):
    accel.clock.start(STEPS)
    outputs = []
    with torch.no_grad():
        for step in range(STEPS):
            outputs += specimen.outputs(model(**specimen.inputs(progress=step / STEPS)))
            accel.clock.advance()
    return outputs


@pytest.mark.parametrize("when", ["before", "after"])
def test_twenty_blocks_two_graphs(when):
    specimen = deep("wan", num_layers=20)
    model = specimen.build()
    if when == "before":
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
    with accelerate(model, PLAN) as accel:
        if when == "after":
            model.compile_repeated_blocks(backend="eager", fullgraph=True)
        warm = run(specimen, model, accel)
        assert counters["stats"]["unique_graphs"] == 2  # one class of blocks, dense and sparse
        with torch.compiler.set_stance("fail_on_recompile"):
            again = run(specimen, model, accel)
        facts = accel.report().techniques[0].facts
    assert all(torch.equal(a, b) for a, b in zip(warm, again, strict=True))
    assert facts["calls_sparse"] == 2 * 3 * 20
    assert facts["calls_dense"] == {"outside its steps": 2 * 1 * 20}
    plain = specimen.build()
    with accelerate(plain, PLAN) as accel:
        expected = run(specimen, plain, accel)
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(warm, expected, strict=True))


@pytest.mark.parametrize("policy", ["mass", "online"])
def test_orders_and_masks_of_their_own_share_the_graphs(policy):
    """Each site and set of masks has other ones; they are data."""
    specimen = deep("wan", num_layers=4)
    model, plain = specimen.build(), specimen.build()
    section = BlockSparse(density=0.5, block_size=16, steps=(0.3, 1.0), policy=policy, reorder="hwf", masks=2)
    artefacts = {}
    if section.needs_calibration:
        with accelerate(plain, Plan()) as accel:
            calling = partial(run, specimen, plain, accel)
            artefacts = calibrate_section(0, replace(section, reorder=True), accel._context, calling, calling)
    plan = Plan(attention=section, artefacts=artefacts)
    with accelerate(model, plan) as accel:
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        warm = run(specimen, model, accel)
        assert counters["stats"]["unique_graphs"] == 2  # dense and sparse
        with torch.compiler.set_stance("fail_on_recompile"):
            run(specimen, model, accel)
    with accelerate(plain, plan) as accel:
        expected = run(specimen, plain, accel)
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(warm, expected, strict=True))


def test_joint_attention_and_removal():
    specimen = deep("flux", num_layers=2, num_single_layers=1)
    model = specimen.build()
    plain = specimen.build()
    model.compile_repeated_blocks(backend="eager")
    with torch.no_grad():
        expected = specimen.outputs(model(**specimen.inputs()))
    dense = counters["stats"]["unique_graphs"]
    with accelerate(model, PLAN) as accel, accelerate(plain, PLAN) as uncompiled:
        warm = run(specimen, model, accel)
        assert counters["stats"]["unique_graphs"] <= 2 * dense + 2
        with torch.compiler.set_stance("fail_on_recompile"):
            run(specimen, model, accel)
        eager = run(specimen, plain, uncompiled)
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(warm, eager, strict=True))
    with torch.no_grad():
        assert torch.equal(specimen.outputs(model(**specimen.inputs()))[0], expected[0])


def test_whole_denoiser_compiled_in_place():
    specimen = deep("curio", depth=1)
    model = specimen.build()
    plain = specimen.build()
    model.compile(backend="eager")
    with accelerate(model, PLAN) as accel, accelerate(plain, PLAN) as uncompiled:
        warm = run(specimen, model, accel)
        run(specimen, model, accel)
        graphs = counters["stats"]["unique_graphs"]
        run(specimen, model, accel)
        assert counters["stats"]["unique_graphs"] == graphs
        eager = run(specimen, plain, uncompiled)
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(warm, eager, strict=True))

"""The zoo itself: every specimen is finite, repeatable, and depends on what it should depend on."""

from itertools import pairwise

import pytest
import torch
from real_size import build_fake, fake_forward
from torch import Tensor
from zoo import ZOO, Specimen, trajectory
from zoo_pipelines import PIPELINES


def _run(specimen: Specimen, model: torch.nn.Module, **replaced: object) -> list[Tensor]:
    with torch.no_grad():
        return specimen.outputs(model(**(specimen.inputs() | replaced)))


def _change(old: list[Tensor], new: list[Tensor]) -> float:
    """The largest relative change over the outputs."""
    return max(((a - b).norm() / a.norm()).item() for a, b in zip(old, new, strict=True))


@pytest.mark.parametrize("name", ZOO)
def test_specimen(name: str) -> None:
    specimen = ZOO[name]
    model = specimen.build()
    first = _run(specimen, model)
    assert all(out.isfinite().all() and 0.2 < out.std() < 5 for out in first)
    assert _change(first, _run(specimen, specimen.build())) == 0

    with torch.no_grad():
        odd = specimen.outputs(model(**specimen.inputs(batch=2, size="odd")))
    assert all(out.isfinite().all() for out in odd)

    later = specimen.inputs(progress=0.7)
    assert _change(first, _run(specimen, model, **{key: later[key] for key in specimen.latents})) > 0.02
    if specimen.time:
        assert _change(first, _run(specimen, model, **{specimen.time: later[specimen.time]})) > 0.01


def test_trajectory_is_smooth() -> None:
    steps = list(trajectory(ZOO["flux"], steps=8))
    times = [step["timestep"].item() for step in steps]
    assert times == sorted(times, reverse=True)
    moves = [(a["hidden_states"] - b["hidden_states"]).norm() for a, b in pairwise(steps)]
    assert max(moves) < 1.01 * min(moves)
    assert all(torch.equal(step["encoder_hidden_states"], steps[0]["encoder_hidden_states"]) for step in steps)


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline(name: str) -> None:
    entry = PIPELINES[name]
    pipe = entry.build()
    first = entry.call(pipe, steps=2)
    assert first.isfinite().all() and first.std() > 0.05
    assert torch.equal(first, entry.call(pipe, steps=2))
    assert not torch.equal(first, entry.call(pipe, steps=2, seed=1))
    assert len(entry.call(pipe, steps=2, batch=2)) == 2 * len(first)


def test_real_size_runs_on_fake_tensors() -> None:
    model = build_fake("wan21_14b")
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(14.3e9, rel=0.01)
    out = fake_forward("wan21_14b", model)
    assert out.shape == (1, 16, 21, 90, 160) and out.device.type == "cuda" and out.dtype == torch.bfloat16

"""``inspect --attention``: maps of heads before and after reordering, with the plan's mask."""

import pytest
import torch
from zoo_pipelines import PIPELINES

from diffaccel import BlockSparse, InputError, Plan, calibrate
from diffaccel.inspection.attention_map import draw_heads, head_maps


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_maps_hold_the_same_mass_in_another_order(density, tmp_path):
    pipe, specimen = PIPELINES["wan"].build(), PIPELINES["wan"]
    call = specimen.arguments(steps=4)
    section = BlockSparse(density=density, block_size=16, steps=(0.0, 1.0), reorder=True)
    plan = calibrate(pipe, section, prompts=call.pop("prompt")[:1], **call)
    maps = head_maps(pipe, plan, specimen.arguments(steps=4), sites=1, heads=2)
    assert [head.head for head in maps] == [0, 1] and len({head.site for head in maps}) == 1
    for head in maps:
        assert torch.isclose(head.natural.sum(), head.ordered.sum(), rtol=1e-4)
        assert abs(float(head.kept.float().mean()) - density) < 0.02
        assert head.held == pytest.approx(1.0) if density == 1 else 0.3 < head.held < 0.9
        assert 0 <= head.agreement <= 1
    draw_heads(maps, tmp_path / "heads.png")
    assert (tmp_path / "heads.png").stat().st_size > 10_000
    assert "_diffusers_hook" not in vars(pipe.transformer)


def test_plans_without_static_masks_are_refused():
    pipe = PIPELINES["wan"].build()
    with pytest.raises(InputError, match="static block masks"):
        head_maps(pipe, Plan(attention=BlockSparse(policy="online")), {})

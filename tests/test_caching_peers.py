"""Equal settings, equal skips and outputs: ours beside Pyramid Attention Broadcast of diffusers.

FirstBlockCache and SeaCache's filter have their comparison in test_stack_caching.py. TaylorSeer of diffusers counts its
interval from another step after the warm-up, so that no settings of both give the same steps.
"""

import pytest
import torch
from diffusers import PyramidAttentionBroadcastConfig
from zoo import ZOO

from diffaccel import Plan, StepCache, accelerate

STEPS = 12
KINDS = {"attn": "blocks.0.attn1.to_q", "cross": "blocks.0.attn2.to_q"}


def inputs():
    return [ZOO["wan"].inputs(progress=step / STEPS) for step in range(STEPS)]


def theirs(spatial, cross):
    """Outputs, and by kind of attention the steps at which it ran."""
    model, now, outputs, ran = ZOO["wan"].build(), [0], [], {kind: [] for kind in KINDS}
    model.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=spatial,
            cross_attention_block_skip_range=cross,
            spatial_attention_timestep_skip_range=(-1, 1001),
            cross_attention_timestep_skip_range=(-1, 1001),
            current_timestep_callback=lambda: 1000.0 * (1 - now[0] / STEPS),
        )
    )
    for kind, name in KINDS.items():
        model.get_submodule(name).register_forward_hook(lambda *_, kind=kind: ran[kind].append(now[0]))
    with torch.no_grad():
        for now[0], kwargs in enumerate(inputs()):
            with model.cache_context("cond"):
                outputs.append(model(**kwargs)[0])
    return outputs, ran


@pytest.mark.parametrize(("spatial", "cross"), [(2, 3), (3, 5), (4, 1)])
def test_pyramid_attention_broadcast(spatial, cross):
    section = StepCache(
        policy="interval",
        granularity="sites",
        sites="attn cross",
        every=f"attn={spatial} cross={cross}",
        forecast="hold",
        protect_first=0.0,
        protect_last=0,
        min_steps=1,
    )
    model, ours = ZOO["wan"].build(), []
    with torch.no_grad(), accelerate(model, Plan(caching=section)) as accel:
        accel.clock.start(STEPS)
        for kwargs in inputs():
            ours.append(model(**kwargs)[0])
            accel.clock.advance()
        steps = accel.report().techniques[0].facts["steps_computed"]["transformer"]
    expected, ran = theirs(spatial, cross)
    assert steps == ran and len(ran["attn"]) == -(-STEPS // spatial)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

"""What is removed computes what masks say, on every denoiser; comes back to the bit; and is saved and loaded."""

import dataclasses
import json
from contextlib import ExitStack

import pytest
import torch
from test_any_denoiser import change, equal, run
from torch import nn
from zoo import ZOO
from zoo_pipelines import PIPELINES

from diffaccel import (
    DiffAccelError,
    LowRank,
    Plan,
    PlanError,
    Pruning,
    Quantize,
    StepCache,
    accelerate,
    calibrate,
    prune,
)
from diffaccel.denoiser import Denoiser, find_denoisers
from diffaccel.distillation.lora import add_lora
from diffaccel.originals import Originals
from diffaccel.pruning.attach import all_groups
from diffaccel.pruning.blocks import flows_of
from diffaccel.pruning.budget import Costs, choose
from diffaccel.pruning.costs import costs_of
from diffaccel.pruning.groups import groups_of
from diffaccel.pruning.masks import Masks
from diffaccel.pruning.removal import remove_units
from diffaccel.pruning.verify import cuttable

# Heads that a forward does not let go: rotations over all heads at once or one for each head, masks for a fixed number,
# a last block that hands on the heads themselves, a face extractor. They are refused, by name, before anything changes.
STAY = {
    "ltx": "heads:transformer_blocks.#.attn#",
    "ltx2": "heads:transformer_blocks.#",
    "mochi": "heads:transformer_blocks.#.attn#",
    "prior": "heads:transformer_blocks.#.attn#",
    "easyanimate": "heads:transformer_blocks.2.attn1",
    "consisid": "neurons:local_facial_extractor",
}
NO_HEADS = {"curio"}  # nothing says how many it has
NO_NEURONS = {"unet_2d", "kandinsky3", "sana_video", "stable_cascade"}  # none, or behind norms over all of them


def relative(a, b):
    return change([a], [b])


@pytest.mark.parametrize("name", ZOO)
def test_removed_is_masked(name):
    specimen = ZOO[name]
    model = specimen.build()
    denoiser = Denoiser.of(model, "denoiser")
    inputs = specimen.inputs()

    def call():
        with torch.no_grad():
            return specimen.outputs(model(**inputs))

    before = call()
    groups, refused = cuttable(denoiser, groups_of(denoiser), call)
    kinds = {"heads": name not in NO_HEADS, "neurons": name not in NO_NEURONS}
    assert {g.kind for g in groups_of(denoiser)} == {kind for kind, there in kinds.items() if there}
    stay = STAY.get(name, "nothing").split("#")
    assert all(all(part in key for part in stay) for key in refused), refused
    if name in STAY:
        assert refused

    generator = torch.Generator().manual_seed(0)
    kept = {
        g.key: torch.randperm(g.units, generator=generator)[: max(1, g.units * 2 // 3)].sort().values for g in groups
    }
    with Masks(model, groups) as masks:
        masks.set({g.key: torch.zeros(g.units).index_fill(0, kept[g.key], 1.0) for g in groups})
        masked = call()
    assert relative(masked, before) > 1e-3
    count = sum(p.numel() for p in model.parameters())
    with ExitStack() as undo:
        remove_units(denoiser, groups, kept, Originals("device", undo), undo)
        assert relative(call(), masked) < 1e-5
        gone = count - sum(p.numel() for p in model.parameters())
        expected = sum(g.parameters_each * (g.units - len(kept[g.key])) for g in groups)
        assert 0 < gone <= expected <= 2 * gone  # a weight that loses a row and a column is counted twice
    assert all(torch.equal(a, b) for a, b in zip(call(), before, strict=True))


WHOLE = ("pixart_sigma", "flux", "sd3", "wan_vace", "cogvideox", "hunyuan_dit", "lumina2", "unet_sd15", "curio")


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("kinds", [("sublayer", "resnet"), ("block",)], ids=["sublayers", "blocks"])
def test_whole_units_add_nothing(name, kinds):
    specimen = ZOO[name]
    model = specimen.build()
    denoiser = Denoiser.of(model, "denoiser")
    inputs = specimen.inputs()

    def call():
        return model(**inputs)

    with torch.no_grad():
        found = all_groups(denoiser, kinds, flows_of(denoiser, call))
        groups, refused = cuttable(denoiser, found, call)
    assert not refused
    if kinds == ("block",):  # all but the tip of a control branch, which gives more than it gets
        assert len(groups) >= len(denoiser.blocks) - (name == "wan_vace")
    elif name == "unet_sd15":
        assert {g.kind for g in groups} == {"sublayer", "resnet"}


def test_masks_have_gradients_and_leave_without_a_trace():
    specimen = ZOO["wan"]  # norms over all heads
    model = specimen.build()
    denoiser = Denoiser.of(model, "denoiser")
    groups = groups_of(denoiser)
    assert any(group.norms for group in groups)
    before = run(specimen, model, 1)
    values = {g.key: torch.full((g.units,), 0.7, requires_grad=True) for g in groups}
    with Masks(model, groups) as masks:
        masks.set(values)
        loss = specimen.outputs(model(**specimen.inputs()))[0].square().sum()
        gradients = torch.autograd.grad(loss, list(values.values()))
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients)
    assert equal(run(specimen, model, 1), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def _pruned(specimen, model, **settings):
    values = {"method": "magnitude", "ratio": 0.15, "multiple": 4, **settings}
    return prune(model, Pruning(**values), prompts=[specimen.inputs()])


@pytest.mark.parametrize("originals", ["cpu", "disk", "device"])
def test_plan_is_applied_undone_saved_and_loaded(tmp_path, originals):
    specimen = ZOO["wan"]
    model = specimen.build()
    before, state = run(specimen, model, 1), {n: t.clone() for n, t in model.state_dict().items()}
    plan = _pruned(specimen, model)
    assert Plan.load(plan.save(tmp_path)) == plan
    with accelerate(model, plan, originals=originals) as accel:
        pruned = run(specimen, model, 1)
        assert change(pruned, before) > 0.01
        facts = accel.report().to_dict()["techniques"]["pruning"]
        assert facts["parameters_after"] < 0.86 * facts["parameters_before"]
        assert facts["parameters_after"] == sum(p.numel() for p in model.parameters())
        saved = model.state_dict()  # of the model as it was, in its order
        assert list(saved) == list(state) and all(torch.equal(saved[n], state[n]) for n in state)
        with pytest.raises(PlanError, match="remove"):
            model.load_state_dict(state)
    assert equal(run(specimen, model, 1), before)
    assert list(model.state_dict()) == list(state)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            assert layer.weight.shape == (layer.out_features, layer.in_features)

    accelerate(model, plan).bake()
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert change(run(specimen, loaded, 1), pruned) < 1e-6
    assert sum(p.numel() for p in loaded.parameters()) == facts["parameters_after"]
    assert [s.role for s in find_denoisers(loaded)[0].layers] == [s.role for s in find_denoisers(model)[0].layers]
    again = _pruned(specimen, loaded, units="sublayer")  # what was pruned may be pruned further
    accelerate(loaded, again).bake()
    loaded.save_pretrained(tmp_path / "again")
    assert change(run(specimen, type(model).from_pretrained(tmp_path / "again"), 1), run(specimen, loaded, 1)) < 1e-6


@pytest.mark.parametrize(
    ("name", "says"), [("flux", "num_single_layers"), ("hunyuan_dit", None), ("sd3", "num_layers")]
)
def test_a_depth_cut_is_a_plain_config_where_one_can_say_it(tmp_path, name, says):
    specimen = ZOO[name]
    model = specimen.build()
    before = run(specimen, model, 1)
    plan = _pruned(specimen, model, units="block", method="hierarchy", ratio=0.12 if name == "flux" else 0.2)
    with accelerate(model, plan):
        pruned = run(specimen, model, 1)
    assert equal(run(specimen, model, 1), before)
    accelerate(model, plan).bake()
    assert change(run(specimen, model, 1), pruned) < 1e-6
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert ("quantization_config" in config) == (says is None)
    if says:
        assert config[says] == specimen.config[says] - 1
    assert change(run(specimen, type(model).from_pretrained(tmp_path), 1), pruned) < 1e-6


@pytest.mark.filterwarnings("ignore:diffaccel")
@pytest.mark.parametrize("name", ["flux", "unet_sd15"])
def test_pruned_first_then_the_others(tmp_path, name):
    specimen = ZOO[name]
    model = specimen.build()
    before = run(specimen, model, 4)
    plan = _pruned(specimen, model, units="heads neurons sublayer resnet")
    plan = dataclasses.replace(plan, pruning=(*plan.pruning, LowRank(sites="attn.q", ratio=0.5)))
    with accelerate(model, plan):
        pruned = run(specimen, model, 1)
    plan = dataclasses.replace(
        plan, quantization=[Quantize()], caching=StepCache(threshold=100, max_skips=2, min_steps=1)
    )
    with accelerate(model, plan) as accel:
        assert 0 < change(run(specimen, model, 1), pruned) < 0.2
        run(specimen, model, 4)
        assert [t.technique for t in accel.report().techniques] == ["pruning", "quantization", "caching"]
        assert accel.report().techniques[0].facts["low_rank"] > 0
    assert equal(run(specimen, model, 4), before)
    accelerate(model, plan.without("caching")).bake()
    baked = run(specimen, model, 1)
    model.save_pretrained(tmp_path)
    assert change(run(specimen, type(model).from_pretrained(tmp_path), 1), baked) < 1e-6


def test_low_rank_is_the_best_approximation():
    specimen = ZOO["pixart_sigma"]
    model = specimen.build()
    before = run(specimen, model, 1)
    weight = model.transformer_blocks[0].ff.net[2].weight.clone()
    with accelerate(model, Plan(pruning=LowRank(sites="ff.out", ratio=0.5, multiple=8))) as accel:
        two = model.transformer_blocks[0].ff.net[2]
        product = two.up.weight @ two.down.weight
        u, s, v = torch.linalg.svd(weight)
        rank = two.down.out_features
        assert rank % 8 == 0 and rank * sum(weight.shape) < 0.7 * weight.numel()
        torch.testing.assert_close(product, u[:, :rank] * s[:rank] @ v[:rank], atol=1e-5, rtol=1e-4)
        assert accel.report().techniques[0].facts["low_rank"] == 3
        assert 0 < change(run(specimen, model, 1), before) < 1
    assert equal(run(specimen, model, 1), before)
    with pytest.raises(PlanError, match="no linear smaller"):
        accelerate(model, Plan(pruning=LowRank(sites="ff.out", energy=1.0)))


@pytest.mark.parametrize("method", ["activation", "taylor", "random", "magnitude"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_budget_is_met(method, scope):
    specimen = ZOO["pixart_sigma"]
    model = specimen.build()
    plan = _pruned(specimen, model, method=method, scope=scope, ratio=0.25, multiple=8)
    assert plan == _pruned(specimen, model, method=method, scope=scope, ratio=0.25, multiple=8)
    with accelerate(model, plan) as accel:
        facts = accel.report().techniques[0].facts
        assert facts["parameters_after"] / facts["parameters_before"] == pytest.approx(0.75, abs=0.06)
        for block in model.transformer_blocks:
            assert block.ff.net[2].in_features % 8 == 0


def test_scores_find_what_does_nothing():
    """A neuron whose weights are zero, and a head whose output nobody reads, go first."""
    specimen = ZOO["pixart_sigma"]
    model = specimen.build()
    with torch.no_grad():
        model.transformer_blocks[1].ff.net[2].weight[:, 8:40] = 0
        model.transformer_blocks[2].attn1.to_out[0].weight[:, 16:32] = 0
    before = run(specimen, model, 1)
    for method in ("taylor", "evolution"):
        plan = _pruned(specimen, model, method=method, ratio=0.032, multiple=8)
        with accelerate(model, plan):
            assert change(run(specimen, model, 1), before) < 1e-5
    replaced = _pruned(specimen, model, method="hierarchy", units="sublayer", ratio=0.05, protect=0.34)
    assert all("blocks.0" not in name for name in replaced.artefacts)


def test_operations_and_seconds_as_budgets():
    specimen = ZOO["pixart_sigma"]
    model = specimen.build()
    (denoiser,) = find_denoisers(model)
    groups = groups_of(denoiser)
    inputs = specimen.inputs()

    def call():
        return model(**inputs)

    costs = costs_of(denoiser, groups, "flops", call)
    tokens, width = 64, 64
    by_key = {g.key: g for g in groups}
    neurons = next(k for k, g in by_key.items() if g.kind == "neurons")
    assert costs.each[neurons] == 2 * tokens * 2 * width  # a row and a column
    assert sum(costs.each[k] * g.units for k, g in by_key.items()) < costs.total
    seconds = costs_of(denoiser, groups, "latency", call)
    assert seconds.total > 0 and set(seconds.each) == set(by_key)


def test_choice_prefers_what_is_cheap_to_lose():
    specimen = ZOO["pixart_sigma"]
    groups = groups_of(Denoiser.of(specimen.build(), "denoiser"), ("neurons",))
    scores = {g.key: torch.arange(g.units).float() + 1 for g in groups}
    scores[groups[0].key] *= 100
    costs = Costs({g.key: 1.0 for g in groups}, float(sum(g.units for g in groups)))
    kept = choose(groups, scores, costs, 0.3, 8, "global")
    assert groups[0].key not in kept  # all of it matters more
    assert all(torch.equal(k, torch.arange(256 - len(k), 256)) and len(k) % 8 == 0 for k in kept.values())
    with pytest.raises(PlanError, match="cannot be cut"):
        choose(groups, scores, costs, 0.95, 8, "global")


def test_refusals_change_nothing():
    specimen = ZOO["pixart_sigma"]
    model = specimen.build()
    before, inputs = run(specimen, model, 1), [specimen.inputs()]
    with pytest.raises(PlanError, match=r"diffaccel\.prune"):
        accelerate(model, Plan(pruning=Pruning()))
    for bad in (dict(ratio=0), dict(units="toes"), dict(method="guess"), dict(scope="layer", units="block")):
        with pytest.raises(PlanError):
            Pruning(**bad)
    with pytest.raises(PlanError, match="cannot be cut"):
        prune(model, Pruning(method="magnitude", ratio=0.95), prompts=inputs)
    plan = _pruned(specimen, model)
    other = ZOO["wan"].build()
    with pytest.raises(PlanError, match="another model"):
        accelerate(other, dataclasses.replace(plan, key=None))
    accel = accelerate(model, plan)
    with pytest.raises(PlanError, match="remove"):
        prune(model, Pruning(method="magnitude"), prompts=inputs)
    accel.remove()
    model.transformer_blocks[0].ff.net[2].weight = model.transformer_blocks[1].ff.net[2].weight
    with pytest.raises(DiffAccelError, match="shared"):
        accelerate(model, dataclasses.replace(plan, key=None))
    model = specimen.build()
    assert equal(run(specimen, model, 1), before)


@pytest.mark.filterwarnings("ignore:diffaccel")
def test_a_failure_further_on_puts_everything_back():
    specimen = ZOO["pixart_sigma"]
    model = specimen.build()
    before = run(specimen, model, 1)
    plan = _pruned(specimen, model)
    with pytest.raises(PlanError, match="matches none"):
        accelerate(model, dataclasses.replace(plan, quantization=[Quantize(sites="nothing")]))
    assert equal(run(specimen, model, 1), before)
    accelerate(model, plan).remove()


@pytest.mark.filterwarnings("ignore:diffaccel")
def test_what_is_left_is_calibrated_and_quantized():
    """Balanced channels of a pruned model: those of the neurons that stay."""
    specimen = PIPELINES["pixart_sigma"]
    pipe = specimen.build()
    before = specimen.call(pipe, steps=2)
    call = {k: v for k, v in specimen.arguments(steps=2).items() if k not in ("generator", "prompt", "output_type")}
    plan = prune(pipe, Pruning(ratio=0.15, method="magnitude"), prompts=["a red circle"], **call)
    plan = dataclasses.replace(plan, quantization=[Quantize(balance=0.5)])
    plan = calibrate(pipe, plan, prompts=["a red circle"], **call)
    widths = {len(t) for n, t in plan.artefacts.items() if "ff.net.2" in n and not n.startswith("pruning.")}
    assert widths and max(widths) <= 256 and any(w < 256 for w in widths)
    with accelerate(pipe, plan) as accel:
        assert torch.isfinite(specimen.call(pipe, steps=2)).all()
        assert [t.technique for t in accel.report().techniques] == ["pruning", "quantization"]
    assert torch.equal(specimen.call(pipe, steps=2), before)


def test_ways_of_running(tmp_path):
    """A dtype that changes while attached, layerwise casting, offloading by group, a LoRA, compiled, from disk."""
    specimen = ZOO["pixart_sigma"]
    plan = _pruned(specimen, specimen.build())
    model = specimen.build().to(torch.bfloat16)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    with accelerate(model, dataclasses.replace(plan, key=None)):
        assert all(p.dtype == torch.bfloat16 for p in model.parameters())
        model.to(torch.float32)  # what comes back follows
    assert all(torch.equal(t, state[n].float()) for n, t in model.state_dict().items())

    model = specimen.build()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    before = run(specimen, model, 1)
    with accelerate(model, dataclasses.replace(plan, key=None)):
        assert all(torch.isfinite(t).all() for t in run(specimen, model, 1)[0])
    assert equal(run(specimen, model, 1), before)

    model = specimen.build()
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(PlanError, match="offload"):
        accelerate(model, plan)
    model = specimen.build()
    add_lora(Denoiser.of(model, "transformer"), 4, "ff.out", 0)
    with pytest.raises(PlanError, match="LoRA"):
        accelerate(model, dataclasses.replace(plan, key=None))

    model = specimen.build()
    before = run(specimen, model, 1)
    whole = _pruned(specimen, model, units="block sublayer", method="random")
    with accelerate(model, whole, originals="disk"):
        compiled = torch.compile(model, backend="eager")
        outputs = [specimen.outputs(m(**specimen.inputs())) for m in (compiled, model)]
        assert relative(*outputs) < 1e-5
    assert equal(run(specimen, model, 1), before)

"""`accelerate` as a whole: attaching, restoring to the bit, and refusing before anything changes."""

import copy
import threading

import pytest
import torch
from diffusers import PixArtSigmaPipeline
from torch import nn
from zoo import ZOO

import diffaccel
from diffaccel import BlockSparse, ModelError, Plan, PlanError, Quantize, StepCache, accelerate
from diffaccel.assets import path
from diffaccel.denoiser import find_denoisers
from diffaccel.key import plan_key

ALL = Plan(
    quantization=[Quantize()],
    attention=[BlockSparse(density=0.5, steps=(0.0, 1.0), block_size=16)],
    caching=StepCache(threshold=100, min_steps=1),
)


def trace(model):
    """Everything about a model that an acceleration might leave behind."""
    return {
        name: (type(module), sorted(set(vars(module)) - {"_diffusers_hook"}), list(module._modules), dict(vars(module)))
        if not name
        else (type(module), id(module), sorted(vars(module)), list(module._modules), list(module._forward_hooks))
        for name, module in model.named_modules()
    }


def out(specimen, model):
    with torch.no_grad():
        return specimen.outputs(model(**specimen.inputs()))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def loaded():
    pipe = PixArtSigmaPipeline.from_pretrained(path("shapes-image"), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(loaded):
    yield loaded
    loaded.transformer.__dict__.pop("_diffaccel", None)  # so that one failing test does not fail the next


def draw(pipe, seed=0, steps=8, **kwargs):
    return pipe(
        "a large red circle on the left on a gray background",
        num_inference_steps=steps,
        height=256,
        width=256,
        max_sequence_length=32,
        use_resolution_binning=False,
        clean_caption=False,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        **kwargs,
    ).images


def test_everything_together_on_a_pipeline_comes_off_to_the_bit(pipe):
    before, state = draw(pipe), {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    left_behind = trace(pipe.transformer)
    scheduler = dict(vars(pipe.scheduler))
    accel = accelerate(pipe, ALL)
    fast = draw(pipe)
    assert torch.isfinite(fast).all() and not torch.equal(fast, before)
    report = accel.report().to_dict()
    assert set(report["techniques"]) == {"quantization", "attention", "caching"}
    assert report["techniques"]["caching"]["reused"] > 0
    accel.remove()
    accel.remove()  # a second call does nothing
    assert torch.equal(draw(pipe), before)
    after = pipe.transformer.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[k], state[k]) for k in state)
    assert trace(pipe.transformer) == left_behind
    assert set(vars(pipe.scheduler)) == set(scheduler)


def test_the_context_manager_removes_even_after_an_error(pipe):
    before = draw(pipe)
    with pytest.raises(RuntimeError, match="mine"), accelerate(pipe, ALL):
        raise RuntimeError("mine")
    assert torch.equal(draw(pipe), before)


def test_an_error_in_the_middle_of_a_run_leaves_no_trace(pipe):
    before = draw(pipe)

    def fail(pipe, step, t, kwargs):
        if step == 3:
            raise KeyboardInterrupt
        return kwargs

    with accelerate(pipe, Plan(caching=StepCache(threshold=100, min_steps=1))) as accel:
        first = draw(pipe)
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, callback=lambda step, t, latents: fail(pipe, step, t, {}), callback_steps=1)
        assert torch.equal(draw(pipe), first)
        assert accel.report().techniques[0].facts["reused"] > 0
    assert torch.equal(draw(pipe), before)


@pytest.mark.parametrize("failing", ["attention", "caching"])
def test_a_failure_while_attaching_leaves_the_model_as_it_was(failing, monkeypatch):
    specimen = ZOO["pixart_sigma"]
    model = specimen.build()
    before, left_behind = out(specimen, model), trace(model)
    module = diffaccel.attach._MODULES[failing]

    def broken(*args):
        raise RuntimeError("no memory")

    monkeypatch.setattr(module, "attach", broken)
    with pytest.raises(RuntimeError, match="no memory"):
        accelerate(model, ALL)
    assert trace(model) == left_behind
    assert same(out(specimen, model), before)


def test_an_empty_plan_attaches_nothing(pipe):
    left_behind = trace(pipe.transformer)
    accel = accelerate(pipe, Plan())
    assert vars(pipe.transformer).keys() - left_behind[""][3].keys() == {"_diffaccel"}
    assert "nothing applied" in str(accel.report())
    accel.remove()
    assert trace(pipe.transformer) == left_behind


def test_refusals_change_nothing(pipe, tmp_path):
    left_behind = trace(pipe.transformer)
    other = find_denoisers(ZOO["flux"].build())
    cases = [
        ("turbo", "no preset 'turbo'"),
        ("./nowhere", "no plan at"),
        (tmp_path / "missing", "no plan at"),
        (3, "must be a preset name"),
        (Plan(quantization=[Quantize(sites="attn.qqq")]), r"matches none.*roles present: attn\.k"),
        (Plan(attention=[BlockSparse(sites="cross")]), "cross"),
        (Plan(caching=StepCache(policy="mag")), "calibrate"),
        (Plan(caching=StepCache(), key=plan_key(other)), "another model"),
    ]
    for plan, message in cases:
        with pytest.raises(PlanError, match=message):
            accelerate(pipe, plan)
        assert trace(pipe.transformer) == left_behind
    with pytest.raises(PlanError, match="originals='attic'"):
        accelerate(pipe, Plan(), originals="attic")
    with pytest.raises(ModelError):
        accelerate(nn.Module, Plan())


def test_applying_twice_is_refused(pipe):
    with accelerate(pipe, Plan(caching=StepCache())) as accel:
        with pytest.raises(PlanError, match="already accelerated"):
            accelerate(pipe, Plan())
        with pytest.raises(PlanError, match="already accelerated"):
            accelerate(pipe.transformer, Plan())
        assert accel.report().techniques
    accelerate(pipe, Plan()).remove()


@pytest.mark.parametrize("plan", [ALL, Plan(attention=ALL.attention), Plan(caching=ALL.caching)])
def test_copying_an_accelerated_model_is_refused(plan):
    specimen = ZOO["flux"]
    model = specimen.build()
    before = out(specimen, model)
    with accelerate(model, plan), pytest.raises(PlanError, match="cannot be copied"):
        copy.deepcopy(model)
    twin = copy.deepcopy(model)
    twin.proj_out.weight.add_(1)
    assert not same(out(specimen, twin), before) and same(out(specimen, model), before)


def test_remove_after_bake_is_refused():
    specimen = ZOO["dit"]
    model = specimen.build()
    accel = accelerate(model, Plan(quantization=[Quantize()]))
    fast = out(specimen, model)
    accel.bake()
    assert same(out(specimen, model), fast)
    with pytest.raises(PlanError, match="bake"):
        accel.remove()
    with accelerate(model, Plan(caching=StepCache())):  # further techniques may follow
        assert same(out(specimen, model), fast)
    assert same(out(specimen, model), fast)


def test_saved_plan_by_path(pipe, tmp_path):
    plan = Plan(caching=StepCache(threshold=0.2))
    plan.save(tmp_path / "plan")
    with accelerate(pipe, str(tmp_path / "plan")) as accel:
        assert accel.plan == plan


def test_a_key_for_other_weights_only_warns(pipe):
    key = copy.deepcopy(plan_key(find_denoisers(pipe)))
    key["denoisers"]["transformer"]["weights"] = "0"
    with (
        pytest.warns(UserWarning, match="weights differ"),
        accelerate(pipe, Plan(caching=StepCache(), key=key)) as accel,
    ):
        assert any("weights differ" in note for note in accel.report().notes)


def test_two_models_of_a_class_in_two_threads_never_touch_each_other():
    specimen = ZOO["wan"]
    models = [specimen.build(), specimen.build()]
    before = [out(specimen, m) for m in models]
    plans = [Plan(attention=[BlockSparse(density=0.3, steps=(0, 1), block_size=16)]), Plan(quantization=[Quantize()])]
    expected = []
    for model, plan in zip(models, plans, strict=True):
        with accelerate(model, plan):
            expected.append(out(specimen, model))
    handles = [accelerate(m, p) for m, p in zip(models, plans, strict=True)]
    results = [[], []]

    def work(i):
        for _ in range(5):
            results[i].append(out(specimen, models[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert len(results[i]) == 5 and all(same(r, expected[i]) for r in results[i])
    handles[0].remove()  # restored in the order of attaching, not its reverse
    assert same(out(specimen, models[1]), expected[1])
    handles[1].remove()
    assert [same(out(specimen, m), b) for m, b in zip(models, before, strict=True)] == [True, True]


@pytest.mark.parametrize("name", ["lossless", "balanced", "fast"])
def test_presets_work_on_any_denoiser(name):
    for specimen in (ZOO["flux"], ZOO["unet_sd15"]):
        model = specimen.build()
        before = out(specimen, model)
        with accelerate(model, name) as accel:
            assert all(torch.isfinite(t).all() for t in out(specimen, model))
            assert accel.report().plan == name
        assert same(out(specimen, model), before)

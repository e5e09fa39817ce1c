"""The ways people run pipelines: each works under acceleration, or is refused before anything changes."""

import copy
from contextlib import nullcontext

import diffusers
import pytest
import torch
from diffusers import AutoPipelineForImage2Image
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from peft import LoraConfig, inject_adapter_in_model
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from zoo import ZOO
from zoo_pipelines import PIPELINES

from diffaccel import BlockSparse, DiffAccelError, Plan, PlanError, Quantize, StepCache, accelerate

QUANTIZE = Plan(quantization=[Quantize()])
SPARSE = Plan(attention=[BlockSparse(density=0.5, steps=(0.0, 1.0), block_size=16)])
CACHE = Plan(caching=StepCache(threshold=100, max_skips=2, min_steps=1))
TOGETHER = Plan(quantization=QUANTIZE.quantization, attention=SPARSE.attention, caching=CACHE.caching)
PLANS = {"quantization": QUANTIZE, "attention": SPARSE, "caching": CACHE, "together": TOGETHER}

pytestmark = pytest.mark.filterwarnings("ignore:diffaccel")
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


def call(name, pipe, steps=6, **overrides):
    return PIPELINES[name].call(pipe, steps=steps, **overrides)


def out(specimen, model, **kwargs):
    with torch.no_grad():
        return specimen.outputs(model(**specimen.inputs(**kwargs)))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- offloading -----------------------------------------------------------------------------------------------------


@every_plan
def test_group_offload_after(plan):
    pipe = PIPELINES["wan"].build()
    before = call("wan", pipe)
    with accelerate(pipe, plan):
        fast = call("wan", pipe)
        pipe.transformer.enable_group_offload(
            onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
        )
        assert torch.equal(call("wan", pipe), fast)
    assert torch.equal(call("wan", pipe), before)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@every_plan
def test_group_offload_before(plan, kind):
    pipe = PIPELINES["wan"].build()
    before = call("wan", pipe)
    options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    pipe.transformer.enable_group_offload(onload_device=torch.device("cpu"), offload_type=kind, **options)
    if plan.quantization:
        with pytest.raises(PlanError, match="group offloading"):
            accelerate(pipe, plan)
    else:
        with accelerate(pipe, plan):
            fast = call("wan", pipe)
            assert torch.isfinite(fast).all() and not torch.equal(fast, before)
    assert torch.equal(call("wan", pipe), before)


def _sequential(model):
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device("cpu"))


@every_plan
def test_sequential_offload_before(plan):
    specimen = ZOO["pixart_sigma"]
    model = specimen.build()
    before = out(specimen, model)
    _sequential(model)
    if plan.quantization:
        with pytest.raises(PlanError, match="sequential offload"):
            accelerate(model, plan)
    else:
        with accelerate(model, plan):
            assert all(torch.isfinite(t).all() for t in out(specimen, model))
    assert same(out(specimen, model), before)


@every_plan
def test_sequential_offload_after(plan):
    specimen = ZOO["pixart_sigma"]
    model = specimen.build()
    with accelerate(model, plan):
        fast = out(specimen, model)
        _sequential(model)
        assert same(out(specimen, model), fast)


# --- dtypes and foreign quantization --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_plan
def test_half_precision(plan, dtype):
    specimen = ZOO["flux"]
    model = specimen.build().to(dtype)

    def run():
        with torch.no_grad():
            kwargs = {k: v.to(dtype) if "ids" not in k else v for k, v in specimen.inputs(batch=2).items()}
            return model(**kwargs)[0]

    before = run()
    with accelerate(model, plan):
        fast = run()
        assert fast.dtype == dtype and torch.isfinite(fast).all()
        assert (fast - before).float().norm() < 0.5 * before.float().norm()
    assert torch.equal(run(), before)


@every_plan
def test_layerwise_casting(plan):
    specimen = ZOO["sd3"]
    model = specimen.build()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    before = out(specimen, model)
    if plan.quantization:
        with pytest.raises(PlanError, match="layerwise casting"):
            accelerate(model, plan)
    else:
        with accelerate(model, plan):
            assert all(torch.isfinite(t).all() for t in out(specimen, model))
    assert same(out(specimen, model), before)


@every_plan
def test_weights_quantized_by_torchao(plan):
    specimen = ZOO["pixart_sigma"]
    model = specimen.build()
    quantize_(model, Int8WeightOnlyConfig())
    before = out(specimen, model)
    if plan.quantization:
        with pytest.raises(PlanError, match="already quantized"):
            accelerate(model, plan)
    else:
        with accelerate(model, plan):
            assert all(torch.isfinite(t).all() for t in out(specimen, model))
    assert same(out(specimen, model), before)


# --- LoRA -----------------------------------------------------------------------------------------------------------


def _adapter(model):
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False), model)


@every_plan
def test_lora_before(plan):
    specimen = ZOO["pixart_sigma"]
    model = specimen.build()
    plain = out(specimen, model)
    torch.manual_seed(0)
    _adapter(model)
    before = out(specimen, model)
    assert not same(before, plain)
    with accelerate(model, plan):
        assert all(torch.isfinite(t).all() for t in out(specimen, model))
    assert same(out(specimen, model), before)


@every_plan
def test_lora_after(plan):
    specimen = ZOO["pixart_sigma"]
    model, twin = specimen.build(), specimen.build()
    torch.manual_seed(0)
    _adapter(twin)
    with accelerate(model, plan):
        fast = out(specimen, model)
        torch.manual_seed(0)
        _adapter(model)
        assert not same(out(specimen, model), fast)
    assert same(out(specimen, model), out(specimen, twin))  # the adapter stays, the acceleration goes


# --- pipelines ------------------------------------------------------------------------------------------------------


@every_plan
def test_from_pipe_shares_the_acceleration(plan):
    pipe = PIPELINES["sd15"].build()
    before = call("sd15", pipe)
    accel = accelerate(pipe, plan)
    other = AutoPipelineForImage2Image.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert torch.isfinite(call("sd15_img2img", other)).all()
    with pytest.raises(PlanError, match="already accelerated"):
        accelerate(other, plan)
    accel.remove()
    assert torch.equal(call("sd15", pipe), before)


def test_img2img_counts_steps_in_the_full_schedule():
    pipe = PIPELINES["sd15_img2img"].build()
    with accelerate(pipe, CACHE) as accel:
        call("sd15_img2img", pipe, steps=10, strength=0.5)
        first = accel.report().techniques[0].facts["computed"]
        assert first + accel.report().techniques[0].facts["reused"] == 5
        assert accel.clock.call({}, None, None).steps == 10


@every_plan
def test_both_denoisers_of_a_two_expert_pipeline(plan):
    pipe = PIPELINES["wan22"].build()
    before = call("wan22", pipe, steps=8)
    with accelerate(pipe, plan) as accel:
        fast = call("wan22", pipe, steps=8)
        assert torch.isfinite(fast).all() and not torch.equal(fast, before)
        assert set(accel.report().denoisers) == {"transformer", "transformer_2"}
        assert all(calls > 0 for calls in accel.report().calls.values()) or not accel._context.roots
    assert torch.equal(call("wan22", pipe, steps=8), before)


@every_plan
@pytest.mark.parametrize("name", ["flux", "unet_sd15", "wan", "cogvideox"])
def test_sizes_may_change_between_calls(plan, name):
    specimen = ZOO[name]
    model = specimen.build()
    sizes = [{"batch": 1}, {"batch": 2}, {"batch": 1, "size": "odd"}, {"batch": 1}]
    before = [out(specimen, model, **size) for size in sizes]
    with accelerate(model, plan):
        for size, expected in zip(sizes, before, strict=True):
            outputs = out(specimen, model, **size)
            assert [t.shape for t in outputs] == [t.shape for t in expected]
            assert all(torch.isfinite(t).all() for t in outputs)
    assert all(same(out(specimen, model, **s), b) for s, b in zip(sizes, before, strict=True))


def test_the_scheduler_may_be_replaced_while_attached():
    pipe = PIPELINES["sd15"].build()
    with accelerate(pipe, CACHE) as accel:
        pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        call("sd15", pipe, steps=9)
        facts = accel.report().techniques[0].facts
        assert facts["computed"] + facts["reused"] == 9
    assert not any("step" in vars(s) for s in [pipe.scheduler])


def test_a_copied_scheduler_is_not_watched():
    pipe = PIPELINES["sd15"].build()
    with accelerate(pipe, CACHE) as accel:
        run = accel.clock.run
        twin = copy.deepcopy(pipe.scheduler)
        twin.set_timesteps(5)
        assert accel.clock.run == run


def test_processors_set_while_attached_are_learned_anew():
    pipe = PIPELINES["sd15"].build()
    before = call("sd15", pipe)
    with accelerate(pipe, SPARSE) as accel:
        fast = call("sd15", pipe)
        counted = accel.report().techniques[0].facts["calls_sparse"]
        own = pipe.unet.attn_processors
        pipe.enable_attention_slicing()  # processors that do not call PyTorch's attention
        with pytest.raises(DiffAccelError, match="none of them called scaled_dot_product_attention"):
            call("sd15", pipe)
        assert accel.report().techniques[0].facts["calls_sparse"] == counted
        pipe.unet.set_attn_processor(own)
        assert torch.equal(call("sd15", pipe), fast)
        assert accel.report().techniques[0].facts["calls_sparse"] == 2 * counted
    assert torch.equal(call("sd15", pipe), before)


def test_the_backend_of_processors_set_while_attached_is_set_aside_and_left_afterwards():
    specimen = ZOO["wan"]
    model = specimen.build()
    with accelerate(model, SPARSE) as accel:
        fast = out(specimen, model)
        new = WanAttnProcessor()
        new._attention_backend = AttentionBackendName.FLEX
        model.set_attn_processor(new)
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(out(specimen, model), fast, strict=True))
        assert new._attention_backend is AttentionBackendName.NATIVE
        assert any("backend flex" in note for note in accel.report().techniques[0].notes)
    assert new._attention_backend is AttentionBackendName.FLEX


# --- compile --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
@every_plan
def test_compiled_blocks(plan, when):
    torch._dynamo.reset()
    specimen = ZOO["flux"]
    model = specimen.build()
    before = out(specimen, model)
    with accelerate(model, plan) if when == "after" else nullcontext():
        expected = out(specimen, model)
        model.compile_repeated_blocks(backend="eager")
        if when == "after":
            assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(out(specimen, model), expected, strict=True))
            with torch.compiler.set_stance("fail_on_recompile"):
                out(specimen, model)
    if when == "before":
        with accelerate(model, plan):
            out(specimen, model)
            with torch.compiler.set_stance("fail_on_recompile"):
                assert all(torch.isfinite(t).all() for t in out(specimen, model))
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(out(specimen, model), before, strict=True))


@pytest.mark.parametrize("how", ["torch.compile", "module.compile"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("plan", [CACHE, TOGETHER], ids=["caching", "together"])
def test_compiled_whole(plan, when, how):
    torch._dynamo.reset()
    pipe = PIPELINES["pixart_sigma"].build()
    before = call("pixart_sigma", pipe, steps=4)

    def compile_it():
        if how == "torch.compile":
            pipe.transformer = torch.compile(pipe.transformer, backend="eager")
        else:
            pipe.transformer.compile(backend="eager")

    if when == "before":
        compile_it()
    with accelerate(pipe, plan) as accel:
        if when == "after":
            compile_it()
        fast = call("pixart_sigma", pipe, steps=4)
        assert torch.isfinite(fast).all() and not torch.equal(fast, before)
        assert accel.report().techniques[0].sites > 0
    assert torch.allclose(call("pixart_sigma", pipe, steps=4), before, atol=1e-4)

"""W8A8 linears: close, small, undone to the bit, saved in both forms, and refused where they cannot work."""

import ctypes
import gc
import platform
import subprocess
import sys
from functools import partial

import pytest
import torch
from diffusers import FluxPipeline, PipelineQuantizationConfig, PixArtTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from zoo import ZOO

import diffaccel.quantization.attach as quantization
from diffaccel import DiffAccelConfig, DiffAccelError, ModelError, Plan, PlanError, Quantize, accelerate
from diffaccel.denoiser import Denoiser
from diffaccel.quantization.layer import QuantizedLayer
from diffaccel.quantization.worth import worth_it

PLAN = Plan(quantization=[Quantize()])
# Of every kind: UNets, MMDiT, cross-attention DiTs, video, packed latents. Eight bits give about 40 dB a layer where
# weights and activations are near normal, as here.
MODELS = (
    *("pixart_alpha", "pixart_sigma", "flux", "sd3", "unet_sd15", "unet_sdxl", "unet_3d", "wan", "wan_ti2v"),
    *("cogvideox", "hunyuan_video", "cosmos", "skyreels_v2"),
)
SQNR = 25.0

pytestmark = pytest.mark.filterwarnings("ignore:diffaccel")


def out(specimen, model, **kwargs):
    with torch.no_grad():
        return specimen.outputs(model(**specimen.inputs(**kwargs)))


def sqnr(reference, outputs):
    """Worst over the outputs, in dB."""
    pairs = [(a.double(), b.double()) for a, b in zip(reference, outputs, strict=True)]
    return min(float(10 * torch.log10(a.square().sum() / (a - b).square().sum())) for a, b in pairs)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def alike(a, b):
    """Equal but for the last bits: weights read from a file lie at other addresses, by which some CPU kernels round."""
    return sqnr(a, b) > 100


def snapshot(model):
    """What must be as before: modules, their attributes and the identity and bits of parameters."""
    return {
        "modules": [
            (n, type(m), sorted(m.__dict__), list(m._buffers), sorted(m._non_persistent_buffers_set))
            for n, m in model.named_modules()
        ],
        "parameters": [(n, id(p), p.detach().clone(), p.stride()) for n, p in model.named_parameters()],
        "hooks": [len(m._load_state_dict_pre_hooks) for m in model.modules()],
    }


def unchanged(model, before):
    now = snapshot(model)
    assert now["modules"] == before["modules"] and now["hooks"] == before["hooks"]
    for (n, i, value, stride), (m, j, old, old_stride) in zip(now["parameters"], before["parameters"], strict=True):
        assert (n, i, stride) == (m, j, old_stride) and torch.equal(value, old)
    return True


def pixart():
    return ZOO["pixart_sigma"], ZOO["pixart_sigma"].build()


def quantized(model):
    return [m for m in model.modules() if isinstance(m, QuantizedLayer)]


# --- close, and back to the bit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_close_and_restored(name):
    specimen = ZOO[name]
    model = specimen.build()
    start, before = snapshot(model), out(specimen, model, batch=2)
    originals = ("cpu", "disk", "device")[MODELS.index(name) % 3]
    with accelerate(model, PLAN, originals=originals) as accel:
        report = accel.report().techniques[0]
        assert report.sites == len(quantized(model)) > 0
        assert report.facts["bytes_after"] <= 0.3 * report.facts["bytes_before"]
        after = out(specimen, model, batch=2)
        assert SQNR < sqnr(before, after) < 120
        assert report.facts["activation_bits"] in (7, 8) and accel.report().techniques[0].facts["kernels"]
    assert unchanged(model, start)
    assert same(out(specimen, model, batch=2), before)


@pytest.mark.parametrize("originals", ["cpu", "disk", "device"])
def test_state_dict_is_the_original_while_attached(originals, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    specimen, model = pixart()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    accel = accelerate(model, PLAN, originals=originals)
    weight = model.transformer_blocks[0].ff.net[2]
    assert bool(list(tmp_path.iterdir())) == (originals == "disk")
    assert (weight.parked.parameter.numel() == 0) == (originals == "disk")
    now = model.state_dict()
    assert list(now) == list(before) and all(torch.equal(now[k], before[k]) for k in before)
    model.save_pretrained(tmp_path / "saved")
    accel.remove()
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]  # the temporary folder is gone
    loaded = PixArtTransformer2DModel.from_pretrained(tmp_path / "saved")
    assert alike(out(specimen, loaded), out(specimen, model)) and "quantization_config" not in loaded.config


@pytest.mark.parametrize("originals", ["cpu", "disk"])
def test_a_failure_in_the_middle_leaves_nothing(monkeypatch, originals):
    specimen, model = pixart()
    start, before = snapshot(model), out(specimen, model)
    real, calls = quantization.become_quantized, []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 5:
            raise MemoryError("no memory left")
        real(*args, **kwargs)

    monkeypatch.setattr(quantization, "become_quantized", failing)
    with pytest.raises(MemoryError):
        accelerate(model, PLAN, originals=originals)
    assert unchanged(model, start) and same(out(specimen, model), before)


def test_restored_from_disk_to_the_same_place_in_a_cache_line():
    """Weights of a loaded model begin anywhere, and some CPU kernels round by where."""
    specimen, model = pixart()
    layer = model.transformer_blocks[0].attn1.to_q
    buffer = torch.zeros(layer.weight.numel() + 16)
    at = (56 - buffer.data_ptr()) % 64 // 4
    layer.weight.data = buffer[at : at + layer.weight.numel()].view_as(layer.weight).copy_(layer.weight.data)
    before = out(specimen, model)
    with accelerate(model, PLAN, originals="disk"):
        out(specimen, model)
    assert layer.weight.data_ptr() % 64 == 56 and same(out(specimen, model), before)


def test_a_full_disk_leaves_nothing(monkeypatch):
    _, model = pixart()
    start = snapshot(model)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffaccel.originals.save_file", full)
    with pytest.raises(DiffAccelError, match="TMPDIR"):
        accelerate(model, PLAN, originals="disk")
    assert unchanged(model, start)


def test_weights_that_are_not_finite_are_refused():
    _, model = pixart()
    model.transformer_blocks[1].attn1.to_k.weight.data[3, 3] = float("nan")
    before = snapshot(model)
    with pytest.raises(PlanError, match=r"transformer_blocks\.1\.attn1\.to_k holds weights that are not finite"):
        accelerate(model, PLAN)
    before["parameters"] = [p for p in before["parameters"] if "1.attn1.to_k.weight" not in p[0]]  # NaN equals nothing
    assert not quantized(model) and len(before["parameters"]) + 1 == len(list(model.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_changed_while_attached(dtype):
    specimen, model = pixart()
    _, twin = pixart()
    with accelerate(model, PLAN):
        scale = quantized(model)[0].scale.clone()
        model.to(dtype)
        assert torch.equal(quantized(model)[0].scale, scale) and quantized(model)[0].weight.dtype == dtype
        kwargs = {
            k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in specimen.inputs().items()
        }
        with torch.no_grad():
            assert specimen.outputs(model(**kwargs))[0].dtype == dtype
    twin.to(dtype)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


# --- step ranges ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("originals", ["cpu", "disk"])
def test_step_range(originals):
    specimen, model = pixart()
    start, before = snapshot(model), out(specimen, model)
    plan = Plan(quantization=[Quantize(sites="ff.*"), Quantize(sites="attn.* ff.*", steps=(0.5, 1.0))])
    with accelerate(model, plan, originals=originals) as accel:
        ranged = [m for m in quantized(model) if m.phase is not None]
        assert 0 < len(ranged) < len(quantized(model)) and len({id(m.phase) for m in ranged}) == 1
        accel.clock.start(5)
        first = out(specimen, model)
        for _ in range(2):
            accel.clock.advance()
        late = out(specimen, model)
        assert not same(first, late)
    with accelerate(model, Plan(quantization=[Quantize(sites="ff.*")])):
        assert same(out(specimen, model), first)
    assert unchanged(model, start) and same(out(specimen, model), before)


def test_bake_keeps_what_a_step_range_needs(tmp_path):
    specimen, model = pixart()
    accel = accelerate(model, Plan(quantization=[Quantize(sites="attn.*"), Quantize(sites="ff.*", steps=(0.5, 1.0))]))
    accel.clock.start(3)
    outside = out(specimen, model)
    accel.bake()
    assert any("keep their originals" in note for note in accel.report().techniques[0].notes)
    assert same(out(specimen, model), outside)
    model.save_pretrained(tmp_path)
    loaded = PixArtTransformer2DModel.from_pretrained(tmp_path)
    assert {type(b.ff.net[2]) for b in loaded.transformer_blocks} == {nn.Linear}
    assert alike(out(specimen, loaded), outside)


# --- activations left as they are -------------------------------------------------------------------------------------


def test_layers_that_read_the_text_keep_their_activations(monkeypatch):
    _, model = pixart()
    with accelerate(model, PLAN) as accel:
        assert accel.report().techniques[0].facts["weight_only"] == 2 * len(model.transformer_blocks)
        layer = model.transformer_blocks[0].attn2.to_k
        x = torch.randn(1, 7, layer.in_features) * torch.logspace(0, 3, 7)[:, None]
        x[:, :, 0] *= 1e4  # an outlier channel, which a scale per token would ruin the others by
        exact = nn.functional.linear(x.double(), (layer.qweight.double() * layer.scale.double()[:, None]))
        exact = exact + (0 if layer.bias is None else layer.bias.double())
        near = partial(torch.allclose, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().mean()))
        assert near(layer(x).double())
        assert "activations=float" in repr(layer)
    monkeypatch.setenv("DIFFACCEL_KERNELS", "int8_linear=onednn")
    with accelerate(model, Plan(quantization=[Quantize(float_activations="")])) as accel:
        assert "weight_only" not in accel.report().techniques[0].facts
        assert not near(layer(x).double())


def test_the_last_section_decides_about_activations():
    _, model = pixart()
    sections = [Quantize(), Quantize(sites="cross.k", float_activations="")]
    with accelerate(model, Plan(quantization=sections)):
        attention = model.transformer_blocks[0].attn2
        assert not attention.to_k.weight_only and attention.to_v.weight_only and not attention.to_q.weight_only


def test_unknown_pattern_of_float_activations_is_refused():
    with pytest.raises(PlanError, match="space-separated globs"):
        Quantize(float_activations="  ")


# --- saved and loaded -------------------------------------------------------------------------------------------------


def test_bake_save_and_load(tmp_path):
    specimen, model = pixart()
    model.save_pretrained(tmp_path / "float")
    full = sum(t.nbytes for t in model.state_dict().values())
    accel = accelerate(model, PLAN)
    expected = out(specimen, model)
    accel.bake()
    gc.collect()
    assert same(out(specimen, model), expected)
    assert sum(t.nbytes for t in (*model.parameters(), *model.buffers())) < 0.6 * full
    model.save_pretrained(tmp_path / "int8", max_shard_size="100KB")
    loaded = PixArtTransformer2DModel.from_pretrained(tmp_path / "int8")
    names = {f"transformer_blocks.{i}.attn2.to_{x}" for i in range(len(model.transformer_blocks)) for x in "kv"}
    config = loaded.config.quantization_config
    saved = {entry["activations"]: set(entry["layers"]) for entry in config.saved}
    assert saved["float"] == names and len(saved["int8"]) == len(quantized(model)) - len(names)
    assert config.dtype == "float32"
    assert alike(out(specimen, loaded), expected) and len(quantized(loaded)) == len(quantized(model))
    at_load = PixArtTransformer2DModel.from_pretrained(tmp_path / "float", quantization_config=DiffAccelConfig())
    assert alike(out(specimen, at_load), expected)
    at_load.save_pretrained(tmp_path / "again")
    assert alike(out(specimen, PixArtTransformer2DModel.from_pretrained(tmp_path / "again")), expected)
    half = PixArtTransformer2DModel.from_pretrained(tmp_path / "int8", torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert all(torch.equal(a.scale, b.scale) for a, b in zip(quantized(half), quantized(model), strict=True))
    assert not quantized(loaded.dequantize())
    with pytest.raises(PlanError, match="already quantized by diffaccel"):
        accelerate(at_load, PLAN)


def test_a_partial_save_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    _, model = pixart()
    accelerate(model, PLAN).bake()
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "0.attn1.to_q.scale" not in k}, file, {"format": "pt"})
    with pytest.raises(ModelError, match="only a part"):
        PixArtTransformer2DModel.from_pretrained(tmp_path)


def test_pipeline_quantization_config(tmp_path):
    from zoo_pipelines import PIPELINES

    pipe = PIPELINES["flux"].build()
    pipe.save_pretrained(tmp_path / "float")
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": DiffAccelConfig(sites="attn.*")})
    pipe = FluxPipeline.from_pretrained(tmp_path / "float", quantization_config=mapping)
    pipe.save_pretrained(tmp_path / "int8")
    loaded = FluxPipeline.from_pretrained(tmp_path / "int8")
    specimen = PIPELINES["flux"]
    for p in (pipe, loaded):
        p.set_progress_bar_config(disable=True)
    assert quantized(loaded.transformer)
    assert alike([specimen.call(pipe, steps=2)], [specimen.call(loaded, steps=2)])


def test_import_registers_the_quantizer_without_importing_torch():
    code = (
        "import sys, diffaccel; assert 'torch' not in sys.modules;"
        "from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; assert 'diffaccel' in m;"
        "assert not any('WhenImported' in type(f).__name__ for f in sys.meta_path)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_config_refuses_bad_values():
    with pytest.raises(PlanError, match="int8"):
        DiffAccelConfig(weights="int3")
    with pytest.raises(PlanError, match="torch dtype"):
        DiffAccelConfig(dtype="float99")
    assert DiffAccelConfig.from_dict(DiffAccelConfig(sites="ff.*").to_dict()) == DiffAccelConfig(sites="ff.*")


# --- what others do to the weights ------------------------------------------------------------------------------------


def test_weight_is_cheap_to_ask_and_refuses_writes():
    _, model = pixart()
    original = model.transformer_blocks[0].attn1.to_q.weight.detach().clone()
    accel = accelerate(model, PLAN)
    layer = model.transformer_blocks[0].attn1.to_q
    assert isinstance(layer, nn.Linear) and layer.weight.shape == original.shape and layer.weight.dtype == torch.float32
    assert layer.weight.data.shape == original.shape and layer.weight.data.dtype == torch.float32
    assert sqnr([original], [layer.weight + 0]) > 35 and "int8" in repr(layer) and "int8" in repr(layer.weight)
    state = model.state_dict()
    for act in (
        lambda: layer.weight.data.clone(),
        lambda: setattr(layer.weight, "data", original),
        lambda: layer.weight.add_(1),
        lambda: setattr(layer, "weight", nn.Parameter(original)),
        lambda: model.load_state_dict(state),
        lambda: layer.load_state_dict({"weight": original}, strict=False),
        lambda: model.fuse_qkv_projections(),
    ):
        with pytest.raises(PlanError, match=r"remove\(\)"), torch.no_grad():
            act()
    accel.remove()
    assert torch.equal(layer.weight, original)


def adapter(model, **kwargs):
    torch.manual_seed(0)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False, **kwargs), model)


def test_lora_before_and_after():
    specimen, before = pixart()
    _, after = pixart()
    adapter(before)
    expected = out(specimen, before)
    accels = [accelerate(before, PLAN), accelerate(after, PLAN)]
    adapter(after)
    assert same(out(specimen, before), out(specimen, after)) and SQNR < sqnr(expected, out(specimen, after)) < 120
    wrapped = after.transformer_blocks[0].attn1.to_q
    for safe in (False, True):
        with pytest.raises(PlanError, match="fuse"):
            wrapped.merge(safe_merge=safe)
    assert not wrapped.merged
    for accel in accels:
        accel.remove()
    assert type(wrapped.base_layer) is nn.Linear
    assert same(out(specimen, before), expected) and same(out(specimen, after), expected)


def test_fused_qkv_before():
    specimen = ZOO["flux"]
    model = specimen.build()
    model.fuse_qkv_projections()
    before = out(specimen, model)
    with accelerate(model, PLAN):
        assert isinstance(model.transformer_blocks[0].attn.to_qkv, QuantizedLayer)
        assert SQNR < sqnr(before, out(specimen, model)) < 120
    assert same(out(specimen, model), before)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload_put_on_while_attached_outlives_removal(kind):
    specimen, model = pixart()
    before = out(specimen, model)
    with accelerate(model, PLAN):
        fast = out(specimen, model)
        options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        model.enable_group_offload(onload_device=torch.device("cpu"), offload_type=kind, **options)
        assert same(out(specimen, model), fast)
    assert same(out(specimen, model), before)


def test_left_alone_by_name():
    _, model = pixart()
    block = model.transformer_blocks[0]
    model.transformer_blocks[1].attn1.to_k.weight = block.attn1.to_k.weight  # tied
    nn.utils.parametrizations.weight_norm(block.attn1.to_v)
    block.ff.net[2] = type("Special", (nn.Linear,), {})(256, 64)
    start = [type(m) for m in model.modules()]
    with accelerate(model, Plan(quantization=[Quantize(sites="attn.* ff.* embed")])) as accel:
        notes = "\n".join(accel.report().techniques[0].notes)
        for reason in (
            "shared by transformer.transformer_blocks.0.attn1.to_k.weight",
            "Special",
            "Parametrized",
            "channels of a convolution",
        ):
            assert reason in notes
        assert type(block.attn1.to_k) is nn.Linear and isinstance(block.attn1.to_q, QuantizedLayer)
    assert [type(m) for m in model.modules()] == start


def test_slower_here_is_said_once(recwarn, monkeypatch):
    monkeypatch.setattr(quantization, "speedup", lambda *args: 0.5)
    _, model = pixart()
    with accelerate(model, PLAN) as accel:
        assert any("0.50x of the float speed" in note for note in accel.report().techniques[0].notes)
    assert len([w for w in recwarn if "0.50x" in str(w.message)]) == 1


def test_worth_it_measures():
    denoiser = Denoiser.of(pixart()[1], "transformer")
    worth, reason = worth_it(denoiser)
    assert not worth and ("256 x 64" in reason or "64 x 256" in reason)  # toy widths: not worth it
    assert worth_it(denoiser, "nothing.like.this")[0] is False


# --- compile ----------------------------------------------------------------------------------------------------------


def test_twenty_blocks_share_one_graph():
    torch._dynamo.reset()
    specimen = ZOO["pixart_sigma"]
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(**{**specimen.config, "num_layers": 20}).eval()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    for block in model.transformer_blocks:
        block.compile(backend=backend, fullgraph=True)
    with accelerate(model, Plan(quantization=[Quantize(steps=(0.5, 1.0))])) as accel:
        accel.clock.start(4)
        first = out(specimen, model)
        assert len(graphs) == 2  # the first block gets its tokens with other strides, accelerated or not
        for _ in range(3):
            accel.clock.advance()
        late = out(specimen, model)
        assert len(graphs) == 4 and not same(first, late)  # one for each side of the step range
        with torch.compiler.set_stance("fail_on_recompile"):
            accel.clock.start(4)
            assert same(out(specimen, model), first)
    torch._dynamo.reset()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="reads Linux's /proc and trims glibc's heap")
def test_disk_frees_the_originals(monkeypatch):
    monkeypatch.setattr(quantization, "speedup", lambda *args: None)
    root = nn.Module()
    root.blocks = nn.ModuleList(
        nn.ModuleDict({name: nn.Linear(1024, 4096) for name in ("to_q", "to_k")}) for _ in range(6)
    )
    root.forward = lambda hidden_states, timestep=None: hidden_states

    def anonymous():
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

    size = sum(p.nbytes for p in root.parameters())  # 200 MB
    before = anonymous()
    with accelerate(root, PLAN, originals="disk"):
        assert before - anonymous() > 0.65 * size  # a quarter came, all of it went
    assert abs(anonymous() - before) < 0.1 * size

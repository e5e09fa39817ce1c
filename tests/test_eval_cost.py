"""Operations by hand, energy of a GPU that is not there, and both on the rows of a run."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention
from zoo_pipelines import PIPELINES

from diffaccel import Plan, StepCache
from diffaccel.errors import InputError
from diffaccel.eval import flops
from diffaccel.eval.compare import compare
from diffaccel.eval.energy import energy_counter
from diffaccel.eval.flops import FlopCounter, count_flops
from diffaccel.eval.meter import metered
from diffaccel.eval.page import write_page
from diffaccel.eval.stages import Stages
from diffaccel.eval.timing import Spread
from diffaccel.kernels.block_sparse import block_sparse_attention
from diffaccel.kernels.fit_int4 import quantize_int4
from diffaccel.kernels.hadamard import hadamard
from diffaccel.kernels.int4_linear import int4_linear
from diffaccel.kernels.int8_conv import Geometry, int8_conv, pack_filters, quantize_filters
from diffaccel.kernels.int8_linear import int8_linear, pack, quantize_per_channel
from diffaccel.kernels.sparse_attention import sparse_attention


def _counted(call):
    with torch.no_grad(), FlopCounter() as counter:
        call()
    return counter


def test_products_by_hand():
    x, w = torch.randn(5, 7, 16), torch.randn(24, 16)
    assert _counted(lambda: linear(x, w)).total == 2 * 5 * 7 * 16 * 24
    q, k = torch.randn(2, 3, 10, 8), torch.randn(2, 3, 12, 8)
    assert _counted(lambda: scaled_dot_product_attention(q, k, k)).total == 2 * (2 * 3) * 10 * 12 * (8 + 8)
    mask = torch.randn(10, 12)
    assert _counted(lambda: scaled_dot_product_attention(q, k, k, attn_mask=mask)).total == 2 * 6 * 10 * 12 * 16
    conv = nn.Conv2d(3, 6, 3, padding=1)
    assert _counted(lambda: conv(torch.randn(1, 3, 8, 8))).total == 2 * 27 * 6 * 64
    assert _counted(lambda: x + 1).total == 0


def test_our_operators_by_hand():
    x, w = torch.randn(2, 9, 32), torch.randn(24, 32)
    packed = pack(*quantize_per_channel(w))
    found = _counted(lambda: int8_linear(x, packed))
    assert found.by_operator == {"diffaccel.int8_linear": 2 * 18 * 32 * 24} and not found.uncounted


def test_our_operators_for_packed_weights_by_hand():
    x = torch.randn(3, 6, 64)
    packed, low_rank = quantize_int4(torch.randn(24, 64), 32), (torch.randn(4, 64), torch.randn(24, 4))
    found = _counted(lambda: int4_linear(x, packed, low_rank=low_rank))
    assert found.by_operator == {"diffaccel.int4_linear": 2 * 18 * (64 * 24 + 4 * 64 + 24 * 4)} and not found.uncounted
    conv = nn.Conv2d(8, 12, 3, padding=1, groups=2)
    filters = pack_filters(*quantize_filters(conv.weight), Geometry((1, 1), (1, 1), (1, 1), 2), "dense")
    found = _counted(lambda: int8_conv(torch.randn(2, 8, 5, 7), filters, conv.bias))
    assert found.by_operator == {"diffaccel.int8_conv": 2 * (2 * 12 * 5 * 7) * 4 * 9} and not found.uncounted
    found = _counted(lambda: hadamard(x))
    assert set(found.by_operator) == {"diffaccel.hadamard"} and 0 < found.total <= 2 * 18 * 64 * 64


def test_each_of_our_operators_is_counted_or_multiplies_nothing():
    known = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("diffaccel::")}
    names = {name.replace("::", ".") for name in known}
    assert {"diffaccel.int8_conv", "diffaccel.int4_linear", "diffaccel.hadamard"} <= names
    assert [name for name in names if name not in flops._ELEMENT_WISE and flops._formula(name) is None] == []


@pytest.mark.parametrize("path", ["blocks", "dense"])
def test_masked_out_blocks_are_not_counted(path):
    q, k = torch.randn(2, 3, 100, 8), torch.randn(2, 3, 70, 8)  # the last blocks hold 4 and 6 tokens
    keep = torch.zeros(3, 4, 3, dtype=torch.bool)
    keep[:, :, 0], keep[1, 3, 2] = True, True
    found = _counted(lambda: block_sparse_attention(q, k, k, keep, block_size=32, path=path))
    pairs = 3 * 100 * 32 + 4 * 6 if path == "blocks" else 3 * 100 * 70
    assert found.by_operator == {"diffaccel.block_sparse_attention": 2 * 2 * pairs * 16}


def test_listed_blocks():
    q = torch.randn(2, 3, 48, 16)
    counts = torch.tensor([[[1, 2, 1]]], dtype=torch.int32)
    indices = torch.tensor([[[[0, 1, 2], [2, 0, 1], [2, 0, 1]]]], dtype=torch.int32)
    call = lambda: sparse_attention(q, q, q, counts, indices, 16)  # noqa: E731
    assert _counted(call).by_operator["diffaccel.sparse_attention"] == 2 * 6 * (4 * 16 * 16) * 32


def test_blocks_chosen_online():
    q = torch.randn(2, 3, 40, 16)
    call = lambda: torch.ops.diffaccel.online_blocks(q, q, torch.arange(40)[None].int(), 2, 1, 16)  # noqa: E731
    assert _counted(call).by_operator["diffaccel.online_blocks"] == 2 * 6 * 2 * 2 * 16


def test_what_has_no_formula_is_named():
    @torch.library.custom_op("diffaccel_test::secret", mutates_args=())
    def secret(x: torch.Tensor) -> torch.Tensor:
        return x @ x

    found = _counted(lambda: secret(torch.eye(2)))
    assert found.total == 0 and found.uncounted == {"diffaccel_test.secret"}


def test_compiled_parts_are_counted_and_denoisers_apart():
    torch.compiler.reset()
    model = nn.Linear(4, 4)

    class Pipe(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x)

    pipe = Pipe()
    pipe.compile(backend="eager")
    with torch.no_grad():
        found = count_flops(pipe, lambda: (pipe(torch.ones(3, 4)), model(torch.ones(1, 4))))
    assert (found.total, found.within) == (2 * 4 * 4 * 4, 2 * 3 * 4 * 4)


# --- stages and energy ---


def test_networks_inside_networks_count_once(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr("diffaccel.eval.stages.time", SimpleNamespace(perf_counter=lambda: next(now)))
    stages = Stages(torch.device("cpu"))
    stages.began(), stages.began(), stages.ended(), stages.ended()  # 0 to 1
    stages.entered(), stages.left(), stages.stepped(None)  # 2, 3, 4
    stages.began(), stages.ended()  # 5 to 6
    assert (stages.text_seconds(), stages.loop_seconds(), stages.decode_seconds()) == (1, 2, 1)
    assert stages.step_seconds() == [2]


class _Nvml:
    """Stands for pynvml: a GPU that draws 250 W and counts millijoules."""

    class NVMLError(Exception):
        pass

    def __init__(self, supported=True):
        self.millijoules, self.supported, self.asked = 5000, supported, []

    def nvmlInit(self):
        self.asked.append("init")

    def nvmlDeviceGetHandleByUUID(self, uuid):
        self.asked.append(uuid)
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if not self.supported:
            raise self.NVMLError
        self.millijoules += 250
        return self.millijoules


def test_energy_is_that_of_the_gpu_by_its_identity(monkeypatch):
    nvml = _Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1234"))
    counter = energy_counter(torch.device("cuda"))
    before = counter.joules()
    assert counter.joules() - before == 0.25 and nvml.asked == ["init", "GPU-1234"]
    monkeypatch.setitem(sys.modules, "pynvml", _Nvml(supported=False))
    assert energy_counter(torch.device("cuda")) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy_counter(torch.device("cuda")) is None and energy_counter(torch.device("cpu")) is None


def test_the_meter_reads_the_counter_before_and_after(monkeypatch):
    ticks = iter([3.0, 10.5])
    monkeypatch.setattr("diffaccel.eval.meter.energy_counter", lambda _: SimpleNamespace(joules=lambda: next(ticks)))
    module = PIPELINES["pixart_sigma"].build().transformer
    assert metered(module, lambda: None)[1].joules == 7.5


# --- runs ---


def test_rows_tell_operations_and_stages(tmp_path):
    pipe = PIPELINES["pixart_sigma"].build()
    calls = {k: v for k, v in PIPELINES["pixart_sigma"].request.items() if k != "output_type"}
    plans = {"cache": Plan(caching=StepCache(threshold=100, min_steps=1))}
    result = compare(
        pipe, plans, ["a", "b"], (0,), {**calls, "num_inference_steps": 6}, (3,), folder=tmp_path / "run",
        flops=True, load_seconds=1.5, progress=False,
    )  # fmt: skip
    reference, cache, half = (result.row(name) for name in ("reference", "cache", "3 steps"))
    assert half.flops.denoiser * 2 == reference.flops.denoiser < reference.flops.total
    computed = (
        6 - cache.report["techniques"]["caching"]["reused"] / 3
    )  # of three counted calls: two items and the count
    assert cache.flops.denoiser == pytest.approx(reference.flops.denoiser * computed / 6, rel=1e-9)
    assert reference.stages["step"].samples == 12 and half.stages["step"].samples == 6
    assert reference.joules is None and reference.reserved_bytes is None
    data = json.loads(result.save(tmp_path / "r.json").read_text())
    assert data["rows"][0]["flops"]["total"] == sum(data["rows"][0]["flops"]["by_operator"].values())
    assert data["load_seconds"] == {"median": 1.5, "p90": 1.5, "samples": 1}
    assert set(data["rows"][1]["stages"]) == {"text", "loop", "step", "decode", "call"}
    page = write_page(result, tmp_path / "page.html").read_text()
    assert f"<td>{reference.flops.total / 1e6:.3g} M</td>" in page
    assert result.costs().row_count == 3


def test_a_count_that_fails_is_a_note(tmp_path, monkeypatch):
    def broken(pipe, call):
        raise NotImplementedError("no rule for this tensor")

    monkeypatch.setattr("diffaccel.eval.runner.count_flops", broken)
    pipe = PIPELINES["pixart_sigma"].build()
    calls = {k: v for k, v in PIPELINES["pixart_sigma"].request.items() if k != "output_type"}
    result = compare(pipe, {}, ["a"], (0,), {**calls, "num_inference_steps": 1}, (), flops=True, progress=False)
    assert result.rows[0].flops is None
    assert "could not be counted: NotImplementedError: no rule for this tensor" in result.rows[0].notes[0]


def test_spread():
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3, pytest.approx(4.6), 5)


def test_latents_are_what_the_decoder_is_given(tmp_path):
    pipe = PIPELINES["pixart_sigma"].build()
    calls = {k: v for k, v in PIPELINES["pixart_sigma"].request.items() if k != "output_type"} | {
        "num_inference_steps": 4
    }
    run = lambda: compare(pipe, {}, ["a"], (0,), calls, (1, 3), measures=["latent_cosine"], folder=tmp_path / "run")  # noqa: E731
    before = sorted(pipe.vae.__dict__)
    result = run()
    generator = torch.Generator().manual_seed(0)
    latents = (
        pipe(prompt="a", generator=generator, output_type="latent", **calls).images / pipe.vae.config.scaling_factor
    )
    assert np.allclose(np.load(tmp_path / "run" / "latents" / "0000.npy"), latents.numpy(), atol=1e-5)
    far, near = (result.row(name).scores["latent_cosine"].mean for name in ("1 step", "3 steps"))
    assert -1 <= far < near < 1 and "latent_cosine" not in result.rows[0].scores
    assert sorted(pipe.vae.__dict__) == before
    (tmp_path / "run" / "latents" / "0000.npy").unlink()
    for file in (tmp_path / "run" / "outputs").glob("1-step*/*"):
        file.unlink()
    with pytest.raises(InputError, match=r"latents/0000\.npy cannot be read .* so that the item is run again"):
        run()
    (tmp_path / "run" / "outputs" / "reference" / "0000.npy").unlink()
    assert run().row("1 step").scores["latent_cosine"].mean == far

"""Presets: what they come to depends on structure and on what is measured, and they never fail on a model."""

import diffusers
import pytest
import torch
from zoo import ZOO

import diffaccel.presets
from diffaccel import accelerate
from diffaccel.denoiser import find_denoisers
from diffaccel.presets import preset_plan


def denoisers(name="pixart_sigma"):
    return find_denoisers(ZOO[name].build())


@pytest.mark.parametrize(("faster", "sites"), [(True, 1), (False, 0)])
def test_int8_only_where_it_measures_faster(faster, sites, monkeypatch):
    monkeypatch.setattr(diffaccel.presets, "worth_it", lambda denoiser: (faster, "measured so"))
    plan, notes = preset_plan("balanced", denoisers())
    assert len(plan.quantization) == sites
    assert any("measured so" in note for note in notes) is not faster


def test_int8_only_on_the_denoiser_that_gains(monkeypatch):
    class Pipeline:
        def __init__(self):
            self.components = {"transformer": ZOO["wan"].build(), "transformer_2": ZOO["wan"].build()}

    monkeypatch.setattr(diffaccel.presets, "worth_it", lambda d: (d.component == "transformer_2", "measured so"))
    with accelerate(Pipeline(), "balanced") as accel:
        quantization = accel.report().techniques[0]
        alone = find_denoisers(Pipeline().components["transformer"])
        with accelerate(alone[0].module, diffaccel.Plan(quantization=[diffaccel.Quantize()])) as one:
            assert quantization.sites == one.report().techniques[0].sites
        assert any("transformer:" in note and "measured so" in note for note in accel.report().notes)


def test_fast_spends_more_than_balanced():
    balanced, fast = (preset_plan(name, denoisers())[0].caching.threshold for name in ("balanced", "fast"))
    assert fast > balanced > 0


def test_lossless_changes_nothing():
    specimen = ZOO["dit"]
    model = specimen.build()
    with torch.no_grad():
        before = model(**specimen.inputs())[0]
        with accelerate(model, "lossless") as accel:
            assert torch.equal(model(**specimen.inputs())[0], before)
            assert [t.technique for t in accel.report().techniques] == ["exact"]


def test_what_cannot_be_used_is_left_out_and_named(monkeypatch):
    """Layerwise casting rules int8 out, a cache of diffusers rules ours out: asked for by name both are errors."""
    monkeypatch.setattr(diffaccel.presets, "worth_it", lambda denoiser: (True, ""))
    model = ZOO["flux"].build()
    model.enable_cache(diffusers.FirstBlockCacheConfig())
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with accelerate(model, "balanced") as accel:
        assert accel.plan.is_empty and not accel.report().techniques
        notes = " ".join(accel.report().notes)
        assert "layerwise casting" in notes and "cache of diffusers" in notes

"""Plans: building, comparing, saving, and refusing what is wrong."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffaccel import BlockSparse, Plan, PlanError, Quantize, StepCache
from diffaccel.plan import in_steps

FULL = dict(
    quantization=[Quantize(sites="attn.* ff.*"), Quantize(sites="ff.in", steps=(0.25, 1.0))],
    attention=BlockSparse(density=0.3, steps=(0.2, 1.0)),
    caching=StepCache(threshold=0.07, max_skips=2),
)


def test_a_plan_survives_saving(tmp_path):
    plan = Plan(**FULL, artefacts={"ratios": torch.rand(2, 5)}, key={"device": "cpu"}, name="mine")
    loaded = Plan.load(plan.save(tmp_path / "plan"))
    assert loaded == plan
    assert loaded.name == "mine"
    assert Plan.load(tmp_path / "plan" / "plan.json") == plan


def test_artefacts_are_compared_by_content():
    one = Plan(**FULL, artefacts={"ratios": torch.ones(3)})
    assert one == Plan(**FULL, artefacts={"ratios": torch.ones(3)})
    assert one != Plan(**FULL, artefacts={"ratios": torch.zeros(3)})
    assert one != Plan(**FULL)


@given(
    density=st.floats(0.01, 1.0),
    begin=st.floats(0, 0.5),
    end=st.floats(0.51, 1.0),
    threshold=st.floats(1e-3, 10),
    skips=st.integers(1, 50),
)
def test_dict_form_is_lossless(density, begin, end, threshold, skips):
    plan = Plan(
        attention=[BlockSparse(density=density, steps=(begin, end))],
        caching=StepCache(threshold=threshold, max_skips=skips),
    )
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(cahing={}), "no field 'cahing'"),
        (lambda d: d["plan"].update(cachin=d["plan"].pop("caching")), "did you mean 'caching'"),
        (
            lambda d: d["plan"]["caching"].update(treshold=1),
            "StepCache has no field 'treshold'; did you mean 'threshold'",
        ),
        (lambda d: d["plan"]["caching"].update(type="StepCash"), "did you mean 'StepCache'"),
        (lambda d: d["plan"]["caching"].update(threshold="much"), "threshold must be a number"),
        (lambda d: d["plan"]["caching"].update(policy="eazy"), "did you mean 'easy'"),
        (lambda d: d["plan"].update(attention={"type": "BlockSparse"}), "must be a list"),
        (lambda d: d["plan"]["attention"][0].update(steps=[0.5, 0.2]), "0 <= begin < end <= 1"),
        (lambda d: d.update(schema=99), "schema 99"),
        (lambda d: d.update(plan=3), "must be an object"),
    ],
)
def test_a_wrong_plan_file_is_refused(tmp_path, change, message):
    data = Plan(**FULL).to_dict()
    change(data)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match=message.replace("(", r"\(")):
        Plan.load(tmp_path)


def test_damaged_files_are_refused(tmp_path):
    folder = Plan(**FULL, artefacts={"ratios": torch.rand(100)}).save(tmp_path / "plan")
    artefacts = folder / "artefacts.safetensors"
    artefacts.write_bytes(artefacts.read_bytes()[:150])
    with pytest.raises(PlanError, match="is damaged"):
        Plan.load(folder)
    artefacts.unlink()
    with pytest.raises(PlanError, match="missing"):
        Plan.load(folder)
    (folder / "plan.json").write_text("{")
    with pytest.raises(PlanError, match="JSON"):
        Plan.load(folder)
    with pytest.raises(PlanError, match="no plan at"):
        Plan.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Plan(quantization=[StepCache()]), "expected Quantize"),
        (lambda: Plan(caching=BlockSparse()), "expected StepCache"),
        (lambda: Plan(attention="dense"), "list of sections"),
        (lambda: BlockSparse(density=0), "density"),
        (lambda: BlockSparse(density=1.5), "density"),
        (lambda: BlockSparse(block_size=50), "multiple of 16"),
        (lambda: BlockSparse(sites=""), "sites"),
        (lambda: Quantize(weights="int3"), "weights"),
        (lambda: Quantize(sites="attn:"), "names no site"),
        (lambda: StepCache(threshold=True), "threshold"),
        (lambda: StepCache(max_skips=1.5), "whole number"),
    ],
)
def test_wrong_values_are_refused_when_built(build, message):
    with pytest.raises(PlanError, match=message):
        build()


def test_step_ranges_are_half_open_but_include_the_end():
    assert in_steps(0.2, (0.2, 0.5))
    assert not in_steps(0.5, (0.2, 0.5))
    assert in_steps(1.0, (0.5, 1.0))
    assert not in_steps(1.0, (0.2, 0.5))


def test_building_a_plan_needs_no_torch():
    code = (
        "import sys, importlib.util as u\n"
        "spec = u.find_spec('diffaccel')\n"
        "import types; package = types.ModuleType('diffaccel')\n"
        "package.__path__ = list(spec.submodule_search_locations)\n"
        "sys.modules['diffaccel'] = package; sys.modules['torch'] = None\n"
        "for part in ('attention', 'quantization', 'caching'):\n"
        "    p = types.ModuleType('diffaccel.' + part); p.__path__ = [package.__path__[0] + '/' + part]\n"
        "    sys.modules[p.__name__] = p\n"
        "from diffaccel.plan import Plan\n"
        "from diffaccel.caching.section import StepCache\n"
        "from diffaccel.attention.section import BlockSparse\n"
        "from diffaccel.quantization.section import Quantize\n"
        "plan = Plan(caching=StepCache(), attention=[BlockSparse()], quantization=[Quantize()])\n"
        "assert Plan.from_dict(plan.to_dict()) == plan\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_plan_goes_into_a_folder_only(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match=r"no folder can be made at .*file.*; choose another"):
        Plan().save(tmp_path / "file")


def test_a_damaged_key_is_refused():
    with pytest.raises(PlanError, match=r"'key' must be an object, got 3"):
        Plan.from_dict({"schema": 1, "key": 3})

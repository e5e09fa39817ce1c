"""What the report tells of each step: as rows of marks, as text and as a picture."""

import pytest
import torch
from PIL import Image
from zoo_pipelines import PIPELINES

from diffaccel import InputError, Plan, StepCache, accelerate
from diffaccel.timeline import Timeline, drawn

SKIPPING = StepCache(policy="interval", forecast="hold", max_skips=2, protect_first=0, min_steps=1)


def test_marks():
    timeline = Timeline()
    for step, state in ((1, "computed"), (2, "reused"), (3, "forecast")):
        timeline.note(step, "cond", state, 5)
    timeline.note(2, "uncond", "computed")
    assert timeline.to_dict() == {"cond": " #.~ ", "uncond": "  #  "}
    assert timeline.computed() == {"cond": [1], "uncond": [2]}
    assert drawn("unet", {"cond": "#..#..", "uncond": "#....."}) == [
        "last run of unet: # computed, . reused",
        "         0    5",
        "  cond   #..#..",
        "  uncond #.....",
    ]
    assert drawn("unet", {}) == []


def test_report_tells_the_last_run_of_each_denoiser_and_branch(tmp_path):
    pipe = PIPELINES["wan22"].build()
    with accelerate(pipe, Plan(caching=SKIPPING)) as accel:
        with pytest.raises(InputError, match="no timeline to draw"):
            accel.report().plot(tmp_path / "early.png")
        for steps in (4, 7):
            PIPELINES["wan22"].call(pipe, steps=steps)
        report = accel.report()
    rows = report.techniques[0].facts["timeline"]
    assert set(rows["transformer"]) == {"cond", "uncond"}
    first = len(rows["transformer"]["cond"].strip())
    assert rows["transformer"]["cond"] == "#..#..#"[:first].ljust(7)
    assert rows["transformer_2"]["cond"].strip()[0] == "#" and rows["transformer_2"]["cond"][-1] == "#"
    assert f"cond   {rows['transformer']['cond']}" in str(report)
    report.plot(tmp_path / "timeline.png")
    colours = Image.open(tmp_path / "timeline.png").convert("RGB").getcolors(1 << 20)
    assert {(59, 110, 165), (227, 230, 234)} <= {colour for count, colour in colours if count > 100}


def test_a_bad_path_is_refused(tmp_path):
    pipe = PIPELINES["dit"].build()
    with torch.no_grad(), accelerate(pipe, Plan(caching=SKIPPING)) as accel:
        PIPELINES["dit"].call(pipe, steps=3)
        for path in (tmp_path / "none" / "x.png", tmp_path / "x.unknown"):
            with pytest.raises(InputError, match="no picture can be written"):
                accel.report().plot(path)


def test_a_plan_that_skips_nothing():
    with accelerate(PIPELINES["dit"].build(), Plan()) as accel, pytest.raises(InputError, match="nothing in the plan"):
        accel.report().plot("unused.png")

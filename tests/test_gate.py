"""Measures summed up, and requirements that hold only where their bound does."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffaccel.errors import InputError, MissingPackageError
from diffaccel.eval.gate import Requirement, judge, parse_requirements
from diffaccel.eval.measures import MEASURES, measures_of, score
from diffaccel.eval.timing import Ratio

RUN = ("adherence",)


def row(speedup=2.0, model_bytes=100, **scores):
    return SimpleNamespace(
        speedup=Ratio(speedup, speedup - 0.2, speedup + 0.2, 9), model_bytes=model_bytes, scores=scores
    )


def test_a_score_caps_and_takes_the_lowest_tenth_rounded_up():
    values = [math.inf, *range(30, 45)]  # 16 values: the lowest two make the worst decile
    summary = score(MEASURES["psnr"], values, range(16))
    assert (summary.worst_decile, summary.worst) == (30.5, 30)
    assert summary.mean == pytest.approx((100 + sum(range(30, 45))) / 16)
    assert summary.low < summary.bound < summary.mean < summary.high and summary.drop is None


def test_where_lower_is_better_the_worst_are_the_highest():
    summary = score(MEASURES["flicker"], range(20), range(20), [v + 1 for v in range(20)])
    assert (summary.worst, summary.worst_decile) == (19, 18.5) and summary.mean < summary.bound < summary.high
    assert summary.drop.value == -1 and summary.drop_bound == -1  # better by one everywhere


def test_seeds_of_one_prompt_are_no_independent_evidence():
    values = [0.0, 1.0] * 8
    by_prompt = [p for p in range(8) for _ in range(2)]
    apart = score(MEASURES["ssim"], values, range(16))
    assert apart.low < 0.4
    assert score(MEASURES["ssim"], values, by_prompt).low == 0.5  # every prompt has the mean 0.5


def test_requirements_are_read():
    assert parse_requirements("psnr>=36 & adherence_drop <= 0.03&speedup>=1.5", RUN) == [
        Requirement("psnr", 36),
        Requirement("adherence_drop", 0.03),
        Requirement("speedup", 1.5),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("psnr=36", "look like"),
        ("", "look like"),
        ("psnr>=36 &", "look like"),
        ("psn>=36", "no 'psn'; did you mean 'psnr'"),
        ("psnr_drop<=1", "no 'psnr_drop'"),
        ("psnr<=36", "bounds the good side; write psnr >= 36"),
        ("adherence_drop>=0", "write adherence_drop <= 0"),
        ("psnr>=3.6.1", r"'3\.6\.1' is no number"),
    ],
)
def test_requirements_that_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_requirements(text, RUN)
    with pytest.raises(InputError, match="ask for that measure too"):
        parse_requirements("adherence>=0.5", ())


def test_a_mean_above_the_limit_is_not_enough():
    psnr = score(MEASURES["psnr"], [30.0, 44.0] * 4, range(8))
    reference, plan = row(), row(psnr=psnr)
    assert psnr.mean == 37
    assert not judge(Requirement("psnr", 36), plan, reference).holds
    assert judge(Requirement("psnr", 30), plan, reference).holds
    assert "NOT met" in str(judge(Requirement("psnr", 36), plan, reference))
    single = row(psnr=score(MEASURES["psnr"], [60.0], [0]))
    assert not judge(Requirement("psnr", 1), single, reference).holds


def test_drops_speed_and_memory():
    right = [1.0] * 40
    drop = score(MEASURES["adherence"], [0.0, *right[1:]], range(40), right)
    plan, reference = row(adherence=drop, model_bytes=25), row()
    assert drop.drop.value == pytest.approx(1 / 40)
    assert judge(Requirement("adherence_drop", 0.1), plan, reference).holds
    assert not judge(Requirement("adherence_drop", 0.03), plan, reference).holds
    assert judge(Requirement("speedup", 1.8), plan, reference).holds
    assert not judge(Requirement("speedup", 1.9), plan, reference).holds
    assert judge(Requirement("memory", 0.25), plan, reference).holds
    assert not judge(Requirement("memory", 0.24), plan, reference).holds


def test_measures_are_checked_before_anything_runs(tmp_path):
    assert [c.measure.name for c in measures_of(["adherence"], ["a red circle"])] == ["psnr", "ssim", "adherence"]
    with pytest.raises(InputError, match="no measure 'adherance'; did you mean 'adherence'"):
        measures_of(["adherance"], ["a red circle"])
    with pytest.raises(InputError, match=r"adherence cannot judge by this prompt.*an astronaut"):
        measures_of(["adherence"], ["a red circle", "an astronaut"])
    with pytest.raises(InputError, match="'flicker' needs clips"):
        measures_of(["flicker"], ["a"], video=False)
    with pytest.raises(InputError, match="'flicker=7': it takes no setting, got '7'"):
        measures_of(["flicker=7"], ["a"])
    with pytest.raises(InputError, match="measure 'adherence' twice"):
        measures_of(["adherence", "adherence=1"], ["a red circle"])
    with pytest.raises(InputError, match=r"clip=local-dir:.*cannot load CLIP model"):
        measures_of([f"clip=local-dir:{tmp_path}"], ["a"])


def test_measures_that_load_a_model(tmp_path):
    from diffaccel.assets.make.evaluator import build, save

    torch.manual_seed(0)
    save(build(), tmp_path)
    names = [f"{name}=local-dir:{tmp_path}" for name in ("clip", "clip_temporal", "shapes_perceptual")]
    found = {c.measure.name: c.compute for c in measures_of([*names, "flicker"], ["a red circle"])}
    clip, other = (np.random.default_rng(i).random((2, 32, 32, 3), np.float32) for i in range(2))
    assert -100 <= found["clip"](clip, "a red circle") <= 100
    still = np.repeat(clip[:1], 2, axis=0)
    assert found["clip_temporal"](clip, "") < found["clip_temporal"](still, "") == pytest.approx(100, abs=1e-3)
    assert found["shapes_perceptual"](clip, clip) == 0 < found["shapes_perceptual"](clip, other)
    assert found["flicker"](clip, clip) == 0 < found["flicker"](clip, other)


def brightness():
    """A scorer of pictures for `preference`."""
    return lambda picture, prompt: float(np.asarray(picture).mean()) + len(prompt)


def test_scorers_of_ones_own(monkeypatch):
    chosen = measures_of(["preference=python:test_gate:brightness"], ["a"])[-1]
    assert chosen.compute(np.full((2, 8, 8, 3), 0.4, np.float32), "abc") == pytest.approx(102 + 3)
    with pytest.raises(InputError, match="name a function that returns a scorer"):
        measures_of(["preference"], ["a"])
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    with pytest.raises(MissingPackageError, match="pip install image-reward"):
        measures_of(["image_reward"], ["a"])

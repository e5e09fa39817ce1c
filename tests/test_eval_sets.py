"""Numbers of whole rows: what raises them, their intervals, and runs that report them."""

import importlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from zoo_pipelines import PIPELINES

from diffaccel import Plan, StepCache
from diffaccel.errors import InputError
from diffaccel.eval.compare import compare
from diffaccel.eval.extractors import extractor_of
from diffaccel.eval.feature_store import Folder
from diffaccel.eval.figures import speed_against_fidelity
from diffaccel.eval.gate import Requirement, judge, parse_requirements
from diffaccel.eval.metrics.frechet import distance, fit, frechet
from diffaccel.eval.metrics.jackknife import jackknife
from diffaccel.eval.page import write_page
from diffaccel.eval.sets import SETS, ChosenSet, score_set, sets_of

CALLS = []


def colours():
    """An extractor of three features: mean colours. Counts its calls."""

    def extract(pictures):
        CALLS.append(len(pictures))
        return pictures.mean((-2, -1))

    return extract


def motion():
    """An extractor of clips of one feature: how much they change."""
    return lambda clips: clips.diff(dim=1).abs().mean((1, 2, 3, 4))[:, None]


FID = "fid=python:test_eval_sets:colours"
CMMD = "cmmd=python:test_eval_sets:colours"


# --- the interval ---


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(size=40)
    found = jackknife(lambda kept: values[kept].mean(), range(40), groups=40)
    assert found.value == values.mean()
    assert found.deviation == pytest.approx(values.std(ddof=1) / np.sqrt(40), rel=1e-9)
    low, high = found.interval(0.9)
    assert high - found.value == pytest.approx(1.6849 * found.deviation, rel=1e-3)  # Student's, 39 degrees of freedom
    assert low < found.value < high


def test_prompts_stay_together_and_one_prompt_proves_nothing():
    values = np.array([0.0, 1.0] * 8)
    by_prompt = [p for p in range(8) for _ in range(2)]
    assert jackknife(lambda kept: values[kept].mean(), by_prompt).deviation == 0
    assert jackknife(lambda kept: values[kept].mean(), range(16)).deviation > 0.1
    assert jackknife(lambda kept: values[kept].mean(), [0] * 16).interval() == (-np.inf, np.inf)
    with pytest.raises(ValueError, match="2 groups"):
        jackknife(lambda kept: 0.0, range(3), groups=1)


def test_the_interval_covers_where_a_bootstrap_does_not():
    """The Frechet distance that 64 samples give in the mean, over repetitions that draw them anew."""
    rng = np.random.default_rng(1)
    sets = [(rng.normal(size=(64, 16)), rng.normal(size=(64, 16))) for _ in range(40)]
    mean = np.mean([distance(fit(a), fit(b)) for a, b in sets])
    covered = boot = 0
    for a, b in sets:
        low, high = jackknife(lambda kept, a=a, b=b: distance(fit(a[kept]), fit(b[kept])), range(64), 10).interval()
        covered += low <= mean <= high
        drawn = [distance(fit(a[kept]), fit(b[kept])) for kept in rng.integers(64, size=(30, 64))]
        boot += np.quantile(drawn, 0.025) <= mean
    assert covered >= 36 and boot <= 4


# --- one row ---


def _chosen(name="fid"):
    return ChosenSet(SETS[name], "test", lambda pictures: pictures.mean((-2, -1)), 3)


def _normal(count, mean=0.5, seed=0, spread=0.1):
    return np.random.default_rng(seed).normal(mean, spread, (count, 3))


def test_a_distance_grows_with_the_change_beyond_its_interval():
    base, prompts = _normal(60), range(60)
    near, far = (score_set(_chosen(), base + shift, base, prompts) for shift in (0.01, 0.2))
    assert near.value == pytest.approx(3 * 0.01**2) and far.value == pytest.approx(3 * 0.2**2)
    assert near.high < far.low and near.drop is None
    assert far.value <= far.bound <= far.high and (far.samples, far.reference) == (60, 60)
    assert score_set(_chosen(), base, base, prompts).value == pytest.approx(0, abs=1e-12)
    assert score_set(_chosen(), base, None, prompts) is None  # the reference with itself
    assert (
        score_set(_chosen("cmmd"), base, base + 0.2, prompts).value
        > score_set(_chosen("cmmd"), base, base, prompts).value
    )


def test_against_a_folder_rows_have_a_drop_that_is_paired():
    base, data, prompts = _normal(60), _normal(500, seed=1), range(60)
    worse = score_set(_chosen(), base + 0.05, base, prompts, (data, "data"))
    assert worse.value == frechet(base + 0.05, data).value
    assert worse.drop.value == pytest.approx(worse.value - frechet(base, data).value)
    assert worse.drop.low > 0 and worse.drop_bound < worse.drop.high and worse.reference == 500
    reference = score_set(_chosen(), base, None, prompts, (data, "data"))
    assert reference.drop is None and reference.against == "data"


def test_inception_score_wants_sharp_and_different():
    sharp, flat = np.eye(4)[np.arange(40) % 4], np.full((40, 4), 0.25)
    one = ChosenSet(SETS["inception_score"], "inception", lambda x: x, 4)
    best = score_set(one, sharp, flat, range(40))
    assert best.value == pytest.approx(4) and best.drop.value == pytest.approx(-3) and best.reference == 0
    assert score_set(one, flat, sharp, range(40)).drop_bound >= 3


# --- extractors ---


def test_extractors_by_name(tmp_path):
    class Net(torch.nn.Module):
        def forward(self, pictures):
            return pictures.amax((-2, -1))

    torch.jit.script(Net()).save(tmp_path / "net.pt")
    scripted = extractor_of(f"torchscript:{tmp_path / 'net.pt'}")
    assert scripted(torch.ones(2, 3, 4, 4)).tolist() == [[1, 1, 1]] * 2
    (tmp_path / "broken.pt").write_text("no network")
    for setting, message in {
        "torchscript:nowhere.pt": "no file 'nowhere.pt'",
        f"torchscript:{tmp_path / 'broken.pt'}": "no network that torch.jit.save wrote",
        "python:colours": "write python:package.module:function",
        "python:test_eval_sets:missing": "missing",
        "python:test_eval_sets:sorted_list": "cannot be called",
    }.items():
        with pytest.raises(ValueError, match=message):
            extractor_of(setting)


def sorted_list():
    return [1]


@pytest.mark.parametrize(
    ("names", "more", "message"),
    [
        (["fidd"], {}, "no measure 'fidd'; did you mean 'fid'"),
        ([FID], {"samples": 3}, "fid' needs more samples than features: .* gives 3, each row has 3. Take at least 4"),
        ([FID], {"against": 2}, "the folder holds 2"),
        (["fvd=python:test_eval_sets:motion"], {}, "needs clips"),
        ([FID, "fid=inception"], {}, "measure 'fid' twice"),
        (["fvd"], {"video": True}, "fvd=torchscript:FILE"),
        (["inception_score"], {"video": True}, "needs images"),
        ([f"inception_score={FID[4:]}"], {}, "takes the Inception network only"),
        (["fid=inception:nowhere.pth"], {}, "the Inception weights cannot be had"),
        (["cmmd=python:test_eval_sets:motion"], {}, "cannot take a black picture"),
    ],
)
def test_measures_that_are_refused(names, more, message):
    with pytest.raises(InputError, match=message):
        sets_of(names, **{"samples": 10} | more)


def test_few_samples_are_enough_for_cmmd():
    assert [one.features for one in sets_of([CMMD, CMMD], 2)] == [3]


def test_the_bundled_tower_is_the_default_of_bundled_pipelines(tmp_path, monkeypatch):
    from diffaccel.assets.make.evaluator import build, save

    save(build(), tmp_path / "shapes-clip")
    monkeypatch.setattr("diffaccel.assets._HERE", tmp_path)
    assert [(one.features, one.setting) for one in sets_of(["cmmd"], 2, bundled=True)] == [
        (128, f"local-dir:{tmp_path / 'shapes-clip'}")
    ]
    monkeypatch.setattr("diffaccel.assets._HERE", tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(
        InputError, match=r"measure 'fid': no extractor named, .* write for example fid=local-dir:FOLDER"
    ):
        sets_of(["fid"], 200, bundled=True)


# --- runs ---


def _run(folder, **more):
    pipe = PIPELINES["pixart_sigma"].build()
    calls = {k: v for k, v in PIPELINES["pixart_sigma"].request.items() if k != "output_type"}
    plans = {"cache": Plan(caching=StepCache(threshold=0.5, min_steps=1))}
    prompts = ["a red circle", "blue", "green", "a ring"]
    request = {"calls": {"num_inference_steps": 3, **calls}, "controls": (1,), "measures": (FID, CMMD)} | more
    return compare(pipe, plans, prompts, (0, 1), folder=folder, progress=False, **request)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return _run(tmp_path_factory.mktemp("sets") / "run")


def test_a_run_reports_them_beside_the_rest(run, tmp_path):
    samples = {row.name: [run.store.load(row.name, i) for i in range(8)] for row in run.rows}
    means = {name: np.stack([s.clip(0, 1).mean((0, 1, 2)) for s in found]) for name, found in samples.items()}
    one_step = run.row("1 step").sets["fid"]
    assert one_step.value == pytest.approx(frechet(means["1 step"], means["reference"]).value, abs=1e-4)
    assert one_step.value > run.row("cache").sets["fid"].value >= 0 and not run.row("reference").sets
    data = json.loads(run.save(tmp_path / "r.json").read_text())
    assert data["rows"][1]["sets"]["cmmd"]["samples"] == 8
    page = write_page(run, tmp_path / "page.html").read_text()
    assert "fid: Frechet distance of the row&#39;s 8 samples to the reference&#39;s samples (8)" in page
    verdict = judge(parse_requirements("fid<=9", [FID])[0], run.row("cache"), run.row("reference"))
    assert verdict.bound == run.row("cache").sets["fid"].bound
    assert not judge(Requirement("fid", one_step.value), run.row("1 step"), run.row("reference")).holds
    with pytest.raises(InputError, match="no 'fid_drop'"):
        parse_requirements("fid_drop<=1", [FID])


def test_a_run_that_goes_on_computes_no_features_twice(run):
    calls = importlib.import_module("test_eval_sets").CALLS
    assert len(calls) > 20  # the run above
    calls.clear()
    again = _run(run.folder)
    assert [row.sets for row in again.rows] == [row.sets for row in run.rows]
    assert calls == [1, 1]  # the black pictures of two measures
    lost = sorted((run.folder / "features").rglob("0003.npy"))[0]
    lost.write_bytes(b"torn")
    assert [row.sets for row in _run(run.folder).rows] == [row.sets for row in run.rows]
    assert calls == [1] * 5  # and the lost one


def test_against_a_folder(tmp_path, run):
    data = tmp_path / "data" / "deep"
    data.mkdir(parents=True)
    for i in range(6):
        noise = np.random.default_rng(i).integers(0, 255, (8 + i, 9, 3), np.uint8)
        Image.fromarray(noise).save(data / f"{i}.png")
    result = _run(tmp_path / "run", against=tmp_path / "data", controls=())
    scores = {row.name: row.sets["fid"] for row in result.rows}
    assert scores["reference"].reference == 6 and scores["reference"].drop is None
    assert scores["cache"].drop.value == pytest.approx(scores["cache"].value - scores["reference"].value)
    assert judge(
        parse_requirements("fid_drop<=99", [FID], against=True)[0], result.row("cache"), result.row("reference")
    ).holds
    Image.fromarray(noise).save(data / "more.png")
    with pytest.raises(InputError, match=r"against: .*6 files.*7 files"):
        _run(tmp_path / "run", against=tmp_path / "data", controls=())


def test_folders_that_are_refused(tmp_path, run):
    with pytest.raises(InputError, match="no folder"):
        Folder(tmp_path / "nowhere", video=False)
    (tmp_path / "clip.mp4").write_bytes(b"x")
    with pytest.raises(InputError, match="holds no pictures"):
        Folder(tmp_path, video=False)
    with pytest.raises(InputError, match="is for measures of whole rows; add one of fid"):
        _run(tmp_path / "run", against=tmp_path, measures=())
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"0\.png' cannot be used"):
        _run(tmp_path / "run", against=tmp_path)


def test_clips_are_compared_whole(tmp_path):
    pipe = PIPELINES["wan"].build()
    calls = {k: v for k, v in PIPELINES["wan"].request.items() if k != "output_type"}
    measures = ("fvd=python:test_eval_sets:motion", CMMD)
    more = {"calls": {"num_inference_steps": 2, **calls}, "controls": (1,), "measures": measures}
    result = compare(pipe, {}, ["a", "b"], folder=tmp_path / "run", progress=False, **more)
    clips = {name: [result.store.load(name, i).clip(0, 1) for i in range(2)] for name in ("reference", "1 step")}
    moves = {name: np.array([[np.abs(np.diff(c, axis=0)).mean()] for c in found]) for name, found in clips.items()}
    scores = result.row("1 step").sets
    assert scores["fvd"].value == pytest.approx(frechet(moves["1 step"], moves["reference"]).value, abs=1e-4)
    assert set(scores) == {"fvd", "cmmd"}


def test_the_plot_has_a_panel_for_each_measure(run, tmp_path):
    text = speed_against_fidelity(run, tmp_path / "plot.svg").read_text()
    assert all(f"<!-- {label} -->" in text for label in ("fid (lower is better): 95 % interval", "1 step", "cache"))
    assert "<!-- PSNR in dB: mean, down to the worst tenth -->" in text and text.count("axes_") >= 3

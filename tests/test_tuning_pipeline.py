"""The tuner on a real pipeline: its folder, interruption, what crashes, checking a plan elsewhere, bad requests."""

import dataclasses

import pytest
from zoo_pipelines import PIPELINES

import diffaccel
from diffaccel import Budget, Plan, PlanError, StepCache
from diffaccel.errors import InputError
from diffaccel.tuning import trials as trials_module
from diffaccel.tuning import tune as tuning
from diffaccel.tuning.space import Family


@pytest.fixture(scope="module")
def counted():
    """Seconds stand still: the time of a call is the number of denoiser calls that were computed."""
    real = trials_module.metered

    def metered(pipe, call, *, memory=True):
        computed = [0]
        layer = next(m for m in pipe.transformer.modules() if type(m).__name__ == "Linear")
        hook = layer.register_forward_hook(lambda *_: computed.__setitem__(0, computed[0] + 1))
        try:
            result, cost = real(pipe, call, memory=memory)
        finally:
            hook.remove()
        return result, dataclasses.replace(cost, loop_seconds=float(max(computed[0], 1)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials_module, "metered", metered)
        yield


def _calls(steps):
    request = {k: v for k, v in PIPELINES["pixart_sigma"].request.items() if k != "output_type"}
    return {**request, "num_inference_steps": steps}


def _tune(pipe, folder, minutes=None):
    interval = Family(
        "cache", "caching", lambda s: Plan(caching=StepCache(policy="interval", max_skips=int(s))), (1.0, 3.0)
    )
    return tuning.run(
        pipe,
        ["a red circle"],
        Budget(psnr=8),
        calls=_calls(10),
        seeds=range(4),
        folder=folder,
        minutes=minutes,
        progress=False,
        families=[interval],
    )


@pytest.fixture(scope="module")
def pipe():
    return PIPELINES["pixart_sigma"].build()


@pytest.fixture(scope="module")
def tuned(pipe, counted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned") / "t"
    return _tune(pipe, folder), folder


def test_tuning_a_pipeline(pipe, tuned):
    found, folder = tuned
    assert found.restored
    assert found.best is not None
    assert found.speedup is not None
    assert found.predicted == pytest.approx(1 / found.best.outcome.cost, rel=0.1)
    plan = Plan.load(folder)
    assert plan == found.plan
    assert plan.key["tuned"]["budget"] == {"psnr": 8}
    nearest = found.points[0].outcome.estimate(Budget(psnr=1).limits[0])
    assert Plan.load(folder, at=f"psnr>={nearest - 0.001:.6f}").caching is not None
    with pytest.raises(PlanError, match="no plan on the frontier"):
        Plan.load(folder, at="psnr>=99.5")
    with pytest.raises(PlanError, match="did you mean 'psnr'"):
        Plan.load(folder, at="pnsr>=9")
    assert found.best.name in (folder / "report.html").read_text()
    assert (folder / "timeline.png").stat().st_size > 1000
    with diffaccel.accelerate(pipe, plan):
        pass
    again = _tune(pipe, folder)  # everything is on record
    assert again.trials == found.trials
    assert again.plan == found.plan
    limited = _tune(pipe, folder, minutes=found.seconds / 60 / 0.5)  # what was spent before counts as it did then
    assert limited.plan == found.plan


def test_interrupted_and_resumed_it_gives_the_same_plan(pipe, tuned, tmp_path, monkeypatch):
    whole, _ = tuned
    real, left = trials_module.generate, [14]

    def interrupted(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*arguments)

    sittings = 0
    monkeypatch.setattr(trials_module, "generate", interrupted)
    while True:
        sittings += 1
        try:
            resumed = _tune(pipe, tmp_path / "parts")
            break
        except KeyboardInterrupt:
            left[0] = 14
            assert "_diffaccel" not in pipe.transformer.__dict__
    assert sittings > 1
    assert resumed.plan == whole.plan
    assert [p.name for p in resumed.points] == [p.name for p in whole.points]


def test_a_budget_that_nothing_keeps_gives_the_original_and_a_warning(pipe, counted, monkeypatch):
    none = Family("cache", "caching", lambda s: Plan(caching=StepCache(policy="interval")), (1.0,))
    monkeypatch.setattr(tuning, "families_for", lambda *_: ([none], []))
    arguments = {"calls": _calls(10), "seeds": range(4), "progress": False}
    with pytest.warns(UserWarning, match="nothing but the original"):
        assert diffaccel.tune(pipe, ["a red circle"], Budget(psnr=99), **arguments).is_empty


def test_an_option_that_crashes_is_left_out_and_named(pipe, counted, tmp_path, monkeypatch):
    real = trials_module.generate

    def crashing(denoised, *arguments):
        if "_diffaccel" in denoised.transformer.__dict__:
            raise RuntimeError("a kernel of this option")
        return real(denoised, *arguments)

    monkeypatch.setattr(trials_module, "generate", crashing)
    found = _tune(pipe, tmp_path / "t")
    assert found.best is None
    assert any("RuntimeError: a kernel of this option" in note for note in found.notes)
    assert found.restored


def test_check_tells_whether_a_plan_keeps_its_budget_elsewhere(pipe, tuned, tmp_path):
    found, folder = tuned
    holds, told = tuning.check(pipe, folder, ["a red circle"], calls=_calls(12), seeds=range(10, 13))
    assert "psnr>=8" in told
    assert found.plan.caching is not None
    assert holds
    demanding = dataclasses.replace(found.plan, key={**found.plan.key, "tuned": {"budget": {"psnr": 99.0}}})
    demanding.save(tmp_path / "demanding")
    assert not tuning.check(pipe, tmp_path / "demanding", ["a red circle"], calls=_calls(12), seeds=range(3))[0]
    Plan().save(tmp_path / "none")
    with pytest.raises(PlanError, match="no tuned plan"):
        tuning.check(pipe, tmp_path / "none", ["a red circle"])


def test_bad_requests_cost_nothing(pipe, tmp_path):
    with pytest.raises(PlanError, match="needs a Budget"):
        diffaccel.tune(pipe, ["a"] * 8, 36)
    with pytest.raises(PlanError, match="minutes"):
        diffaccel.tune(pipe, ["a"] * 8, Budget(psnr=36), minutes=0)
    with pytest.raises(InputError, match="prompts"):
        diffaccel.tune(pipe, "a", Budget(psnr=36))
    with pytest.raises(PlanError, match="4 different prompts"):
        diffaccel.tune(pipe, ["a"], Budget(psnr=36), folder=tmp_path / "x")
    with pytest.raises(InputError, match="nonsense"):
        diffaccel.tune(pipe, ["a"] * 8, Budget(clip_drop=1, measures=("clip=nonsense:model",)), folder=tmp_path / "x")
    assert not (tmp_path / "x").exists()

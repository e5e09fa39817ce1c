"""Static schedules: costs against direct sums, choices against all choices, and calibration of whole pipelines."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from zoo import ZOO, trajectory
from zoo_pipelines import PIPELINES

from diffaccel import Plan, PlanError, StepCache, accelerate, calibrate
from diffaccel.caching.schedule import Scheduler
from diffaccel.caching.trajectory import Trajectories, Trajectory, artefacts_of, trajectories_of
from diffaccel.forecast import Forecast
from diffaccel.plan import Artefacts

TIMES = (1000.0, 930.0, 850.0, 760.0, 650.0, 500.0, 330.0, 150.0)


def outputs(prompts=2, times=TIMES, size=6, seed=0):
    """Outputs along curves in the timestep, [P, T, D]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.randn(prompts, 4, size, generator=generator, dtype=torch.float64)
    t = torch.tensor(times, dtype=torch.float64) / 1000
    basis = torch.stack([torch.ones_like(t), t, torch.sin(4 * t), torch.exp(-5 * t)], 1)
    return basis @ shapes


def known(v, times=TIMES, weights=None, correction=0.0):
    """Trajectories of outputs [P, T, D], with a sensitivity of 1 by step unless ``weights`` are given."""
    gram = torch.einsum("ptd,psd->pts", v, v)
    gram = gram / gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    moves = [a - b for a, b in itertools.pairwise(times)]
    moves.append(min(times[-1], moves[-1]))
    sensitivity = [w / m for w, m in zip(weights or [1.0] * len(times), moves, strict=True)]
    return Trajectories({"cond": Trajectory(times, gram.numpy())}, times, tuple(sensitivity), correction)


def error_by_hand(v, steps, forecast, weights):
    """Mean square error of the result: in each run of skipped steps errors add as vectors, of runs as squares."""
    size = v.square().sum(2).mean(1)
    total = 0.0
    for last, end in itertools.pairwise([*steps, v.shape[1]]):
        before = max((s for s in steps if s < last), default=None)
        memory, error = Forecast(forecast), torch.zeros_like(v[:, 0])
        for j in (before, last):
            if j is not None:
                memory.record([], [v[:, j].float()], TIMES[j])
        for i in range(last + 1, end):
            error += weights[i] * (memory([], TIMES[i])[0].double() - v[:, i])
        total += float((error.square().sum(1) / size).mean())
    return total


@pytest.mark.parametrize("forecast", ["hold", "linear"])
@pytest.mark.parametrize("most", [1, 2, 4])
def test_the_choice_is_the_best_of_all(forecast, most):
    v, weights = outputs(), [1.0, 0.3, 2.0, 1.0, 0.5, 1.0, 3.0, 0.7]
    section = dataclasses.replace(StepCache.scheduled(share=0.5, max_skips=most), forecast=forecast)
    found = {len(c.computed): c for c in Scheduler(section, known(v, weights=weights)).choices(TIMES)}
    best = {}
    for count in range(1, 9):
        for rest in itertools.combinations(range(1, 8), count - 1):
            steps = (0, *rest)
            if all(b - a - 1 <= most for a, b in itertools.pairwise([*steps, 8])):
                best[count] = min(best.get(count, math.inf), error_by_hand(v, steps, forecast, weights))
    assert min(found) == min(best)
    for count, choice in found.items():
        assert error_by_hand(v, choice.computed, forecast, weights) == pytest.approx(best[count], rel=1e-3, abs=1e-9)
        expected = -10 * math.log10(best[count]) if best[count] > 1e-12 else math.inf
        assert choice.psnr == pytest.approx(expected, abs=0.05)
    for count, error in best.items():  # what was left out is no better than a schedule of fewer steps
        assert count in found or any(n < count and error >= best[n] * 0.999 for n in found)


def test_protected_steps_are_computed_and_budgets_kept():
    section = dataclasses.replace(StepCache.scheduled(share=0.6), protect_first=0.3, protect_last=2)
    chosen = Scheduler(section, known(outputs())).choose(TIMES)
    assert {0, 1, 2, 6, 7} == set(chosen.computed)
    for psnr in (10, 30, 60, 200):
        scheduler = Scheduler(StepCache.scheduled(psnr=psnr), known(outputs(), correction=3.0))
        cheaper = [c for c in scheduler.choices(TIMES) if len(c.computed) < len(scheduler.choose(TIMES).computed)]
        assert scheduler.choose(TIMES).psnr >= psnr and all(c.psnr < psnr for c in cheaper)
    without = {c.computed: c.psnr for c in Scheduler(StepCache.scheduled(psnr=9), known(outputs())).choices(TIMES)}
    assert all(c.psnr == without[c.computed] - 3 for c in scheduler.choices(TIMES))


def test_a_denoiser_of_a_part_of_the_steps():
    scheduler = Scheduler(StepCache.scheduled(share=0.5), known(outputs()))
    assert len(scheduler.choose(TIMES, 2, 6).computed) == 2
    assert scheduler.choose(TIMES, 2, 6).computed[0] == 2
    assert scheduler.choose(TIMES, 7).computed == (7,)  # image to image: only the last step is made
    budget = Scheduler(StepCache.scheduled(psnr=30), known(outputs()))
    assert budget.choose(TIMES, 4, 8).psnr >= 30 + 10 * math.log10(2)


def test_another_schedule_is_interpolated():
    """Cubics exactly; the timesteps of a second-order scheduler are there twice."""
    t = lambda times: torch.tensor(times, dtype=torch.float64)[:, None] / 1000  # noqa: E731
    curve = lambda times: torch.cat([1 + t(times), t(times) ** 3, t(times) ** 2 - t(times)], 1)[None]  # noqa: E731
    finer = (1000.0, 960.0, 900.0, 700.0, 600.0, 400.0, 150.0)
    gram = lambda v: torch.einsum("ptd,psd->pts", v, v).numpy()  # noqa: E731
    twice = (1000.0, 930.0, 930.0, *TIMES[2:])
    for times in (TIMES, twice):
        got = Trajectory(times, gram(curve(times))).at(finer)
        np.testing.assert_allclose(got.gram, gram(curve(finer)), atol=1e-9)
    v = curve(TIMES)
    exact = Trajectory(TIMES, gram(v))
    rise = v[0, 2] - v[0, 1]
    assert exact.slope(3, 2, 1) == pytest.approx(float((v[0, 3] - v[0, 2]) @ rise / (rise @ rise)))
    assert exact.slope_at(760.0, 850.0, 930.0) == pytest.approx(exact.slope(3, 2, 1))
    assert exact.slope(2, 1, 1) == 0.0  # the same step twice: there is no line


def test_slopes_are_cautious():
    """A deviation of the prompts below their mean: 1 and 3 give 1, 1 and -1 nothing."""
    ends = lambda *a: torch.tensor([[[0.0], [1.0], [1.0 + x]] for x in a], dtype=torch.float64)  # noqa: E731
    slope = lambda *a: Trajectory((3.0, 2.0, 1.0), torch.einsum("ptd,psd->pts", ends(*a), ends(*a)).numpy())  # noqa: E731
    assert slope(1, 3).slope(2, 1, 0) == pytest.approx(1)
    assert slope(1, -1).slope(2, 1, 0) == 0
    assert slope(0.7).slope(2, 1, 0) == pytest.approx(0.7)


def test_fitted_goes_no_further_than_the_trend():
    for last, expected in ((2.0, 2 + 0.5), (1.4, 1.4 + 0.4 * 0.4), (0.5, 0.5)):
        memory = Forecast("fitted", slope=lambda at, t1, t0: 0.5 * (at - t1) / (t1 - t0))
        for t, value in ((3.0, 0.0), (2.0, 1.0), (1.0, last)):
            memory.record([], [torch.full((1, 2), value)], t)
        assert float(memory([], 0.0)[0].mean()) == pytest.approx(expected)


def test_artefacts_survive():
    before = known(outputs(), correction=1.5)
    after = trajectories_of(Artefacts(artefacts_of("transformer", before)), "transformer")
    assert (after.timesteps, after.sensitivity, after.correction) == (before.timesteps, before.sensitivity, 1.5)
    np.testing.assert_array_equal(after.branches["cond"].gram, before.branches["cond"].gram)
    assert trajectories_of(Artefacts(artefacts_of("transformer", before)), "unet") is None


# --- whole pipelines --------------------------------------------------------------------------------------------------


def steps_of(accel):
    return accel.report().techniques[0].facts["steps_computed"]


@pytest.fixture(scope="module")
def calibrated():
    pipe, specimen = PIPELINES["pixart_sigma"].build(), PIPELINES["pixart_sigma"]
    call = specimen.arguments(steps=10)
    return pipe, calibrate(pipe, StepCache.scheduled(share=0.5), prompts=call.pop("prompt") * 2, **call)


def test_calibrated_plans_run_at_any_number_of_steps(calibrated, tmp_path):
    (pipe, plan), specimen = calibrated, PIPELINES["pixart_sigma"]
    assert Plan.load(plan.save(tmp_path)) == plan
    for steps in (10, 14, 2, 1):
        with accelerate(
            pipe, dataclasses.replace(plan, caching=dataclasses.replace(plan.caching, min_steps=1))
        ) as accel:
            first, second = specimen.call(pipe, steps=steps), specimen.call(pipe, steps=steps)
            computed = steps_of(accel)["transformer"]
        assert torch.equal(first, second) and first.isfinite().all()
        assert len(computed) == max(steps // 2, 1) and computed[0] == 0


def test_what_is_expected_is_what_comes(calibrated):
    """On the prompt and noise of the calibration, within what the model of errors can tell."""
    (pipe, plan), specimen = calibrated, PIPELINES["pixart_sigma"]
    reference, found = specimen.call(pipe, steps=10), []
    for share in (0.4, 0.6, 0.8):
        section = dataclasses.replace(plan.caching, share=share)
        with accelerate(pipe, dataclasses.replace(plan, caching=section)) as accel:
            error = (specimen.call(pipe, steps=10) - reference).square().mean()
            found.append(-10 * math.log10(error) - accel.report().techniques[0].facts["expected_psnr"]["transformer"])
    assert max(map(abs, found)) < 4


def test_a_budget_of_zero_error_computes_everything(calibrated):
    (pipe, plan), specimen = calibrated, PIPELINES["pixart_sigma"]
    reference = specimen.call(pipe, steps=10)
    with accelerate(pipe, dataclasses.replace(plan, caching=StepCache.scheduled(psnr=200))) as accel:
        assert torch.equal(specimen.call(pipe, steps=10), reference)
        assert steps_of(accel)["transformer"] == list(range(10))


def test_two_calls_and_two_experts():
    pipe, specimen = PIPELINES["wan22"].build(), PIPELINES["wan22"]
    call = specimen.arguments(steps=10)
    plan = calibrate(pipe, StepCache.scheduled(share=0.5), prompts=call.pop("prompt"), **call)
    with accelerate(pipe, plan) as accel:
        specimen.call(pipe, steps=10)
        computed = steps_of(accel)
    own = {c: trajectories_of(plan.artefacts, c).branches["cond"].timesteps for c in computed}
    assert sum(map(len, own.values())) == 10
    begin = 0
    for component, steps in computed.items():
        assert len(steps) == max(round(len(own[component]) / 2), 1)
        assert steps[0] == begin and steps[-1] < begin + len(own[component])
        begin += len(own[component])


def test_a_loop_by_hand_has_the_calibrated_schedule_spread_over_it(calibrated):
    pipe, plan = calibrated
    model = pipe.transformer
    with torch.no_grad(), accelerate(model, plan) as accel:
        accel.clock.start(10)
        for kwargs in trajectory(ZOO["pixart_sigma"], steps=10):
            model(**kwargs)
            accel.clock.advance()
        assert len(steps_of(accel)["transformer"]) == 5


def test_a_schedule_adds_no_variant_to_compiled_blocks(calibrated):
    """The denoiser is called less often, and knows nothing of it."""
    torch._dynamo.reset()
    specimen, plan = PIPELINES["pixart_sigma"], calibrated[1]
    pipe = specimen.build()
    with accelerate(pipe, plan):
        expected = specimen.call(pipe, steps=10)
    for block in pipe.transformer.transformer_blocks:
        block.compile(backend="eager")
    specimen.call(pipe, steps=1)
    with accelerate(pipe, plan) as accel, torch.compiler.set_stance("fail_on_recompile"):
        got = specimen.call(pipe, steps=10)
        assert len(steps_of(accel)["transformer"]) == 5
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_without_calibration_it_is_refused():
    pipe = PIPELINES["pixart_sigma"].build()
    for section in (StepCache.scheduled(psnr=40), StepCache(forecast="fitted")):
        with pytest.raises(PlanError, match=r"needs calibrated trajectories.*diffaccel\.calibrate"):
            accelerate(pipe, Plan(caching=section))
    assert "_diffusers_hook" not in vars(pipe.transformer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(policy="schedule", forecast="hold"), "either psnr"),
        (dict(policy="schedule", forecast="hold", psnr=40, share=0.5), "either psnr"),
        (dict(psnr=40), "either psnr"),
        (dict(policy="schedule", forecast="hold", psnr=-1), "StepCache.psnr must be"),
        (dict(policy="schedule", forecast="hold", share=0), "StepCache.share must be"),
        (dict(policy="schedule", forecast="trend", share=0.5), "hold, linear and fitted"),
        (dict(forecast="fitted", granularity="stack"), "needs granularity='root'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(PlanError, match=message):
        StepCache(**settings)

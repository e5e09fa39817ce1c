"""When step caching computes, whatever decides: protected steps, branches, sizes, runs, errors; any denoiser."""

import threading
from contextlib import nullcontext

import pytest
import torch
from caching_parts import FORECASTS, Doubler, Scripted, always, computed_steps, run, run_by_hand, walk
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import apply_first_block_cache
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from torch import Tensor
from zoo import ZOO, trajectory
from zoo_pipelines import PIPELINES

from diffaccel import Plan, PlanError, StepCache, accelerate


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(), [0, 2, 4, 6, 8, 9]),
        (dict(max_skips=3), [0, 4, 8, 9]),
        (dict(max_skips=3, protect_last=0), [0, 4, 8]),
        (dict(protect_first=0.31, protect_last=3), [0, 1, 2, 3, 5, 7, 8, 9]),
        (dict(protect_first=1), list(range(10))),
        (dict(min_steps=11), list(range(10))),
    ],
)
def test_protected_steps(settings, expected):
    assert run(Doubler(), always(**settings), walk(10))[1] == expected


def test_a_late_start_is_protected_by_the_full_schedule():
    assert run(Doubler(), always(protect_first=0.5), walk(4), begin=6)[1] == [6, 8, 9]
    assert run(Doubler(), always(protect_first=0.5), walk(8), begin=2)[1] == [2, 3, 4, 6, 8, 9]


def test_short_schedules_are_left_alone_and_named():
    model = Doubler()
    with accelerate(model, Plan(caching=StepCache(threshold=100))) as accel:
        run_by_hand(accel, model, walk(8))
        (technique,) = accel.report().techniques
        run_by_hand(accel, model, walk(9))
        (later,) = accel.report().techniques
    assert technique.facts["reused"] == 0
    assert technique.notes == ["a schedule of 8 steps was left alone (min_steps is 9)"]
    assert later.facts["reused"] > 0 and later.notes == []  # of the last run


def test_the_second_branch_follows_the_first():
    model, texts = Doubler(), {"cond": torch.ones(1, 2, 2), "uncond": torch.zeros(1, 2, 2)}
    outputs = {name: [] for name in texts}
    with accelerate(model, always()) as accel:
        accel.clock.start(5)
        for i, x in enumerate(walk(5)):
            for name, text in texts.items():
                if (name, i) == ("uncond", 0):
                    continue  # guidance begins later: that branch has nothing to reuse in step 1
                outputs[name].append(model(x if name == "cond" else 10 * x, 1000.0 - i, encoder_hidden_states=text))
            accel.clock.advance()
        facts = accel.report().techniques[0].facts
    x = walk(5)
    torch.testing.assert_close(outputs["cond"], [2 * x[i] for i in (0, 0, 2, 2, 4)])
    torch.testing.assert_close(outputs["uncond"], [20 * x[i] for i in (1, 2, 2, 4)])
    assert (facts["computed"], facts["reused"]) == (6, 3)


def test_cache_contexts_name_the_branches():
    model = Doubler()
    with accelerate(model, always()) as accel:
        accel.clock.start(4)
        seen = []
        for i, x in enumerate(walk(4)):
            for name, sign in (("cond", 1), ("uncond", -1)):
                _set_cache_context(model, CacheContext(name))
                seen.append(model(sign * x, 1000.0 - i))
                _set_cache_context(model, None)
            accel.clock.advance()
    x = walk(4)
    torch.testing.assert_close(seen, [sign * 2 * x[i] for i in (0, 0, 2, 3) for sign in (1, -1)])


@pytest.mark.parametrize("forecast", FORECASTS)
def test_another_size_in_the_middle_of_a_run_is_computed(forecast):
    model = Doubler()
    latents = walk(3) + walk(3, (1, 3, 4)) + walk(3, (1, 5, 4))
    with accelerate(model, always(forecast)) as accel:
        outputs = run_by_hand(accel, model, latents)
        assert computed_steps(accel) == [0, 2, 3, 5, 6, 8]
    assert [v.shape for v in outputs] == [x.shape for x in latents]


@pytest.mark.parametrize("begin", ["clock", "timestep"])
def test_every_run_starts_anew(begin):
    model, latents = Doubler(), walk(6)
    with accelerate(model, always("linear")) as accel:
        runs = []
        for _ in range(3):
            if begin == "clock":
                accel.clock.start(6)
            runs.append([model(x, torch.tensor([1000.0 - 100 * i])) for i, x in enumerate(latents)])
    assert all(torch.equal(runs[0][0], r[0]) and torch.equal(r[0], 2 * latents[0]) for r in runs)
    assert all(map(torch.equal, runs[0] + runs[1], runs[1] + runs[2]))


def test_a_bare_loop_that_cannot_be_followed_is_computed_and_named():
    model = Doubler()
    with accelerate(model, always()) as accel:
        for x in walk(4):
            model(x, None)
        (technique,) = accel.report().techniques
    assert technique.facts["computed"] == 4
    assert technique.notes[0].startswith("where the loop stands is unknown: call accel.clock.start(steps)")


def test_latents_that_are_no_numbers_are_computed_and_named():
    model = Scripted(lambda x, t: x * 2.0)
    with accelerate(model, always()) as accel:
        run_by_hand(accel, model, [torch.arange(6).view(1, 2, 3) + i for i in range(4)])
        (technique,) = accel.report().techniques
    assert (technique.facts["computed"], technique.facts["reused"]) == (4, 0)
    assert technique.notes == ["no argument of the denoiser holds floating latents: nothing is cached"]


def test_an_exception_leaves_no_state():
    fails = [False]

    def script(x, t):
        if fails[0]:
            raise ZeroDivisionError
        return 2 * x

    model, latents = Scripted(script), walk(8)
    with accelerate(model, always("linear", threshold=1)) as accel:
        expected = run_by_hand(accel, model, latents)
        accel.clock.start(8)
        for i, x in enumerate(latents[:4]):
            fails[0] = i == 2
            with pytest.raises(ZeroDivisionError) if fails[0] else nullcontext():
                model(100 * x, 1000.0 - i)
            accel.clock.advance()
        fails[0] = False
        again = run_by_hand(accel, model, latents)
    assert all(map(torch.equal, expected, again))


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_cache_of_diffusers_is_a_conflict():
    pipe = PIPELINES["wan"].build()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(PlanError, match=r"FirstBlockCacheConfig.*pipe\.transformer\.disable_cache\(\)"):
        accelerate(pipe, Plan(caching=StepCache()))
    pipe.transformer.disable_cache()
    accelerate(pipe, Plan(caching=StepCache())).remove()
    model = ZOO["flux"].build()
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(PlanError, match="already has a cache of diffusers"):
        accelerate(model, Plan(caching=StepCache()))


@pytest.mark.parametrize(
    "bad",
    [
        dict(policy="easi"),
        dict(forecast="hols"),
        dict(threshold=0),
        dict(threshold="low"),
        dict(protect_first=1.1),
        dict(protect_last=-1),
        dict(max_skips=0),
        dict(min_steps=2.5),
    ],
)
def test_bad_settings(bad):
    (name,) = bad
    with pytest.raises(PlanError, match=rf"StepCache\.{name}"):
        StepCache(**bad)


# --- any denoiser -----------------------------------------------------------------------------------------------------

STEPS = 4


# fmt: off
KINDS = [
    "animatediff", "auraflow", "chroma", "cogvideox", "cosmos", "curio", "dit", "flux", "hidream", "hunyuan_video",
    "kandinsky5", "ltx", "ltx2", "lumina2", "mochi", "omnigen", "pixart_sigma", "prior", "prx", "qwen_image", "sana",
    "sd3", "stable_audio", "stable_cascade", "unet_sd15", "wan", "wan_i2v", "wan_ti2v", "z_image",
]
# fmt: on
KINDS += [name for name, specimen in ZOO.items() if not specimen.inputs()[specimen.latents[0]][0].is_floating_point()]


@pytest.mark.parametrize("name", KINDS)
def test_zoo(name):
    specimen = ZOO[name]
    model = specimen.build()
    inputs = list(trajectory(specimen, steps=STEPS))
    floating = all(t.is_floating_point() for n in specimen.latents for t in _tensors(inputs[0][n]))

    def loop(accel=None):
        if accel:
            accel.clock.start(STEPS)
        outputs = []
        with torch.no_grad():
            for kwargs in inputs:
                outputs.append(model(**kwargs))
                if accel:
                    accel.clock.advance()
        return outputs

    plain, before = loop(), sorted(vars(model))
    with accelerate(model, always(protect_last=0)) as accel:
        cached, again = loop(accel), loop(accel)
        (technique,) = accel.report().techniques
    source = [0, 0, 2, 2] if floating else [0, 1, 2, 3]
    for i, j in enumerate(source):
        assert type(cached[i]) is type(plain[i])
        assert all(map(torch.equal, specimen.outputs(cached[i]), specimen.outputs(plain[j])))
        assert all(map(torch.equal, specimen.outputs(cached[i]), specimen.outputs(again[i])))
    assert technique.facts["reused"] == (4 if floating else 0)
    assert bool(technique.notes) is not floating
    assert sorted(vars(model)) == before
    assert all(map(torch.equal, specimen.outputs(loop()[-1]), specimen.outputs(plain[-1])))


def _tensors(value):
    return value if isinstance(value, list) else [value]


def test_two_models_in_two_threads():
    def work(seed):
        model = ZOO["pixart_sigma"].build()
        results[seed] = []
        for _ in range(3):
            with torch.no_grad(), accelerate(model, Plan(caching=StepCache(threshold=0.3 * (1 + seed)))) as accel:
                accel.clock.start(12)
                for kwargs in trajectory(ZOO["pixart_sigma"], steps=12):
                    results[seed].append(model(**kwargs)[0])
                    accel.clock.advance()
                results[seed].append(computed_steps(accel))

    def flat(values):
        return [v for v in values if isinstance(v, Tensor)], [v for v in values if isinstance(v, list)]

    results = {}
    for seed in (0, 1):
        work(seed)
    expected = dict(results)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (0, 1):
        (tensors, steps), (tensors_before, steps_before) = flat(results[seed]), flat(expected[seed])
        assert steps == steps_before
        assert all(map(torch.equal, tensors, tensors_before))
    assert expected[0][-1] != expected[1][-1]

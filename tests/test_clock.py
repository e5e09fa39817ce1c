"""The clock on real schedulers, on real pipelines, and on loops without either."""

import copy
import inspect
import pickle
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers.hooks.hooks import CacheContext
from torch import Tensor, nn
from zoo_pipelines import PIPELINES

from diffaccel.clock import Clock
from diffaccel.denoiser import find_denoisers
from diffaccel.errors import DiffAccelError
from diffaccel.plan import Artefacts
from diffaccel.technique import Context
from diffaccel.watch import watch_method

SCHEDULERS = {
    "euler": diffusers.EulerDiscreteScheduler,
    "flow_euler": diffusers.FlowMatchEulerDiscreteScheduler,
    "dpm": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "ddim": diffusers.DDIMScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "flow_heun": diffusers.FlowMatchHeunDiscreteScheduler,
    "pndm": diffusers.PNDMScheduler,
}
PROMPT, NEGATIVE = torch.ones(1, 3, 4), torch.zeros(1, 3, 4)


def rig(scheduler, **attributes):
    """A pipeline that is nothing but its scheduler, and an attached clock."""
    pipe = SimpleNamespace(components={"scheduler": scheduler}, scheduler=scheduler, **attributes)
    clock = Clock(pipe)
    clock.attach()
    return pipe, clock


def loop(pipe, clock, steps, texts=(PROMPT,), begin=0, timestep=lambda t: t, contexts=()):
    """A denoising loop the way pipelines write it; yields the clock's calls."""
    pipe.scheduler.set_timesteps(steps)
    timesteps = pipe.scheduler.timesteps[begin:]
    if begin:
        pipe.scheduler.set_begin_index(begin)
    latents = torch.zeros(1, 4, 2, 2)
    for t in timesteps:
        for i, text in enumerate(texts):
            context = contexts[i] if contexts else None
            yield clock.call({"encoder_hidden_states": text}, timestep(t), context)
        latents = pipe.scheduler.step(latents, t, latents).prev_sample


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_step_of_the_schedule_once(name):
    pipe, clock = rig(SCHEDULERS[name]())
    calls = list(loop(pipe, clock, 6))
    schedule = pipe.scheduler.timesteps.tolist()
    assert [c.step for c in calls] == list(range(len(schedule)))
    assert [c.timestep for c in calls] == schedule
    assert {c.steps for c in calls} == {len(schedule)}
    assert [c.progress for c in calls] == [i / (len(schedule) - 1) for i in range(len(schedule))]
    assert [c.first_step for c in calls] == [True] + [False] * (len(schedule) - 1)
    assert {(c.run, c.branch, c.first_in_step) for c in calls} == {(clock.run, "cond", True)}


def test_heun_repeats_timesteps_and_each_call_has_its_index():
    pipe, clock = rig(diffusers.HeunDiscreteScheduler())
    calls = list(loop(pipe, clock, 4, timestep=lambda t: t / 1000))  # a computed timestep, found by counting
    assert pipe.scheduler.timesteps[1] == pipe.scheduler.timesteps[2]
    assert [c.step for c in calls] == list(range(7))


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("scaled", [False, True], ids=["view", "computed"])
def test_image_to_image_starts_inside_the_full_schedule(name, scaled):
    scheduler = SCHEDULERS[name]()
    begin = 4 * getattr(scheduler, "order", 1)
    if not hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index = lambda begin: None
    if scaled and not hasattr(type(scheduler), "set_begin_index"):
        return  # nothing but the timestep itself says where such a loop starts
    pipe, clock = rig(scheduler)
    calls = list(loop(pipe, clock, 10, begin=begin, timestep=(lambda t: t / 1000) if scaled else (lambda t: t)))
    assert [c.step for c in calls] == list(range(begin, len(scheduler.timesteps)))
    assert [c.first_step for c in calls] == [True] + [False] * (len(calls) - 1)
    assert calls[-1].progress == 1


def test_a_start_known_only_by_the_timesteps_value():
    pipe, clock = rig(diffusers.DDIMScheduler())
    pipe.scheduler.set_timesteps(10)
    kept = [float(t) for t in pipe.scheduler.timesteps[7:]]
    assert clock.call({}, kept[0], None).step == 7


def test_two_calls_per_step_are_told_apart_by_their_text():
    pipe, clock = rig(diffusers.DDIMScheduler())
    calls = list(loop(pipe, clock, 3, texts=(PROMPT, NEGATIVE)))
    assert [(c.step, c.branch, c.first_in_step) for c in calls] == [
        (step, branch, branch == "cond") for step in range(3) for branch in ("cond", "uncond")
    ]


def test_a_branch_that_is_left_out_on_some_steps_keeps_its_name():
    pipe, clock = rig(diffusers.DDIMScheduler())
    scheduler, seen = pipe.scheduler, []
    scheduler.set_timesteps(4)
    for i, t in enumerate(scheduler.timesteps):
        for text in (PROMPT, NEGATIVE) if i < 2 else (NEGATIVE,) if i == 2 else (NEGATIVE, PROMPT):
            seen.append(clock.call({"encoder_hidden_states": text}, t, None).branch)
        scheduler.step(torch.zeros(1), t, torch.zeros(1))
    assert seen == ["cond", "uncond"] * 2 + ["uncond", "uncond", "cond"]


def test_the_same_branch_again_in_a_step_is_numbered():
    pipe, clock = rig(diffusers.DDIMScheduler())
    calls = list(loop(pipe, clock, 2, texts=(PROMPT, NEGATIVE, PROMPT)))
    assert [c.branch for c in calls] == ["cond", "uncond", "cond.2"] * 2


def test_both_halves_in_one_call():
    pipe, clock = rig(diffusers.DDIMScheduler(), do_classifier_free_guidance=True)
    assert {c.branch for c in loop(pipe, clock, 3, texts=(torch.cat([NEGATIVE, PROMPT]),))} == {"batched"}


def test_names_of_cache_contexts():
    pipe, clock = rig(diffusers.DDIMScheduler())
    contexts = [CacheContext("cond"), CacheContext("uncond"), CacheContext("uncond_stg")]
    calls = list(loop(pipe, clock, 2, texts=(PROMPT,) * 3, contexts=contexts))
    assert [(c.step, c.branch) for c in calls] == [(s, n) for s in (0, 1) for n in ("cond", "uncond", "uncond_stg")]
    assert next(loop(pipe, clock, 1, contexts=[CacheContext("cond_uncond")])).branch == "batched"


def test_a_context_may_say_the_step():
    clock = Clock()
    seen = [
        clock.call({}, None, CacheContext(name, step_index=i, num_inference_steps=5))
        for i in range(5)
        for name in ("cond", "uncond")
    ]
    assert [(c.step, c.branch) for c in seen] == [(i, n) for i in range(5) for n in ("cond", "uncond")]
    assert {c.steps for c in seen} == {5}
    assert seen[-1].progress == 1


def test_a_context_counts_from_the_start_of_an_image_to_image_loop():
    pipe, clock = rig(diffusers.DDIMScheduler())
    pipe.scheduler.set_timesteps(10)
    for i, t in enumerate(pipe.scheduler.timesteps[6:]):
        assert clock.call({}, t, CacheContext("cond", step_index=i)).step == 6 + i


def test_a_schedule_handed_over_as_a_device_tensor_is_read_once_and_never_after():
    pipe, clock = rig(diffusers.FlowMatchEulerDiscreteScheduler())
    pipe.scheduler.set_timesteps(5)

    class OnDevice(Tensor):
        """Refuses whatever would wait for a device."""

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func in (Tensor.item, Tensor.__float__, Tensor.tolist, Tensor.cpu, Tensor.__bool__, Tensor.max):
                raise AssertionError(f"{func.__name__} reads the device")
            if func == Tensor.device.__get__:
                return torch.device("cuda:0")
            return super().__torch_function__(func, types, args, kwargs or {})

    with pytest.raises(AssertionError, match="reads the device"):
        torch.ones(1).as_subclass(OnDevice).item()
    seen = []
    for t in pipe.scheduler.timesteps:
        timestep = (t / 1000).as_subclass(OnDevice)
        for text in (PROMPT, NEGATIVE):
            seen.append(clock.call({"encoder_hidden_states": text.as_subclass(OnDevice)}, timestep, None))
        pipe.scheduler.step(torch.zeros(1), t, torch.zeros(1))
    assert [(c.step, c.branch) for c in seen] == [(i, n) for i in range(5) for n in ("cond", "uncond")]
    assert [c.timestep for c in seen[::2]] == pipe.scheduler.timesteps.tolist()


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    pipe, clock = rig(diffusers.FlowMatchEulerDiscreteScheduler())
    with FakeTensorMode():
        pipe.scheduler.timesteps = torch.linspace(1000, 1, 4, device="cuda")
        clock._schedule_set(pipe.scheduler)
        for i, t in enumerate(pipe.scheduler.timesteps):
            call = clock.call({"encoder_hidden_states": torch.ones(1, 2, 3, device="cuda")}, t, None)
            assert (call.step, call.steps, call.timestep) == (i, 4, None)
            clock.advance()


def test_per_token_timesteps():
    pipe, clock = rig(diffusers.UniPCMultistepScheduler())
    mask = torch.tensor([[0.0, 0.0, 1.0, 1.0]])  # the first frame is given
    calls = list(loop(pipe, clock, 4, texts=(PROMPT, NEGATIVE), timestep=lambda t: mask * t))
    assert [(c.step, c.branch) for c in calls] == [(i, n) for i in range(4) for n in ("cond", "uncond")]


@pytest.mark.parametrize("copy_before", [True, False], ids=["before the schedule", "after it"])
def test_a_loop_on_a_copy_of_the_scheduler(copy_before):
    pipe, clock = rig(diffusers.UniPCMultistepScheduler())
    if not copy_before:
        pipe.scheduler.set_timesteps(5)
    own = copy.deepcopy(pipe.scheduler)
    own.set_timesteps(5)
    latents, seen = torch.zeros(1, 4, 2, 2), []
    for _ in range(2):
        for t in own.timesteps:
            seen += [clock.call({"encoder_hidden_states": text}, t.clone(), None) for text in (PROMPT, NEGATIVE)]
            latents = own.step(latents, t, latents).prev_sample
        own.set_timesteps(5)
    assert [c.step for c in seen] == [i for i in range(5) for _ in range(2)] * 2
    assert [c.branch for c in seen] == ["cond", "uncond"] * 10
    assert seen[9].run == seen[0].run == seen[10].run - 1
    assert seen[0].steps == (None if copy_before else 5)


def test_copies_and_pickles_of_a_watched_scheduler_are_plain():
    pipe, clock = rig(diffusers.DDIMScheduler())
    run = clock.run
    for twin in (copy.deepcopy(pipe.scheduler), copy.deepcopy(copy.deepcopy(pipe.scheduler))):
        twin.set_timesteps(7)
        assert len(twin.timesteps) == 7
        twin.step(torch.zeros(1), twin.timesteps[0], torch.zeros(1))
    pickle.loads(pickle.dumps(pipe.scheduler)).set_timesteps(3)
    assert clock.run == run
    assert len(pipe.scheduler.timesteps) == 1000


def test_a_replaced_scheduler_is_followed_and_let_go():
    pipe, clock = rig(diffusers.DDIMScheduler())
    list(loop(pipe, clock, 3))
    first, run = pipe.scheduler, clock.run
    first._begin_index = 2
    pipe.scheduler = diffusers.EulerDiscreteScheduler()
    calls = list(loop(pipe, clock, 5))
    assert [c.step for c in calls] == [0, 1, 2, 3, 4]
    assert {c.steps for c in calls} == {5}
    assert calls[0].run > run
    clock.detach()
    assert not {"step", "set_timesteps"} & {*vars(first), *vars(pipe.scheduler)}


def test_an_exception_in_a_run_does_not_reach_into_the_next():
    pipe, clock = rig(diffusers.DDIMScheduler())
    broken = loop(pipe, clock, 5, texts=(PROMPT, NEGATIVE))
    before = [next(broken) for _ in range(5)]
    broken.close()
    calls = list(loop(pipe, clock, 5, texts=(NEGATIVE, PROMPT)))
    assert calls[0].run == before[0].run + 1
    assert [(c.step, c.branch) for c in calls] == [(i, n) for i in range(5) for n in ("cond", "uncond")]


def test_two_denoisers_in_one_step():
    pipe, clock = rig(diffusers.DDIMScheduler())
    pipe.scheduler.set_timesteps(3)
    seen = []
    for t in pipe.scheduler.timesteps:
        for caller in ("video", "audio"):
            seen.append(clock.call({"encoder_hidden_states": PROMPT}, t / 1000, None, caller))
        pipe.scheduler.step(torch.zeros(1), t, torch.zeros(1))
    assert [(c.step, c.branch, c.first_in_step) for c in seen] == [(i, "cond", True) for i in range(3) for _ in (0, 1)]


def test_two_schedulers_that_step_together_end_one_step():
    pipe, clock = rig(diffusers.DDIMScheduler())
    other = diffusers.DDIMScheduler()
    pipe.components["audio_scheduler"] = pipe.audio_scheduler = other
    clock.detach()
    clock.attach()
    pipe.scheduler.set_timesteps(4)
    other.set_timesteps(4)
    for i, t in enumerate(pipe.scheduler.timesteps):
        assert clock.call({}, t / 1000, None).step == i
        pipe.scheduler.step(torch.zeros(1), t, torch.zeros(1))
        other.step(torch.zeros(1), t, torch.zeros(1))


def test_signatures_stay_and_nothing_is_left():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    before = dict(vars(scheduler))
    plain = inspect.signature(scheduler.set_timesteps), inspect.signature(scheduler.step)
    _, clock = rig(scheduler)
    assert "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
    assert (inspect.signature(scheduler.set_timesteps), inspect.signature(scheduler.step)) == plain
    clock.detach()
    assert vars(scheduler) == before
    run = clock.run
    scheduler.set_timesteps(4)
    assert clock.run == run


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_watchers_leave_in_any_order(order):
    scheduler, seen = diffusers.DDIMScheduler(), []
    leave = [watch_method(scheduler, "set_timesteps", lambda s, i=i: seen.append(i)) for i in range(2)]
    scheduler.set_timesteps(3)
    assert seen == [0, 1]
    leave[order[0]]()
    scheduler.set_timesteps(3)
    assert seen == [0, 1, order[1]]
    leave[order[1]]()
    assert "set_timesteps" not in vars(scheduler)


def test_an_instances_own_method_comes_back():
    scheduler = diffusers.DDIMScheduler()
    own = scheduler.step = lambda *args: "mine"
    leave = watch_method(scheduler, "step", lambda s: None)
    assert scheduler.step() == "mine"
    leave()
    assert scheduler.step is own


def test_by_hand():
    clock = Clock()
    for run in range(2):
        clock.start(10, begin=4)
        for i in range(4, 10):
            calls = [clock.call({}, None, None) for _ in range(2)]
            assert [(c.step, c.branch, c.first_step) for c in calls] == [(i, n, i == 4) for n in ("cond", "uncond")]
            assert calls[0].steps == 10
            assert calls[0].run == clock.run
            clock.advance()
        assert clock.run == run + 2
    assert clock.call({}, None, None).progress == 1  # past the end


@pytest.mark.parametrize(("steps", "begin"), [(0, 0), (5, 5), (5, -1), ("5", 0), (5.0, 0)])
def test_by_hand_refuses(steps, begin):
    with pytest.raises(DiffAccelError, match=r"clock\.start needs whole numbers, steps >= 1"):
        Clock().start(steps, begin)


@pytest.mark.parametrize("rising", [False, True])
def test_a_bare_denoiser_is_followed_by_its_timestep(rising):
    clock, seen = Clock(), []
    values = [0.0, 0.25, 0.5, 0.75] if rising else [999, 750, 500, 250]
    for _ in range(2):
        for t in values:
            seen += [clock.call({"encoder_hidden_states": x}, torch.tensor([t]), None) for x in (PROMPT, NEGATIVE)]
    assert [(c.run, c.step, c.branch) for c in seen] == [
        (run, step, branch) for run in (1, 2) for step in range(4) for branch in ("cond", "uncond")
    ]
    assert seen[0].steps is None
    assert [c.timestep for c in seen[:8:2]] == values


def test_progress_of_a_bare_denoiser_comes_from_its_timestep():
    assert Clock().call({}, 900, None).progress == pytest.approx(0.1)
    assert Clock().call({}, 0.9, None).progress == pytest.approx(0.1)


@contextmanager
def listening(pipe):
    """The calls that the roots of a pipeline's denoisers report, as (component, call)."""
    context = Context(find_denoisers(pipe), Clock(pipe), Artefacts(), pipeline=pipe)
    seen = []
    with context.undo:
        for denoiser in context.denoisers:
            name = denoiser.component
            context.root(denoiser).listeners.append(lambda call, *rest, name=name: seen.append((name, call)))
        yield seen


EXPECTED_BRANCHES = {
    "sd15": {"batched"},
    "flux": {"cond"},
    "flux_img2img": {"cond"},
    "wan": {"cond", "uncond"},
    "qwen_image": {"cond", "uncond"},
    "sd3_heun": {"batched"},
    "pixart_sigma": {"cond"},  # guides in one batch, but keeps that to itself
}


@pytest.mark.parametrize("name", ["wan22", *EXPECTED_BRANCHES])
def test_pipelines(name):
    pipe = PIPELINES[name].build()
    with listening(pipe) as seen:
        for fails in (True, False, False):
            del seen[:]
            with pytest.raises(ZeroDivisionError) if fails else nullcontext(), failing_at(pipe, 3 if fails else -1):
                PIPELINES[name].call(pipe, steps=6)
    calls = [call for _, call in seen]
    total = len(pipe.scheduler.timesteps)
    begin = total - len({c.step for c in calls})
    assert (begin > 0) == ("img2img" in name)
    assert sorted({c.step for c in calls}) == list(range(begin, total))
    assert {c.steps for c in calls} == {total}
    assert len({c.run for c in calls}) == 1
    branches = EXPECTED_BRANCHES.get(name, {"cond", "uncond"})
    assert [(c.step, c.branch) for c in calls] == [(i, b) for i in range(begin, total) for b in sorted(branches)]
    if name == "wan22":
        components = [component for component, _ in seen]
        assert set(components) == {"transformer", "transformer_2"}
        assert components == sorted(components)
    assert not {"step", "set_timesteps"} & set(vars(pipe.scheduler))
    for component in pipe.components.values():
        assert not isinstance(component, nn.Module) or "_diffusers_hook" not in vars(component)


@contextmanager
def failing_at(pipe, step):
    """The scheduler of ``pipe`` raises in its ``step``-th step."""
    count = iter(range(1000))

    def fail(scheduler):
        if next(count) == step:
            raise ZeroDivisionError

    leave = watch_method(pipe.scheduler, "step", fail)
    try:
        yield
    finally:
        leave()

"""Timing, the meter, comparisons and their folder, on tiny pipelines; what is asserted does not depend on speed."""

import contextlib
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from zoo_pipelines import PIPELINES

from diffaccel import Plan, StepCache
from diffaccel.errors import InputError, ModelError, PlanError
from diffaccel.eval.compare import compare
from diffaccel.eval.figures import draw, side_by_side
from diffaccel.eval.generate import Job, generate, steps_of
from diffaccel.eval.meter import metered
from diffaccel.eval.result import Row
from diffaccel.eval.store import Store, digest
from diffaccel.eval.summary import matching_steps
from diffaccel.eval.timing import Timing, interleave, speedup


@pytest.fixture(scope="module")
def pixart():
    return PIPELINES["pixart_sigma"].build()


def _request(name):
    return {key: value for key, value in PIPELINES[name].request.items() if key != "output_type"}


def _calls(**more):
    return {"num_inference_steps": 4, **_request("pixart_sigma"), **more}


@contextlib.contextmanager
def _half_output(pipe):
    """An acceleration that is visible: the denoiser's output is halved in every second call, which is not computed."""
    module, calls, last = pipe.transformer, [0], []
    forward = module.forward

    def halved(*args, **kwargs):
        calls[0] += 1
        if calls[0] % 2:
            last[:] = [forward(*args, **kwargs)]
            return last[0]
        return tuple(part * 0.5 for part in last[0])

    module.forward = halved
    try:
        yield
    finally:
        del module.forward


# --- timing ---


def test_interleave_takes_turns_and_keeps_every_sample():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    timings = interleave(calls, repeats=3, warmup=1)
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert [len(t.seconds) for t in timings.values()] == [3, 3]
    with pytest.raises(ValueError, match="repeats"):
        interleave(calls, repeats=0)


def test_interleave_tells_a_slow_callable_from_a_fast_one():
    timings = interleave({"slow": lambda: time.sleep(0.06), "fast": lambda: time.sleep(0.005)}, repeats=5)
    assert speedup(timings["slow"].seconds, timings["fast"].seconds).low > 1.5


def test_timing_and_speedup_by_hand():
    assert Timing((3.0, 1.0, 2.0)).median == 2
    base = [2.0, 4.0, 6.0, 8.0]
    ratio = speedup(base, [b / 2 for b in base])
    assert ratio.value == 2
    assert ratio.low <= 2 <= ratio.high
    noisy = speedup(base, [1.0, 1.0, 6.0, 8.0])
    assert noisy.low < noisy.value < noisy.high
    assert noisy == speedup(base, [1.0, 1.0, 6.0, 8.0])
    single = speedup([3.0], [1.0])
    assert (single.low, single.value, single.high, single.samples) == (3, 3, 3, 1)
    with pytest.raises(ValueError, match="equally many"):
        speedup([1.0], [1.0, 2.0])


# --- the meter ---


class _FakeClock:
    """A clock that the test advances."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_the_loop_is_timed_from_the_first_denoiser_call_to_the_last_scheduler_step(pixart, monkeypatch):
    clock = _FakeClock()
    for module in ("meter", "stages"):
        monkeypatch.setattr(f"diffaccel.eval.{module}.time", SimpleNamespace(perf_counter=clock))
    spent = {"text": 100.0, "denoiser": 10.0, "step": 1.0, "decode": 1000.0}

    def slowed(method, seconds):
        def run(*args, **kwargs):
            clock.now += seconds
            return method(*args, **kwargs)

        return run

    parts = ((pixart.text_encoder, "forward", "text"), (pixart.transformer, "forward", "denoiser"))
    parts += ((pixart.scheduler, "step", "step"), (pixart.vae, "decode", "decode"))
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, key in parts:
            patch.setitem(owner.__dict__, name, slowed(getattr(owner, name), spent[key]))
        _, cost = metered(pixart, lambda: generate(pixart, Job(0, "a red circle", 0), _calls()))
    assert cost.steps == cost.denoiser_calls == 4
    assert cost.loop_seconds == 44
    assert cost.seconds >= 1144  # text may be encoded in one call or two
    assert cost.text_seconds == cost.seconds - 1044 and cost.decode_seconds == 1000
    assert cost.step_seconds == (11, 11, 11, 11)
    assert cost.peak_bytes > 10 << 20


def test_the_meter_leaves_nothing_behind(pixart):
    def state():
        modules = [
            (dict(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in pixart.transformer.modules()
        ]
        others = [pixart.scheduler, pixart.vae, pixart.text_encoder]
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in others[1:]]
        return [(sorted(d), a, b) for d, a, b in modules], [sorted(o.__dict__) for o in others], hooks

    before = state()
    metered(pixart, lambda: generate(pixart, Job(0, "a red circle", 0), _calls(num_inference_steps=2)))
    assert state() == before
    with pytest.raises(RuntimeError, match="stop"):
        metered(pixart, lambda: (_ for _ in ()).throw(RuntimeError("stop")))
    assert state() == before


@pytest.mark.parametrize("how", ["in place", "wrapper"])
def test_the_meter_sees_compiled_denoisers_and_compiles_nothing_again(how):
    pipe = PIPELINES["pixart_sigma"].build()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    if how == "in place":
        pipe.transformer.compile(backend=backend)
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend=backend)
    job, calls = Job(0, "a red circle", 0), _calls(num_inference_steps=3)
    plain = generate(pipe, job, calls)
    count = len(graphs)
    assert count
    sample, cost = metered(pipe, lambda: generate(pipe, job, calls))
    assert cost.denoiser_calls == 3
    assert cost.loop_seconds > 0
    assert len(graphs) == count
    assert np.array_equal(sample, plain)
    torch.compiler.reset()


# --- comparisons ---


@pytest.fixture(scope="module")
def result(pixart, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "half"
    prompts = ["a red circle", "a small blue square"]
    plans = {"half": _half_output, "nothing": lambda pipe: contextlib.nullcontext()}
    return compare(pixart, plans, prompts, (0, 7), _calls(), (2, 3), folder=folder, turn=2, progress=False)


def test_rows_of_a_comparison(result):
    assert [row.name for row in result.rows] == ["reference", "half", "nothing", "2 steps", "3 steps"]
    assert [row.steps for row in result.rows] == [4, 4, 4, 2, 3]
    assert result.restored
    nothing, half = result.row("nothing"), result.row("half")
    assert (nothing.identical, nothing.psnr.mean, nothing.scores["ssim"].mean) == (4, 100, pytest.approx(1))
    assert half.identical == 0
    assert half.psnr.worst <= half.psnr.worst_decile <= half.psnr.mean < 60
    assert result.row("2 steps").psnr.mean < 60
    weights = sum(p.nbytes for p in PIPELINES["pixart_sigma"].build().transformer.parameters())
    assert {row.model_bytes for row in result.rows} >= {weights} or half.model_bytes > weights  # buffers count too
    assert all(row.loop_seconds < row.call_seconds for row in result.rows)


def test_a_short_warm_up_leaves_no_note(pixart):
    cache = StepCache(threshold=100, min_steps=3)
    result = compare(
        pixart, {"cache": Plan(caching=cache)}, ["a red circle"], (0,), _calls(), controls=(), progress=False
    )
    row = result.row("cache")
    assert row.report["techniques"]["caching"]["reused"] > 0
    assert row.notes == ()


def test_psnr_of_a_row_is_that_of_the_images(result, pixart):
    job = Job(3, result.prompts[1], result.seeds[1])
    reference = generate(pixart, job, _calls())
    with _half_output(pixart):
        half = generate(pixart, job, _calls())
    db = -10 * np.log10(((half.astype(np.float64) - reference) ** 2).mean())
    recorded = result.store.records("item", row="half", item=3)[0]
    assert recorded["scores"]["psnr"] == pytest.approx(db, abs=1e-4)
    assert np.array_equal(result.store.load("reference", 3), reference)
    assert np.abs(result.store.load("half", 3) - half).max() <= 0.5 / 255 + 1e-6


def test_result_as_json_and_as_a_table(result, tmp_path):
    from rich.console import Console

    data = json.loads(result.save(tmp_path / "result.json").read_text())
    assert [row["name"] for row in data["rows"]][:2] == ["reference", "half"]
    assert data["rows"][1]["scores"]["psnr"]["worst_decile"] == result.row("half").psnr.worst_decile
    assert data["restored"] is True
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(result)
    text = console.export_text()
    assert all(row.name in text for row in result.rows)
    assert "…" not in text.split("Speed-up")[0]


def test_figures_are_pictures_of_the_result(result, tmp_path):
    from PIL import Image

    paths = draw(result, tmp_path)
    assert [p.name for p in paths] == [
        "contact-sheet.png",
        "side-by-side-half.png",
        "side-by-side-nothing.png",
        "speed-fidelity.png",
    ]
    for path in paths:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert pixels.std() > 5
        assert min(pixels.shape[:2]) > 300
    with pytest.raises(InputError, match="no row 'third'; rows: reference, half"):
        side_by_side(result, "third", tmp_path / "x.png")
    with pytest.raises(InputError, match="no item 4"):
        side_by_side(result, "half", tmp_path / "x.png", items=(4,))


class _Interrupted(Exception):
    pass


def test_an_interrupted_run_goes_on_and_other_settings_are_refused(pixart, tmp_path):
    left = [9]

    @contextlib.contextmanager
    def fragile(pipe):
        original = pipe.transformer.forward

        def forward(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise _Interrupted
            return original(*args, **kwargs)

        pipe.transformer.forward = forward
        try:
            yield
        finally:
            del pipe.transformer.forward

    def run(**other):
        request = {"seeds": (0,), "calls": _calls(), "controls": ()} | other
        return compare(
            pixart, {"x": fragile}, ["a red circle", "blue"], folder=tmp_path / "run", progress=False, **request
        )

    with pytest.raises(_Interrupted):
        run()  # two steps of warm-up, four for the first prompt; the second one fails half way
    assert "forward" not in pixart.transformer.__dict__
    records = (tmp_path / "run" / "records.jsonl").read_bytes()
    assert [json.loads(r)["row"] for r in records.splitlines() if b'"item"' in r] == ["reference", "reference", "x"]
    with (tmp_path / "run" / "records.jsonl").open("ab") as file:
        file.write(b'{"kind": "item", "row": "x", "it')  # killed while it wrote
    with pytest.raises(InputError, match=r"calls: .*num_inference_steps.*give another folder"):
        run(calls=_calls(num_inference_steps=5))
    left[0] = 6
    resumed = run()
    assert left[0] == 0  # two steps of warm-up and the missing prompt, nothing else
    assert resumed.row("x").identical == 2
    assert "resumed" in " ".join(resumed.notes)
    left[0] = 0
    assert run().row("x") == resumed.row("x")  # all there: nothing is run again


def test_the_control_is_the_step_count_of_nearest_cost(tmp_path):
    store = Store(tmp_path, {})
    for item in range(3):
        for row, seconds in (("reference", 20.0), ("fast", 7.2), ("none", 19.9), ("slow", 22.0), ("12 steps", 13.0)):
            store.append(kind="item", row=row, item=item, repeat=0, loop_seconds=seconds)
    reference = SimpleNamespace(name="reference", kind="reference", steps=20)
    control = SimpleNamespace(name="12 steps", kind="control", steps=12)
    assert matching_steps(store, [reference], "fast") == 7
    assert matching_steps(store, [reference], "none") == 20
    assert matching_steps(store, [reference], "slow") == 20
    # 12 steps were measured at 13 s, not the 12 s that a straight line says: 7.2 s is nearer to 7 x 13 / 12 than to 6.
    assert matching_steps(store, [reference, control], "fast") == 7
    assert matching_steps(store, [reference, control], "12 steps") == 12


def test_every_plan_gets_a_control(pixart):
    @contextlib.contextmanager
    def free(pipe):  # costs next to nothing, whatever else this machine does
        with pytest.MonkeyPatch.context() as patch:
            output = (torch.zeros(2, 8, 16, 16),)
            patch.setitem(
                pipe.transformer.__dict__, "forward", lambda hidden_states, **_: (output[0][: len(hidden_states)],)
            )
            yield

    prompts = ["a red circle", "a small blue square"]
    result = compare(pixart, {"free": free}, prompts, calls=_calls(num_inference_steps=8), progress=False)
    control = result.control_for("free")
    assert isinstance(control, Row)
    assert control.kind == "control"
    assert control.steps < 8
    assert result.restored


def test_the_noise_floor_runs_with_another_thread_count(pixart, monkeypatch):
    used = []
    forward = pixart.transformer.forward

    def spying(*args, **kwargs):
        used.append(torch.get_num_threads())
        return forward(*args, **kwargs)

    monkeypatch.setitem(pixart.transformer.__dict__, "forward", spying)
    threads = torch.get_num_threads()
    result = compare(pixart, {}, ["red"], calls=_calls(num_inference_steps=1), noise_floor=True, progress=False)
    assert result.row("noise floor").psnr.worst > 80
    assert set(used[1:]) - {threads} == {threads - 1 if threads > 1 else 2}
    assert torch.get_num_threads() == threads


def test_prompts_may_be_arguments_and_outputs_videos(tmp_path):
    entry = PIPELINES["wan"]
    pipe = entry.build()
    wrapped = SimpleNamespace(pipe=pipe, defaults={"num_inference_steps": 2, **_request("wan")})
    plans = {"nothing": lambda pipe: contextlib.nullcontext()}
    result = compare(wrapped, plans, [entry.conditions(1)], controls=(1,), folder=tmp_path / "v", progress=False)
    assert result.row("nothing").identical == 1
    video = result.store.load("1 step", 0)
    assert video.ndim == 4
    assert len(video) > 1
    assert len(draw(result, tmp_path)) == 3


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"prompts": "a red circle"}, InputError, "list of texts"),
        ({"prompts": []}, InputError, "list of texts"),
        ({"prompts": [3]}, InputError, "list of texts"),
        ({"seeds": (0, 0)}, InputError, "seeds"),
        ({"seeds": ("a",)}, InputError, "seeds"),
        ({"plans": {"reference": _half_output}}, InputError, "other than 'reference'"),
        ({"plans": ["no-such-preset"]}, PlanError, "no-such-preset"),
        ({"calls": {"generator": None}}, InputError, "seeds="),
        ({"calls": {"num_inference_step": 4}}, InputError, "takes no 'num_inference_step'"),
        ({"calls": {"num_inference_steps": 0}}, InputError, "whole number >= 1, got 0"),
        ({"controls": ("less steps",)}, InputError, "'fewer steps'"),
        ({"controls": (4,)}, InputError, "reference itself"),
        ({"calls": {"timesteps": [999, 1]}, "controls": (3,)}, InputError, "no num_inference_steps to change"),
        ({"repeats": 0}, InputError, "repeats"),
        ({"model": object()}, ModelError, "expected a diffusers pipeline"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(pixart, tmp_path, change, error, says):
    request = {"model": pixart, "plans": {"half": _half_output}, "prompts": ["a"], "calls": _calls()} | change
    folder = tmp_path / "new"
    with pytest.raises(error, match=says):
        compare(**request, folder=folder, progress=False)
    assert not folder.exists()


def test_a_folder_with_other_files_is_refused(pixart, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="new or an empty folder"):
        compare(pixart, {"half": _half_output}, ["a"], calls=_calls(), folder=tmp_path, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_steps_and_digests():
    pipe = PIPELINES["pixart_sigma"].build()
    assert steps_of(pipe, {}) == 20
    assert steps_of(pipe, {"num_inference_steps": 7}) == 7
    assert steps_of(pipe, {"sigmas": [1.0, 0.5]}) is None
    a = np.zeros((1, 2, 2, 3), np.float32)
    assert digest(a) == digest(a.copy()) != digest(a + 1)

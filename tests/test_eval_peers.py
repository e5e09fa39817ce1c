"""Peers that are calibrated, stacked, or programs of their own."""

import builtins
import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from zoo_pipelines import PIPELINES

from diffaccel.denoiser import find_denoisers
from diffaccel.errors import InputError, MissingPackageError
from diffaccel.eval.compare import compare
from diffaccel.eval.peer_calibrated import mag_ratios, schedule_of, smooth_errors
from diffaccel.eval.peer_command import Command
from diffaccel.eval.peers import PEERS, STACKS, PeerRow, peers_of


@pytest.fixture(scope="module")
def pixart():
    return PIPELINES["pixart_sigma"].build()


def _calls(steps=8):
    request = {k: v for k, v in PIPELINES["pixart_sigma"].request.items() if k != "output_type"}
    return {**request, "num_inference_steps": steps}


def _wan_request():
    return {k: v for k, v in PIPELINES["wan"].request.items() if k != "output_type"}


def _compare(pipe, peers, prompts=("a", "b"), **more):
    return compare(pipe, {}, list(prompts), (0,), _calls(), (), peers=peers, progress=False, **more)


def _state(pipe):
    return {name: (sorted(m.__dict__), sorted(m._modules), type(m)) for name, m in pipe.transformer.named_modules()}


# --- side by side ---


def test_peers_run_beside_and_what_cannot_run_says_why(pixart, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomesd", None)
    before = {name: sorted(m.__dict__) for name, m in pixart.transformer.named_modules()}
    peers = ("first-block-cache=0.3", "torchao-int8", "deepcache", "tomesd", "taylorseer=2")
    result = compare(pixart, {}, ["a", "b"], (0,), _calls(8), (), peers=peers)
    kinds = {row.name: row.kind for row in result.rows}
    assert kinds == {"reference": "reference", **dict.fromkeys(["first-block-cache 0.3", "torchao-int8"], "peer")}
    assert result.row("first-block-cache 0.3").identical == 0  # it skipped something
    assert 15 < result.row("torchao-int8").psnr.mean < 90
    notes = " ".join(result.notes)
    assert "tomesd 0.5 cannot run here: MissingPackageError: tomesd needs tomesd: pip install tomesd" in notes
    assert "deepcache 2 cannot run here" in notes and "deepcache 3 cannot run here" in notes
    assert "taylorseer 2 cannot run here: InputError: it finds nothing to hook" in notes
    assert result.restored and before == {name: sorted(m.__dict__) for name, m in pixart.transformer.named_modules()}


def test_a_peer_comes_off_a_pipeline_that_opens_cache_contexts():
    """Its registries are there before, and must not keep the hooks: the second turn would find them."""
    pipe = PIPELINES["wan"].build()
    calls = {**_wan_request(), "num_inference_steps": 3}
    result = compare(pipe, {}, ["a", "b"], (0,), calls, (), peers=("sea-cache", "first-block-cache=0.3"), turn=1)
    assert [row.kind for row in result.rows] == ["reference", "peer", "peer", "peer"] and result.restored


@pytest.mark.parametrize(
    ("peer", "message"), [("cache-dti", "did you mean 'cache-dit'"), ("taylorseer=x", "must be a number, got 'x'")]
)
def test_unknown_peers_are_refused(pixart, peer, message):
    with pytest.raises(InputError, match=message):
        compare(pixart, {}, ["a"], calls=_calls(), peers=(peer,))


# --- names ---


def test_rows_by_name():
    assert list(peers_of(["mag-cache"])) == ["mag-cache 0.06", "mag-cache 0.12"]
    assert list(peers_of(["quanto-int8+sea-cache"])) == ["quanto-int8+sea-cache 0.15", "quanto-int8+sea-cache 0.25"]
    everything = peers_of(["all"])
    assert len(everything) == sum(len(p.settings) or 1 for p in PEERS.values()) + len(STACKS)
    stack = everything["torchao-int8+first-block-cache 0.12"]
    assert [(p.name, s) for p, s in stack.parts] == [("torchao-int8", None), ("first-block-cache", 0.12)]
    with pytest.raises(InputError, match="no peer 'quanto'"):
        peers_of(["sea-cache+quanto"])


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ("command:ov=/opt/bin/python 'my peer.py' --int8", "ov", ["/opt/bin/python", "my peer.py", "--int8"]),
        ("command:/opt/bin/python peers/sdnq.py", "sdnq", ["/opt/bin/python", "peers/sdnq.py"]),
        ("command:/opt/bin/accelerate-it", "accelerate-it", ["/opt/bin/accelerate-it"]),
        ("command:/opt/x --threshold=3", "x", ["/opt/x", "--threshold=3"]),
    ],
)
def test_commands_by_name(text, name, words):
    command = peers_of([text])[name]
    assert isinstance(command, Command) and command.words == words


@pytest.mark.parametrize("text", ["", "x=", "x='"])
def test_commands_that_are_none(text):
    with pytest.raises(InputError, match=f"peer command:{text}"):
        Command(text)


# --- calibration ---


def test_mag_cache_is_calibrated_by_diffusers_itself(pixart, capsys):
    result = _compare(pixart, ("mag-cache=0.3", "mag-cache=0"))
    careful, fast = result.row("mag-cache 0"), result.row("mag-cache 0.3")
    assert careful.identical == 2 and fast.identical == 0 and fast.psnr.mean < 90 and result.restored
    denoiser = find_denoisers(pixart)[0]
    before = _state(pixart)
    run = lambda: pixart(prompt="a", **_calls(5), output_type="np", generator=torch.Generator().manual_seed(0))  # noqa: E731
    ratios = mag_ratios(pixart, denoiser, run, 5)
    assert ratios[0] == 1 and all(0.1 < r < 10 for r in ratios) and len(set(ratios)) == 5
    assert _state(pixart) == before
    assert "Calibration Complete" not in capsys.readouterr().out
    with pytest.raises(InputError, match="5 ratios for 6 steps"):
        mag_ratios(pixart, denoiser, run, 6)


def test_schedules_skip_while_the_error_stays_small():
    inf = torch.inf
    errors = [[inf] * 3, [0.1, inf, inf], [0.1, 0.2, inf], [0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [0.5, 0.6, 0.7], [0, 0, 0]]
    assert schedule_of(errors, 0.25) == [1, 0, 0, 1, 0, 1, 0]
    assert schedule_of(errors, 0) == [1] * 7
    assert schedule_of([[inf] * 3] + [[0, 0, 0]] * 8, 0.1) == [1, 0, 0, 0, 1, 0, 0, 0, 1]


def _fake_smooth_cache(monkeypatch, block_class):
    """The package as its wheel is: wraps attention modules, prints, and knows the schedule."""

    class Helper:
        def __init__(self, model, schedule):
            self.model, self.schedule, self.block_classes, self.components_to_wrap = (
                model,
                schedule,
                [block_class],
                ["attn1"],
            )
            self.counts, self.last = {}, {}

        def enable(self):
            for block in self.model.modules():
                if isinstance(block, block_class):
                    block.attn1.forward = self.wrapped(block.attn1, block.attn1.forward)

        def wrapped(self, part, forward):
            def call(*args, **kwargs):
                step = self.counts[part] = self.counts.get(part, -1) + 1
                getattr(package.smooth_cache_helper, "print", builtins.print)("step", step)
                if self.schedule["attn1"][step]:
                    self.last[part] = forward(*args, **kwargs)
                return self.last[part]

            return call

        def disable(self):
            pass  # leaves its forwards, as the package does

        def reset_state(self):
            self.counts.clear()

    package = ModuleType("SmoothCache")
    package.DiffuserCacheHelper, package.smooth_cache_helper = Helper, SimpleNamespace()
    monkeypatch.setitem(sys.modules, "SmoothCache", package)
    return package


def test_smooth_cache_gets_a_schedule_from_this_model(pixart, monkeypatch, capsys):
    block_class = type(pixart.transformer.transformer_blocks[0])
    package = _fake_smooth_cache(monkeypatch, block_class)
    before = _state(pixart)
    result = _compare(pixart, ("smooth-cache=0", "smooth-cache=9"))
    assert result.row("smooth-cache 0").identical == 2 and result.row("smooth-cache 9").identical == 0
    assert result.restored and _state(pixart) == before and not vars(package.smooth_cache_helper)
    assert "step" not in capsys.readouterr().out
    errors = smooth_errors(
        pixart, find_denoisers(pixart)[0], lambda: pixart(prompt="a", **_calls(4), output_type="np"), 4
    )
    assert errors[0] == [torch.inf] * 3 and errors[1][1] == torch.inf and 0 < errors[3][0] < 9
    _fake_smooth_cache(monkeypatch, nn.LSTM)
    assert "smooth-cache 9 cannot run here: InputError: it finds no block that it knows" in " ".join(
        _compare(pixart, ("smooth-cache=9",), "a").notes
    )


def test_what_needs_a_count_of_steps_is_refused_without(pixart):
    row = PeerRow([(PEERS["mag-cache"], 0.1)])
    with pytest.raises(InputError, match="calibrated for a number of steps"):
        row.prepare(pixart, lambda: None, None)


def test_a_missing_package_is_named_as_pip_knows_it(pixart, monkeypatch):
    monkeypatch.setitem(sys.modules, "SmoothCache", None)
    with pytest.raises(MissingPackageError, match="smooth-cache needs dit-smoothcache: pip install dit-smoothcache"):
        PeerRow([(PEERS["smooth-cache"], 0.1)]).prepare(pixart, lambda: None, 8)


# --- stacks ---


def test_peers_on_top_of_each_other(pixart):
    before = _state(pixart)
    peers = ("torchao-int8+first-block-cache=0.3", "torchao-int8", "first-block-cache=0.3")
    result = _compare(pixart, peers, turn=1)
    both, int8, cache = result.rows[1:]
    assert (both.name, both.kind) == ("torchao-int8+first-block-cache 0.3", "peer")
    assert both.model_bytes == int8.model_bytes < cache.model_bytes
    assert both.psnr.mean < int8.psnr.mean
    assert result.restored and _state(pixart) == before


def test_modules_that_a_peer_replaces_come_back(pixart, monkeypatch):
    """As optimum-quanto does."""

    class Halved(nn.Linear):
        def forward(self, x):
            return super().forward(x) / 2

    def quantize(model, weights):
        for module in list(model.modules()):
            for name, part in list(module.named_children()):
                if type(part) is nn.Linear:
                    new = Halved(part.in_features, part.out_features, part.bias is not None)
                    new.weight, new.bias = part.weight, part.bias
                    setattr(module, name, new)

    package = ModuleType("optimum.quanto")
    package.quantize, package.freeze, package.qint8 = quantize, lambda model: None, "int8"
    monkeypatch.setitem(sys.modules, "optimum", ModuleType("optimum"))
    monkeypatch.setitem(sys.modules, "optimum.quanto", package)
    before = _state(pixart)
    result = _compare(pixart, ("quanto-int8",), "a")
    assert result.row("quanto-int8").identical == 0 and result.restored and _state(pixart) == before


# --- programs of their own ---

PROGRAM = """
import json, sys
import numpy as np
request = json.load(open(sys.argv[1]))
assert request["version"] == 1 and request["warm_up"]["num_inference_steps"] <= 6, request["warm_up"]
assert json.load(open(request["pipeline"] + "/model_index.json"))["_class_name"] == "PixArtSigmaPipeline"
for item in request["items"]:
    seed = item["seed"] + len(item["arguments"]["prompt"])
    np.save(item["output"], np.random.default_rng(seed).random((SIZE, SIZE, 3), np.float32))
count = len(request["items"])
print("working")
answer = {"seconds": [0.5] * count, "notes": ["threads " + str(request["threads"])]}
MORE
json.dump(answer, open(request["answer"], "w"))
"""


def _program(tmp_path, more="", size=None):
    size = size or _calls()["height"]
    file = tmp_path / "noise.py"
    file.write_text(PROGRAM.replace("SIZE", str(size)).replace("MORE", more))
    return f"command:{sys.executable} {file}"


def test_a_program_of_its_own_is_a_row(pixart, tmp_path):
    result = _compare(pixart, (_program(tmp_path),), folder=tmp_path / "run", flops=True)
    row = result.row("noise")
    assert (row.kind, row.loop_seconds, row.call_seconds, row.peak_bytes, row.model_bytes) == (
        "peer",
        None,
        0.5,
        None,
        None,
    )
    calls = [r["seconds"] for r in result.store.records("item", row="reference")]
    assert row.speedup.value == pytest.approx(np.median(calls) / 0.5)
    assert row.psnr.mean < 20 and row.flops is None and result.rows[0].flops
    threads = torch.get_num_threads()
    assert row.notes == (f"threads {threads}", "it does not tell its loop: its speed-up is that of the whole call")
    assert json.loads(result.save(tmp_path / "r.json").read_text())["rows"][1]["loop_seconds"] is None
    assert result.table().row_count == 2 and result.costs().row_count == 2
    expected = np.random.default_rng(1).random((_calls()["height"],) * 2 + (3,), np.float32)
    assert np.abs(result.store.load("noise", 1)[0] - expected).max() <= 0.5 / 255 + 1e-6
    again = _compare(pixart, (_program(tmp_path),), folder=tmp_path / "run", flops=True)
    assert again.row("noise").scores == row.scores


def test_a_program_that_tells_its_loop_is_timed_by_it(pixart, tmp_path):
    more = "answer |= {'loop_seconds': [0.25] * count, 'peak_bytes': 3 << 20, 'model_bytes': 2 << 20}"
    row = _compare(pixart, (_program(tmp_path, more),), "a").row("noise")
    assert (row.loop_seconds, row.peak_bytes, row.model_bytes, len(row.notes)) == (0.25, 3 << 20, 2 << 20, 1)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ("raise SystemExit('no such device')", "ended with 1: no such device"),
        ("answer['seconds'] = [1] * (count + 1)", "gave no answer as the protocol asks: 2 seconds for 1 items"),
        ("del answer['seconds']", "gave no answer as the protocol asks"),
        ("np.save(item['output'], np.full((4, 4, 3), 9.0))", "gave no sample for item 0: expected values in"),
    ],
)
def test_programs_that_fail_are_notes(pixart, tmp_path, more, reason):
    result = _compare(pixart, (_program(tmp_path, more),), "a")
    assert len(result.rows) == 1 and f"noise cannot run here: InputError: noise {reason}" in result.notes[0]


def test_a_program_with_pictures_of_another_size_is_refused(pixart, tmp_path):
    with pytest.raises(InputError, match=r"noise: output \(1, 12, 12, 3\), reference .*: not comparable"):
        _compare(pixart, (_program(tmp_path, size=12),), "a")

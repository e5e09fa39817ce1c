"""The self-test finds broken kernels, survives their crashes, and keeps them from being used."""

import json
import sys
import textwrap
import warnings

import pytest
import torch

from diffaccel.cli import main
from diffaccel.kernels import _candidates, _disabled, selftest_run
from diffaccel.kernels._candidates import Trial, choose, device_name, forget
from diffaccel.kernels.selftest import Case, Result, Subject, examine
from diffaccel.kernels.selftest_cases import cases

CPU = torch.device("cpu")
OPERATORS = (
    *("token_quantize", "int8_linear", "fp8_linear", "block_sparse_attention", "permute_tokens"),
    *("int4_linear", "hadamard_quantize", "static_quantize", "int8_conv"),
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFACCEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DIFFACCEL_KERNELS", raising=False)
    forget()
    yield
    forget()


def doubling(run, operator="double", candidate="quick"):
    """A case whose operator should return twice its input."""

    def make(around):
        x = around.place(torch.randn(6, 40))
        return Subject(run, (x,), lambda y: y, 2 * x.double(), 1e-6)

    return Case(operator, candidate, torch.float32, "6 x 40", make, ((operator, candidate),), compiles=False)


def forgets_a_row(x):
    y = torch.empty_like(x)
    y[:-1] = 2 * x[:-1]
    return y


def reads_behind_its_input(x):
    y = 2 * x
    y[-1] += torch.as_strided(x, (40,), (1,), x.storage_offset() + x.numel())
    return y


def writes_before_its_input(x):
    torch.as_strided(x, (1,), (1,), x.storage_offset() - 1).fill_(0)
    return 2 * x


def is_never_the_same(x):
    return 2 * x + 1e-7 * torch.rand_like(x)


def raises(x):
    raise ValueError("no such tile")


@pytest.mark.parametrize(
    ("run", "check", "reason"),
    [
        (lambda x: 2.01 * x, "accurate", "relative error 0.005, allowed 1e-06"),
        (forgets_a_row, "accurate", "inf"),
        (reads_behind_its_input, "accurate", "inf"),
        (writes_before_its_input, "keeps inside", "wrote outside"),
        (is_never_the_same, "repeats", "numbers differ"),
        (raises, "runs", "ValueError: no such tile"),
    ],
)
def test_a_broken_kernel_is_caught(run, check, reason):
    failures = examine(doubling(run), CPU).failures
    assert check in failures and reason in failures[check]


def test_a_right_kernel_passes():
    result = examine(doubling(lambda x: 2 * x), CPU)
    assert result.failures == {} and result.seconds > 0 and result.error < 1e-6


def worker(tmp_path, monkeypatch, *runs):
    """Replace the worker by one with a case, candidates c0, c1, ..., for each of these bodies."""
    script = tmp_path / "worker.py"
    lines = [f"    case('c{i}', lambda x: {body})," for i, body in enumerate(runs)]
    script.write_text(
        textwrap.dedent("""
            import os, sys, time, torch
            from diffaccel.kernels.selftest import Case, Subject
            from diffaccel.kernels.selftest_run import work
            def case(name, run):
                def make(around):
                    x = around.place(torch.randn(3, 8))
                    return Subject(run, (x,), lambda y: y, 2 * x.double(), 1e-6)
                return Case("double", name, torch.float32, "any", make, (("double", name),), compiles=False)
            work(torch.device("cpu"), [
        """)
        + "\n".join([*lines, "], int(sys.argv[sys.argv.index('--skip') + 1]))"])
    )
    monkeypatch.setattr(selftest_run, "WORKER", (sys.executable, str(script)))


def test_failures_and_crashes_are_remembered_until_they_pass(tmp_path, monkeypatch):
    worker(tmp_path, monkeypatch, "2 * x", "3 * x", "os._exit(9)", "x + x")
    plans = []
    results = list(selftest_run.run("cpu", begin=plans.append))
    assert [case.candidate for case in plans[0].cases] == ["c0", "c1", "c2", "c3"]
    assert [sorted(result.failures) for result in results] == [[], ["accurate"], ["runs"], []]
    assert "crashed" in results[2].failures["runs"]
    failed = _disabled.disabled(device_name(CPU), False)["double"]
    assert set(failed) == {"c1 float32", "c2 float32"}
    assert "relative error 0.5" in failed["c1 float32"] and "crashed" in failed["c2 float32"]

    worker(tmp_path, monkeypatch, "2 * x", "x + x", "x + x", "2 * x")
    assert len(list(selftest_run.run("cpu", "double c1*"))) == 4  # this worker knows no patterns
    assert set(_disabled.disabled(device_name(CPU), False)["double"]) == {"c1 float32", "c2 float32"}, (
        "some of the cases say nothing"
    )
    list(selftest_run.run("cpu"))
    assert _disabled.disabled(device_name(CPU), False) == {}


def test_a_kernel_that_hangs(tmp_path, monkeypatch):
    worker(tmp_path, monkeypatch, "time.sleep(1000)")
    (result,) = selftest_run.run("cpu", begin=lambda plan: monkeypatch.setattr(selftest_run, "TIMEOUT", 0.5))
    assert "took too long" in result.failures["runs"]


def test_a_worker_that_cannot_start(tmp_path, monkeypatch):
    monkeypatch.setattr(selftest_run, "WORKER", (sys.executable, "-c", "raise SystemExit('no such device')"))
    with pytest.raises(RuntimeError, match="cannot run on cuda:7: no such device"):
        list(selftest_run.run("cuda:7"))


def trial():
    x = torch.ones(4, 4)
    runs = {"quick": lambda: 2 * x, "dense": lambda: x + x}
    return Trial(runs, lambda y: float((y - 2).abs().max()), {"quick": 0.0, "dense": 0.0})


def chosen(shape=1):
    return choose("double", (shape,), CPU, ("quick", "dense"), trial, "dense")


def test_a_disabled_candidate_is_avoided_with_one_warning():
    _disabled.disable(device_name(CPU), False, "double", "quick", torch.float32, "accurate: relative error 0.5")
    with pytest.warns(
        RuntimeWarning, match=r"quick failed `diffaccel selftest` .*relative error 0\.5.* run `diffaccel"
    ):
        assert chosen() == "dense"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(2) == "dense"


def test_a_failure_concerns_its_dtype_only(monkeypatch):
    monkeypatch.setattr(_candidates, "seconds_of", lambda run, device: 1.0)  # of equally fast ones the first is taken
    _disabled.disable(device_name(CPU), False, "double", "quick", torch.float16, "accurate: relative error 0.5")
    assert chosen(torch.float32) == "quick"
    with pytest.warns(RuntimeWarning, match="quick failed"):
        assert chosen(torch.float16) == "dense"


def test_a_candidate_by_hand_is_used_all_the_same(monkeypatch):
    _disabled.disable(device_name(CPU), False, "double", "quick", torch.float32, "slow")
    monkeypatch.setenv("DIFFACCEL_KERNELS", "double=quick")
    assert chosen() == "quick"


def test_an_update_gives_another_chance(monkeypatch):
    _disabled.disable(device_name(CPU), False, "double", "quick", torch.float32, "wrong")
    monkeypatch.setattr("diffaccel.kernels._store.versions", lambda cuda: "torch 99")
    assert _disabled.disabled(device_name(CPU), False) == {}


def test_where_everything_failed_the_default_runs():
    for name in ("quick", "dense"):
        _disabled.disable(device_name(CPU), False, "double", name, torch.float32, "wrong")
    with pytest.warns(RuntimeWarning, match="is not used"):
        assert chosen() == "dense"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 1}', '{"format": 7, "machines": {}}', '{"format": 2, "machines": {"a": 1}}']
)
def test_a_damaged_file_is_ignored_with_a_clear_message(text):
    file = _disabled.disabled_file()
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.warns(
        RuntimeWarning, match=r"disabled\.json cannot be read .* is ignored: .* Run `diffaccel selftest`"
    ):
        chosen()
    _disabled.disable(device_name(CPU), False, "double", "quick", torch.float32, "wrong")
    assert _disabled.disabled(device_name(CPU), False) == {"double": {"quick float32": "wrong"}}


def test_cases_cover_every_kernel():
    found = cases(CPU)
    assert len({case.name for case in found}) == len(found)
    interpreted = {(case.operator, case.dtype) for case in found if case.candidate == "triton"}
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    assert interpreted == {(operator, dtype) for operator in OPERATORS for dtype in dtypes}
    assert all(("dense" not in (name for _, name in case.disables)) for case in found)


@pytest.mark.parametrize("operator", OPERATORS)
def test_kernels_pass_in_the_interpreter(operator):
    found = [case for case in cases(CPU) if case.operator == operator and case.candidate == "triton"]
    assert examine(found[3], CPU).failures == {}


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """Runs ``diffaccel ARGUMENTS``, with these results in place of the worker; exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(results, *arguments):
        def fake(device, pattern, begin):
            begin(selftest_run.Plan("a processor", False, tuple(results)))
            yield from results

        monkeypatch.setattr(selftest_run, "run", fake)
        monkeypatch.setattr(sys, "argv", ["diffaccel", "selftest", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code or 0, *capsys.readouterr()

    return run


GOOD = Result(
    "int8_linear", "int_mm", "bfloat16", "M 1, N 2, K 3", {"accurate": None}, "", 1e-3, 4e-3, 1e-3, 2e-3, 1 << 20
)
BAD = Result(
    "int8_linear", "triton", "float16", "M 1, N 2, K 3", {"accurate": "relative error 0.5, allowed 0.001"},
    tolerance=1e-3, disables=(("int8_linear", "triton"),),
)  # fmt: skip
SKIPPED = Result("int8_linear", "triton", "float32", "M 1, N 2, K 3", skipped="not enough memory")


def test_report(cli, tmp_path):
    code, out, _ = cli([GOOD, SKIPPED], "--device", "cpu", "--json", "out/result.json")
    assert code == 0 and "2.00x dense" in out and "2 cases, 0 failed, 1 skipped" in out
    data = json.loads((tmp_path / "out" / "result.json").read_text())
    assert data["device"] == "a processor" and data["versions"]["torch"] and len(data["cases"]) == 2


def test_report_of_a_failure(cli):
    code, out, _ = cli([GOOD, BAD], "--device", "cpu")
    assert code == 1 and "2 cases, 1 failed" in out
    assert "failed: int8_linear triton float16 M 1, N 2, K 3: accurate: relative error 0.5, allowed 0.001" in out
    assert "not used here until `diffaccel selftest` passes: int8_linear triton float16" in out


def test_mistakes_are_named(cli):
    code, _, err = cli([], "--device", "tpu")
    assert code == 2 and "--device must be cpu" in err
    code, _, err = cli([], "--cases", "nothing", "--device", "cpu")
    assert code == 2 and "no case matches 'nothing'" in err

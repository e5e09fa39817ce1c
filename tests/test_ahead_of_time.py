"""What the GPU's compiler makes of the kernels, without a GPU: as good as the committed table says, and complete."""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from diffaccel.cli import main
from diffaccel.kernels import _candidates, _disabled
from diffaccel.kernels._candidates import Trial

pytest.importorskip("triton")
from diffaccel.kernels._launch import Config, Specimen
from diffaccel.kernels.ahead_of_time import INSTRUCTIONS, SHARED_KIB, Row, judge, report, specimens

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("kernel_tables", ROOT / "scripts" / "kernel_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_has_every_kernel(script):
    now = {(specimen.name, target) for specimen in specimens() for target in specimen.targets}
    assert now == set(script.committed()), "run python scripts/kernel_tables.py"


def test_the_table_has_no_problem(script):
    assert [key for key, cell in script.committed().items() if "**" in cell] == []


def test_no_kernel_has_become_worse(script):
    """A sixth of the table. Registers and shared memory change with versions; what must not is said in `judge`."""
    committed = script.committed()
    for row in report(sample=True):
        where = f"{row.specimen} on sm_{row.target}"
        assert row.problems == (), where
        if row.multiply:
            instructions = " ".join(row.multiply) + (" (older)" if row.older else "")
            assert committed[row.specimen, row.target].endswith(instructions), where


def test_large_products_use_the_instruction_made_for_the_chip(script):
    many = {key: cell for key, cell in script.committed().items() if "gemm" in key[0] and "many tiles" in key[0]}
    assert {target for _, target in many} == set(SHARED_KIB)
    assert [key for key, cell in many.items() if "older" in cell] == []


def specimen(tensor_cores=None, **fields):
    return Specimen("any", None, {}, {}, Config({}, 4, 3), tensor_cores=tensor_cores, **fields)


def test_verdicts():
    fine = (64, 0, 1024, 0)
    assert judge(specimen(), 90, *fine, set()).verdict == "fine"
    assert judge(specimen("int8"), 90, *fine, {"IGMMA"}).verdict == "fine"
    assert judge(specimen("int8"), 90, *fine, {"IMMA"}).verdict == "fine, older tensor-core instruction"
    assert judge(specimen("fp8"), 100, *fine, {"UTCQMMA"}).older is False
    assert "no int8 tensor cores: expected IMMA, found none" in judge(specimen("int8"), 80, *fine, set()).verdict
    assert "spills: 8 bytes" in judge(specimen(), 80, 255, 8, 1024, 0, set()).verdict
    for target, kib in SHARED_KIB.items():
        assert judge(specimen(), target, 64, 0, kib * 1024, 0, set()).problems == ()
        assert "shared memory" in judge(specimen(), target, 64, 0, kib * 1024 + 1, 0, set()).verdict
    assert "tensor memory" in judge(specimen(), 100, 64, 0, 1024, 1024, set()).verdict
    assert set(INSTRUCTIONS["fp8"]) == set(SHARED_KIB) - {80}


def test_a_kernel_that_does_not_compile_is_a_row(tmp_path):
    (tmp_path / "broken.py").write_text(
        textwrap.dedent("""
            import triton, triton.language as tl
            from diffaccel.kernels._launch import Config, Specimen
            from diffaccel.kernels.ahead_of_time import compile_specimen

            @triton.jit
            def kernel(x_ptr, N: tl.constexpr):
                tl.store(x_ptr + tl.arange(0, N), tl.zeros((2 * N,), tl.float32))

            broken = Specimen("broken", kernel, {"x_ptr": "*fp32"}, {"N": 16}, Config({}, 4, 1))
            print(compile_specimen(broken, 90).verdict)
        """)
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "broken.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("does not compile"), done.stderr[-2000:]


def test_the_interpreter_is_refused():
    command = [sys.executable, "-m", "diffaccel.kernels.ahead_of_time"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 2 and "unset TRITON_INTERPRET" in done.stderr


@pytest.fixture
def doctor(monkeypatch, capsys):
    """Runs ``diffaccel doctor --kernels ARGUMENTS`` with two rows in place of the compiler; returns stdout."""
    rows = [Row("gemm", 80, 96, 0, 2048, ("IMMA",)), judge(specimen(), 90, 255, 8, 1024, 0, set())]
    monkeypatch.setattr("diffaccel.kernels.ahead_of_time.report", lambda targets: rows)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["diffaccel", "doctor", "--kernels", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code
        return capsys.readouterr().out

    return run


def test_doctor_shows_kernels_choices_and_failures(doctor, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFACCEL_CACHE", str(tmp_path))
    assert "2 kernels compiled, 1 with a problem" in doctor()
    trial = Trial({"quick": lambda: torch.ones(1)}, lambda y: 0.0, {"quick": 0.0})
    monkeypatch.setattr(_candidates, "seconds_of", lambda run, device: 1.0)
    _candidates.choose("double", (6, 40), torch.device("cpu"), ("quick",), lambda: trial, "quick")
    _disabled.disable("a GPU", True, "double", "fancy", "bfloat16", "wrong")
    text = doctor()
    assert "double 6 40 on" in text and ": quick" in text and "double fancy bfloat16, wrong" in text
    data = json.loads(doctor("--json"))
    assert [row["specimen"] for row in data["compiled"]] == ["gemm", "any"] and data["chosen"][0]["name"] == "quick"
    assert list(data["failed"].values()) == [{"double": {"fancy bfloat16": "wrong"}}]

"""Bad input on the command line: each one clear line, exit code 2, and nothing on the disk has changed."""

import json
import os
import sys

import pytest
import torch

import diffaccel
from diffaccel.cli import main
from diffaccel.denoiser import find_denoisers
from diffaccel.key import plan_key
from diffaccel.pipelines import load

CIRCLE = "a large red circle on the left on a gray background"


def _plan_with_unknown_key(folder):
    plan = diffaccel.Plan(caching=diffaccel.StepCache()).save(folder)
    data = json.loads((plan / "plan.json").read_text())
    data["plan"]["cacheing"] = data["plan"].pop("caching")
    (plan / "plan.json").write_text(json.dumps(data))


def _plan_with_sites_that_match_nothing(folder):
    diffaccel.Plan(quantization=[diffaccel.Quantize(sites="decoder.*")]).save(folder)


def _plan_for_another_model(folder):
    key = plan_key(find_denoisers(load("bundled:video", device="cpu").pipe))
    diffaccel.Plan(caching=diffaccel.StepCache(), key=key).save(folder)


def _plan_with_truncated_artefacts(folder):
    plan = diffaccel.Plan(caching=diffaccel.StepCache(), artefacts={"ratios": torch.ones(100)})
    plan.save(folder)
    file = folder / "artefacts.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def _damaged_plan(folder):
    folder.mkdir()
    (folder / "plan.json").write_text('{"schema": 1, ')


PLANS = {
    "unknown key": (_plan_with_unknown_key, "Plan has no field 'cacheing'; did you mean 'caching'?"),
    "sites that match nothing": (_plan_with_sites_that_match_nothing, "sites='decoder.*' matches none"),
    "another model": (
        _plan_for_another_model,
        "the plan was made for another model: transformer's class was WanTransformer3DModel",
    ),
    "truncated artefacts": (_plan_with_truncated_artefacts, "artefacts.safetensors is damaged"),
    "damaged": (_damaged_plan, "plan.json cannot be read as JSON"),
}


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Runs ``diffaccel ARGUMENTS``, which must be refused without writing; returns its one line."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["diffaccel", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        assert stopped.value.code == 2, err
        assert out == "" and sorted(tmp_path.rglob("*")) == before
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert err.splitlines()[-1] == line, "something follows the error"
        return line

    return run


@pytest.mark.parametrize("case", PLANS)
@pytest.mark.parametrize("command", ["generate", "compare"])
def test_bad_plan(refused, tmp_path, case, command):
    make, says = PLANS[case]
    make(tmp_path / "plan")
    arguments = ("--prompt", CIRCLE) if command == "generate" else ("-n", 1)
    assert says in refused(command, "--plan", "plan", *arguments, "-o", "out")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "no prompt; for example: diffaccel generate -m bundled:image --prompt"),
        (("-p", "x", "--prompts", "p.txt"), "not both"),
        (("--prompts", "none.txt"), "cannot read prompts from 'none.txt': No such file"),
        (("--prompts", "empty.txt"), "holds no prompts"),
        (("--prompts", "wrong.json"), "prompt 1 must be a text, got int 7"),
        (("--prompts", "object.json"), "prompt a must be a text, got int 1"),
        (("-p", CIRCLE, "--plan", "blanced"), "no preset 'blanced'; did you mean 'balanced'?"),
        (("-p", CIRCLE, "--plan", "plans/none"), "no plan at 'plans/none'"),
        (("-p", CIRCLE, "-m", "bundled:imag"), "did you mean 'bundled:image'?"),
        (("-p", CIRCLE, "-m", "./nowhere"), "no folder 'nowhere'"),
        (("-p", CIRCLE, "-m", "."), "holds no model_index.json"),
        (("-p", CIRCLE, "--size", "big"), "--size must be one side or WIDTHxHEIGHT"),
        (("-p", CIRCLE, "--size", "100", "--plan", "none", "--steps", "1"), "divisible by 8"),
        (("-p", CIRCLE, "--image", "none.png"), "no image file 'none.png'"),
        (("-p", CIRCLE, "--image", "empty.txt"), "cannot be read as an image"),
        (("-p", CIRCLE, "--strength", "0.5"), "give one by --image"),
        (("-p", CIRCLE, "--frames", "5"), "bundled:image makes images"),
        (("-p", CIRCLE, "-o", "a.mp4"), "the pipeline makes images"),
        (("-p", CIRCLE, "--format", "bmp"), "got .bmp"),
        (("-p", CIRCLE, "-n", "2", "-o", "a.png"), "is one file, but there are 2 outputs"),
        (("-p", CIRCLE, "-o", "empty.txt/deeper"), "cannot write to 'empty.txt/deeper'"),
        (("-p", CIRCLE, "-o", "mine.png"), "exists and is not from a run of diffaccel"),
        (("-p", CIRCLE, "--dtype", "float8"), "dtype 'float8' is none of float32"),
        (("-p", CIRCLE, "--device", "gpu"), "no device 'gpu'"),
    ],
)
def test_bad_generate(refused, tmp_path, arguments, says):
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    (tmp_path / "wrong.json").write_text('["a red circle", 7]')
    (tmp_path / "object.json").write_text('{"a": 1}')
    (tmp_path / "mine.png").write_text("mine")
    assert says in refused("generate", *arguments)


def test_missing_package(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    line = refused("generate", "-m", "bundled:video", "-p", CIRCLE, "-o", "a.mp4")
    assert "pip install imageio-ffmpeg, or write a .gif" in line


def test_unwritable_folder(refused, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # whoever runs the tests may write everywhere
    assert "is not writable; choose another --out" in refused("generate", "-p", CIRCLE, "-o", "out")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--plan", "none"), "the reference, which every comparison has"),
        (("-m", "./nowhere"), "no prompts for ./nowhere"),
        (("--prompts", "none.txt"), "cannot read prompts"),
        (("-n", "1", "-o", "."), "holds no comparison"),
    ],
)
def test_bad_compare(refused, tmp_path, arguments, says):
    (tmp_path / "something").touch()
    assert says in refused("compare", *arguments)


def test_unknown_option_is_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["diffaccel", "generate", "--promt", "x"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and "--prompt" in capsys.readouterr().err

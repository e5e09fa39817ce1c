"""The command line on the bundled pipelines: what it writes, that it resumes, what it prints for programs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import diffaccel
from diffaccel.cli import app, main
from diffaccel.pipelines.batch import MANIFEST

CIRCLE = "a large red circle on the left on a gray background"
SQUARE = "a small yellow square moving left on a black background"


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """Runs ``diffaccel ARGUMENTS`` in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["diffaccel", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return run


@pytest.mark.parametrize("command", [c.name for c in app.registered_commands])
def test_help_shows_examples(cli, command):
    code, out, _ = cli(command, "--help")
    assert code == 0
    assert "Examples" in out and f"diffaccel {command}" in out and "--json" in out


def test_image_and_resume(cli, tmp_path):
    arguments = ("generate", "--prompt", CIRCLE, "-n", 2, "--steps", 3, "--plan", "none", "-o", "pictures", "--json")
    code, out, err = cli(*arguments)
    assert code == 0, err
    data = json.loads(out)
    files = [Path(o["path"]) for o in data["outputs"]]
    assert [(o["seed"], o["skipped"]) for o in data["outputs"]] == [(0, False), (1, False)] and data["report"] is None
    assert all(Image.open(f).size == (256, 256) for f in files)
    assert {p.name for p in (tmp_path / "pictures").iterdir()} == {MANIFEST, *(f.name for f in files)}
    before = [f.stat().st_mtime_ns for f in files]
    files[1].unlink()
    _, out, _ = cli(*arguments)
    assert [o["skipped"] for o in json.loads(out)["outputs"]] == [True, False]
    assert files[0].stat().st_mtime_ns == before[0] and files[1].exists()


def test_video_with_plan(cli, tmp_path):
    import imageio.v3 as iio

    arguments = ("generate", "-m", "bundled:video", "-p", SQUARE, "--steps", 10, "--frames", 5, "--plan", "fast")
    code, out, err = cli(*arguments, "-o", "square.mp4")
    assert code == 0, err
    assert out.startswith("square.mp4") and "plan fast on transformer (WanTransformer3DModel)" in err
    assert iio.imread(tmp_path / "square.mp4").shape == (5, 96, 96, 3)


def test_plan_by_path_prompts_from_a_file_and_a_start_image(cli, tmp_path):
    diffaccel.Plan(caching=diffaccel.StepCache(threshold=0.3), name="mine").save(tmp_path / "mine")
    Image.new("RGB", (300, 200), "gray").save(tmp_path / "start.png")
    (tmp_path / "prompts.txt").write_text(f"# two\n{CIRCLE}\n\n{CIRCLE.replace('red', 'blue')}\n")
    code, out, err = cli(
        "generate", "--prompts", "prompts.txt", "--plan", "mine", "--image", "start.png", "--strength", 0.8,
        "--steps", 10, "--size", "128x192", "--format", "jpg", "-o", "o", "--json",
    )  # fmt: skip
    assert code == 0, err
    data = json.loads(out)
    assert [o["prompt"] for o in data["outputs"]] == [CIRCLE, CIRCLE.replace("red", "blue")]
    assert [Image.open(o["path"]).size for o in data["outputs"]] == [(128, 192)] * 2
    assert data["report"]["plan"] == "mine" and data["report"]["calls"]["transformer"] == 16


def test_words_that_the_bundled_pipeline_does_not_know(cli):
    code, _, err = cli("generate", "-p", "a red cat", "--steps", 1, "--plan", "none")
    assert code == 0 and "not cat; try: a large red circle" in " ".join(err.split())


def test_compare(cli, tmp_path):
    arguments = ("compare", "-n", 1, "--steps", 10, "--plan", "fast", "-o", "c", "--json")
    code, out, err = cli(*arguments)
    assert code == 0, err
    data = json.loads(out)
    kinds = {row["name"]: row["kind"] for row in data["rows"]}
    assert kinds["reference"] == "reference" and kinds["fast"] == "plan" and data["restored"] is True
    fast = next(row for row in data["rows"] if row["name"] == "fast")
    assert 20 < fast["scores"]["psnr"]["mean"] < 100 and fast["report"]["techniques"]["caching"]["reused"] > 0
    assert (tmp_path / "c" / "report.html").stat().st_size > 10_000
    pictures = {"fast.png", "contact-sheet.png", "speed-against-fidelity.png"}
    assert pictures | {"result.json"} <= {p.name for p in (tmp_path / "c").iterdir()}
    assert all(min(Image.open(tmp_path / "c" / p).size) > 200 for p in pictures)
    assert json.loads((tmp_path / "c" / "result.json").read_text())["rows"] == data["rows"]


def test_eval_with_requirements(cli, tmp_path):
    arguments = ("eval", "-n", 3, "--steps", 3, "--size", 128, "--plan", "saved/", "--measure", "adherence", "-o", "e")
    diffaccel.Plan().save(tmp_path / "saved")
    code, out, err = cli(*arguments, "--require", "psnr>=99 & adherence_drop<=0", "--json")
    assert code == 0, err
    data = json.loads(out)
    assert [r["holds"] for r in data["requirements"]] == [True, True]
    assert set(data["rows"][1]["scores"]) == {"psnr", "ssim", "adherence"}
    code, out, err = cli(*arguments, "--require", "speedup>=50")  # nothing is generated again
    assert code == 1 and "speedup >= 50: NOT met" in out and err.count("comparing") == 0
    code, out, err = cli(*arguments, "--require", "psnr>99")
    assert code == 2 and "requirements look like" in err


def test_inspect(cli, tmp_path):
    code, out, err = cli("inspect", "--picture", "bars.png")
    assert code == 0, err
    assert "transformer: PixArtTransformer2DModel" in out and "attn.q" in out and "256 tokens: 16 x 16" in out
    assert min(Image.open(tmp_path / "bars.png").size) > 200
    code, out, _ = cli("inspect", "-m", "bundled:video", "--no-run", "--json")
    data = json.loads(out)
    assert code == 0 and data["denoisers"][0]["class_name"] == "WanTransformer3DModel"


def test_doctor(cli):
    code, out, _ = cli("doctor", "--json")
    facts = json.loads(out)
    assert code == 0 and {"versions", "processor", "gpu", "compiler", "optional packages", "folders"} == set(facts)
    import torch

    assert (
        facts["versions"]["torch"] == torch.__version__.split("+")[0] or facts["versions"]["torch"] == torch.__version__
    )
    assert facts["processor"]["threads of torch"] == torch.get_num_threads()
    code, out, _ = cli("doctor")
    assert code == 0 and "VNNI" in out and "transformers" in out


def test_interrupt_says_that_work_is_kept(cli, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("diffaccel.cli.doctor.quiet_libraries", interrupt)
    code, _, err = cli("doctor")
    assert code == 130 and "goes on from there" in err


def test_console_script(tmp_path):
    """The installed script, as a user runs it: red line, exit code 2, nothing written."""
    script = Path(sys.executable).with_name("diffaccel")
    done = subprocess.run(
        [script, "generate", "-m", "bundled:vase", "-p", "x"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: no bundled pipeline 'bundled:vase'; did you mean 'bundled:video'?\n"
    assert not list(tmp_path.iterdir())

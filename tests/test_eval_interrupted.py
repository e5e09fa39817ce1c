"""Runs that are killed, a full disk, damaged files: what was finished stays, the rest is made again."""

import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from zoo_pipelines import PIPELINES

from diffaccel import Plan, StepCache
from diffaccel.errors import InputError
from diffaccel.eval.compare import compare
from diffaccel.eval.records import Records
from diffaccel.eval.sample_files import read_sample, suffixes_of, write_sample
from diffaccel.eval.store import Store

PROMPTS = ["a red circle", "blue", "green", "a ring"]
KILLS = Path(__file__).parent.parent / "bench" / "kill_eval.py"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(folder, name="pixart_sigma", **more):
    pipe = PIPELINES[name].build()
    calls = {k: v for k, v in PIPELINES[name].request.items() if k != "output_type"}
    plans = {"cache": Plan(caching=StepCache(threshold=100, min_steps=1))}
    request = {"calls": {"num_inference_steps": 6, **calls}, "controls": (2,), "prompts": PROMPTS, "turn": 2} | more
    return compare(pipe, plans, seeds=(0, 1), folder=folder, progress=False, **request)


def summary(result):
    """What must not depend on interruptions: everything but seconds."""
    items = result.store.records("item")
    return {
        "scores": {row.name: {name: s.to_dict() for name, s in row.scores.items()} for row in result.rows},
        "digests": sorted([r["row"], r["item"], r["digest"], r["files"]] for r in items),
        "kinds": [(row.name, row.kind, row.steps, row.identical) for row in result.rows],
        "reports": {row.name: sorted(row.report) for row in result.rows},
        "restored": result.restored,
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole") / "run")


def _readable(folder):
    """Every file of a finished run opens, and none is left half written."""
    for file in folder.rglob("*"):
        if file.is_file():
            assert "partial" not in file.name
            if file.suffix == ".json":
                json.loads(file.read_text())
            elif file.suffix == ".jsonl":
                assert all(json.loads(line) for line in file.read_text().splitlines())
            else:
                read_sample(file)


def test_killed_at_any_moment_a_run_goes_on_to_the_same_summary(tmp_path):
    """With other moments each time, in a process that has imported everything once."""
    PIPELINES["sd15"].build().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]))
    options = f"-m {tmp_path / 'model'} --prompts {tmp_path / 'prompts.txt'} --plan lossless --steps 2 --size 32"
    command = [sys.executable, KILLS, "--kills", "3", "--options", options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 kills in")


def test_the_comparison_of_the_killed_runs_sees_a_difference(tmp_path, whole):
    spec = importlib.util.spec_from_file_location("kill_eval", KILLS)
    kill_eval = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kill_eval)
    whole.save(whole.folder / "result.json")
    other = shutil.copytree(whole.folder, tmp_path / "other")
    assert kill_eval.differences(whole.folder, other) == ""
    (other / "outputs" / "cache" / "0000.png").write_bytes(b"torn")
    assert kill_eval.differences(whole.folder, other) == "outputs/cache/0000.png differs"
    (other / "outputs" / "cache" / "0000.png").unlink()
    assert "files differ" in kill_eval.differences(whole.folder, other)
    lines = (other / "samples.jsonl").read_text().splitlines(keepends=True)
    (other / "samples.jsonl").write_text("".join(lines[1:]))
    assert kill_eval.differences(whole.folder, other) == "samples.jsonl differs"
    (whole.folder / "result.json").unlink()


def test_killed_before_the_first_record(tmp_path, whole):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "environment.json").write_text("{}")
    (tmp_path / "run" / "partial-0.json").write_text('{"pipe')
    assert summary(run(tmp_path / "run")) == summary(whole)


def test_the_folder_of_a_run(whole):
    folder = whole.folder
    names = {p.name for p in folder.iterdir()}
    assert names == {"run.json", "environment.json", "records.jsonl", "samples.jsonl", "outputs"}
    assert {p.suffix for p in (folder / "outputs" / "reference").iterdir()} == {".npy", ".png"}
    assert {p.suffix for p in (folder / "outputs" / "cache").iterdir()} == {".png"}
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 24 and lines[1]["prompt"] == PROMPTS[0] and lines[1]["seed"] == 1
    assert all((folder / line["file"]).exists() and line["seconds"] > 0 for line in lines)
    assert json.loads((folder / "environment.json").read_text())["packages"]["torch"]


@pytest.mark.parametrize("damage", ["cut", "gone", "other"])
def test_a_damaged_sample_is_made_again(tmp_path, whole, damage):
    folder = tmp_path / "run"
    done = run(folder, prompts=PROMPTS[:2])
    file = folder / "outputs" / "cache" / "0002.png"
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else content[:-1] + b"x")
    again = run(folder, prompts=PROMPTS[:2])
    assert file.read_bytes() == content and summary(again) == summary(done)
    assert "1 samples were missing or damaged and are made again: cache 2" in again.notes


def test_without_its_reference_an_item_is_run_anew_in_every_row(tmp_path):
    folder = tmp_path / "run"
    done = run(folder, prompts=PROMPTS[:2])
    (folder / "outputs" / "reference" / "0001.npy").write_bytes(b"\x93NUMPY")
    with (folder / "records.jsonl").open("ab") as file:
        file.write(b'{"kind": "item", "row": "cach\n{"kind": "item", "ro')  # a damaged line, and one cut off
    again = run(folder, prompts=PROMPTS[:2])
    assert summary(again) == summary(done)
    assert "1 damaged lines of the records were dropped, their items run again" in again.notes
    order = [r["item"] for r in again.store.records("item")]
    assert order[-3:] == [1, 1, 1] and len(order) == 12
    _readable(folder)


class _Full:
    """A disk with room for so many records."""

    def __init__(self, monkeypatch, room):
        self.room, self._fsync = room, os.fsync
        monkeypatch.setattr(os, "fsync", self.fsync)

    def fsync(self, number):
        self.room -= 1
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._fsync(number)


def test_a_full_disk_is_one_clear_error_and_what_was_finished_stays(tmp_path, whole, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        _Full(patch, 5)
        with pytest.raises(InputError, match=r"records\.jsonl': No space left on device\. What was finished is kept"):
            run(folder)
    kept = Records(folder / "records.jsonl").read()
    assert len(kept[0]) == 5 and not kept[1]
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", _no_room)
        with pytest.raises(InputError, match=r"0001\.png': No space left on device"):
            run(folder)
    assert summary(run(folder)) == summary(whole)
    _readable(folder)


def _no_room(image, file, *_, **__):
    Path(file).write_bytes(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_two_runs_in_one_folder_are_refused(tmp_path):
    first = Store(tmp_path / "run", {})
    with pytest.raises(InputError, match="another run is writing to"):
        Store(tmp_path / "run", {})
    first.release()
    Store(tmp_path / "run", {}).release()


# --- files of samples ---


def _sample(frames=4, height=6, width=8, channels=3):
    return np.random.default_rng(0).random((frames, height, width, channels), np.float32)


@pytest.mark.parametrize(
    ("shape", "lossless", "wanted"),
    [
        ((1, 6, 8, 3), True, (".png",)),
        ((4, 6, 8, 3), False, (".mp4",)),
        ((4, 6, 8, 3), True, (".npy", ".mp4")),
        ((4, 5, 8, 3), False, (".npy",)),
        ((4, 6, 8, 4), False, (".npy",)),
        ((1, 6, 8, 4), False, (".npy",)),
        ((1, 6, 8, 1), False, (".png",)),
    ],
)
def test_what_samples_are_written_as(tmp_path, monkeypatch, shape, lossless, wanted):
    monkeypatch.setattr("diffaccel.eval.sample_files.SMALL", 0)
    sample = _sample(*shape)
    assert suffixes_of(sample, exact=False, lossless=lossless) == wanted
    assert suffixes_of(sample, exact=True, lossless=lossless)[0] == ".npy"
    for suffix in wanted:
        write_sample(tmp_path / f"x{suffix}", sample)
        found = read_sample(tmp_path / f"x{suffix}")
        assert found.shape == sample.shape and found.dtype == np.float32
        assert np.abs(found - sample).max() <= (1 if suffix == ".mp4" else 0.5 / 255 + 1e-6)
    write_sample(tmp_path / "exact.npy", sample, exact=True)
    assert np.array_equal(read_sample(tmp_path / "exact.npy"), sample)


def test_small_clips_keep_their_frames():
    assert suffixes_of(_sample(), exact=False, lossless=False) == (".npy", ".mp4")


def test_clips_are_mp4_and_frames_where_wanted(tmp_path, monkeypatch):
    monkeypatch.setattr("diffaccel.eval.sample_files.SMALL", 0)
    calls = {k: v for k, v in PIPELINES["wan"].request.items() if k != "output_type"} | {"num_inference_steps": 1}
    more = {"name": "wan", "prompts": PROMPTS[:1], "controls": (), "calls": calls}
    result = run(tmp_path / "lossy", **more)
    assert {p.suffix for p in (tmp_path / "lossy" / "outputs" / "cache").iterdir()} == {".mp4"}
    assert {p.suffix for p in (tmp_path / "lossy" / "outputs" / "reference").iterdir()} == {".npy", ".mp4"}
    exact = run(tmp_path / "exact", lossless=True, **more)
    assert {p.suffix for p in (tmp_path / "exact" / "outputs" / "cache").iterdir()} == {".npy", ".mp4"}
    for one in (result, exact):
        assert one.row("cache").scores["psnr"].mean == result.row("cache").scores["psnr"].mean  # before any file
    assert np.abs(result.store.load("cache", 0) - exact.store.load("cache", 0)).mean() < 0.2
    shown = result.store.shown("reference", 0)  # as lossy as the others
    assert np.abs(shown - result.store.load("reference", 0)).max() > 0
    assert np.array_equal(exact.store.shown("reference", 0), exact.store.load("reference", 0))
    with pytest.raises(InputError, match="lossless: false there, true here"):
        run(tmp_path / "lossy", lossless=True, **more)

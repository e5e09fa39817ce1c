"""A run shared by two processes: the same samples to the bit, the same numbers, and refusals that do not hang."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from zoo_pipelines import PIPELINES

from diffaccel import Plan, StepCache
from diffaccel.errors import InputError
from diffaccel.eval.compare import compare
from diffaccel.eval.processes import Processes

RUN = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_processes import result
found = result(sys.argv[1])
open(sys.argv[1] + "-result-" + os.environ["RANK"], "w").write(json.dumps(found))
"""


def result(folder):
    """Everything of a run but its seconds."""
    pipe = PIPELINES["pixart_sigma"].build()
    calls = {k: v for k, v in PIPELINES["pixart_sigma"].request.items() if k != "output_type"}
    plans = {"cache": Plan(caching=StepCache(threshold=100, min_steps=1))}
    measures = ("cmmd=python:test_eval_sets:colours",)
    calls = {"num_inference_steps": 6, **calls}
    out = compare(pipe, plans, ["a", "b", "c"], (0,), calls, (), folder=folder, measures=measures)
    items = out.store.records("item")
    return {
        "scores": {row.name: {name: score.to_dict() for name, score in row.scores.items()} for row in out.rows},
        "sets": {row.name: {name: score.to_dict() for name, score in row.sets.items()} for row in out.rows},
        "digests": sorted([r["row"], r["item"], r["digest"]] for r in items),
        "restored": out.restored,
    }


def _two(tmp_path, folder):
    script = tmp_path / "run.py"
    script.write_text(RUN.format(tests=str(Path(__file__).parent)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(script), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    return done, [json.loads(file.read_text()) for file in sorted(tmp_path.glob("*-result-*"))]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_two_processes_give_what_one_gives(tmp_path, one_thread):
    done, shared = _two(tmp_path, tmp_path / "shared")
    assert done.returncode == 0 and len(shared) == 2, done.stderr[-2000:]
    alone = json.loads(json.dumps(result(tmp_path / "alone")))
    assert shared[0] == shared[1] == alone
    assert alone["sets"]["cache"]["cmmd"]["value"] > 0
    assert len(alone["digests"]) == 6 and alone["restored"]
    written = {file.name: len(file.read_text().splitlines()) for file in (tmp_path / "shared").glob("records*")}
    assert set(written) == {"records.jsonl", "records-1.jsonl"} and min(written.values()) >= 3
    # one process goes on with what two have begun
    assert json.loads(json.dumps(result(tmp_path / "shared")))["digests"] == alone["digests"]


def test_two_processes_without_a_common_folder_are_refused():
    with pytest.raises(InputError, match="2 processes share this run: give it a folder"):
        Processes(1, 2).require_folder(None)
    Processes().require_folder(None)


def test_every_item_has_one_process():
    shares = [Processes(rank, 3).share(range(10)) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == list(range(10))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1 and Processes().share(range(10)) == list(range(10))

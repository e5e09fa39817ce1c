"""A saved checkpoint of 4-bit weights loads in the memory of its files and stays packed; sharded and plain."""

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from diffaccel import quantize

BENCH = Path(__file__).resolve().parent.parent / "bench" / "quantize_large.py"

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status"),
    pytest.mark.filterwarnings("ignore:diffaccel"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the bench finds what it would make first, in processes of its own."""
    spec = spec_from_file_location("quantize_large", BENCH)
    bench = module_from_spec(spec)
    spec.loader.exec_module(bench)
    folder = tmp_path_factory.mktemp("checkpoints")
    model = bench.build(1)
    quantize(model, **bench.W4A8, bake=True)
    model.save_pretrained(folder / "1 blocks")
    model.save_pretrained(folder / "1 blocks, sharded", **bench.ROWS["load sharded"][1])
    return folder


CODE = """
import json, sys, warnings
from argparse import Namespace
sys.path.insert(0, {folder!r})
warnings.simplefilter("ignore")
import quantize_large as bench
args = Namespace(blocks=1, threads=1, folder={checkpoints!r})
print("RESULT" + json.dumps([bench.load(args, **bench.ROWS[row][1]) for row in ("load", "load sharded")]))
"""


def test_loading_peaks_at_the_size_of_the_files(folder):
    """Of 75 MB, 11 are packed weights, which dequantized would add 85; a copy of the rest would add 64."""
    code = CODE.format(folder=str(BENCH.parent), checkpoints=str(folder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    plain, sharded = json.loads(done.stdout.partition("RESULT")[2])
    assert (plain["files"], sharded["files"]) == (1, 2)
    for facts in (plain, sharded):
        assert facts["packed layers"] == 10
        assert 0.9 < facts["peak / file"] <= 1.3 and facts["tensors / file"] <= 1.03

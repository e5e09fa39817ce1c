"""``diffaccel bench attention``, and what it measures."""

import json

import pytest
from typer.testing import CliRunner

from diffaccel.cli import app
from diffaccel.errors import InputError
from diffaccel.kernels.attention_bench import Setting, measure

SMALL = ["bench", "attention", "--tokens", "96", "--heads", "2", "--head-size", "16", "--repeats", "1"]


@pytest.mark.parametrize("settings", [{}, {"reorder": False}, {"pattern": "window"}, {"pattern": "video"}])
def test_every_row_is_right_and_has_its_bound(settings):
    rows = list(measure(Setting([160], [0.5], ("blocks", "dense"), heads=2, head_size=16, block_size=16, **settings)))
    assert [row.way.split(" (")[0] for row in rows] == ["gathered blocks", "dense"]
    for row in rows:
        assert row.error < 1e-5
        assert row.bound == pytest.approx(1 / row.density) and row.density == pytest.approx(0.5, abs=0.05)
        assert row.gain == row.dense_ms / row.ms and row.share == row.gain / row.bound


def test_table_and_json():
    done = CliRunner().invoke(app, [*SMALL, "--densities", "0.5,0.25", "--block-size", "16"])
    assert done.exit_code == 0, done.output
    assert sum(line.startswith("| 96 |") for line in done.stdout.splitlines()) == 2
    done = CliRunner().invoke(app, [*SMALL, "--densities", "0.5", "--block-size", "16", "--json"])
    (row,) = json.loads(done.stdout)
    assert row["tokens"] == 96 and row["share_of_bound"] == pytest.approx(row["gain"] * row["density"])


@pytest.mark.parametrize("option", [["--tokens", "many"], ["--densities", "0.5,2"], ["--dtype", "int8"]])
def test_wrong_options_name_the_value(option):
    done = CliRunner().invoke(app, [*SMALL, *option])
    assert isinstance(done.exception, InputError) and option[1] in str(done.exception)

"""README's code runs and prints what README says; its table is what the script makes of the committed measurements."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from diffaccel.cli import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", README, re.MULTILINE | re.DOTALL)
PYTHON = [(code, printed) for language, code, printed in BLOCKS if language == "python"]
COMMANDS = [
    line.split("#")[0].strip()
    for language, code, _ in BLOCKS
    if language == "sh"
    for line in code.splitlines()
    if line.startswith("diffaccel")
]


def _lines(text):
    """Which steps are computed depends on the processor's rounding, and what a preset leaves out on its speed."""
    text = re.sub(r"[#~=]{5,}", "steps", re.sub(r"\[[\d, ]*\]", "[...]", text))
    lines = re.sub(r"\d+", "N", text).splitlines()
    of_speed = ("note:", "quantization:", "N sites; bytes before")
    return {line for line in lines if line.strip() and not line.strip().startswith(of_speed)}


@pytest.mark.parametrize("block", range(len(PYTHON)))
def test_python_blocks(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, printed = PYTHON[block]
    exec(compile(code, "README.md", "exec"), {})
    if printed:
        assert _lines(printed) <= _lines(capsys.readouterr().out)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_exist(line):
    """Every command line of README parses, without running it."""
    _, name, *arguments = shlex.split(line)
    command = get_command(app).commands[name]
    command.make_context(name, list(arguments))


def test_there_is_something_to_test():
    assert len(PYTHON) >= 2 and len(COMMANDS) >= 5 and any(printed for _, printed in PYTHON)


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).is_file(), target


def test_table_is_made_from_the_committed_measurements():
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "scripts" / "readme_table.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    results = script.measurements()
    peers = script.measurements("peers-")
    assert script.filled(README, results, peers) == README
    assert all(result["restored"] for result in peers.values())
    assert all(result["restored"] for result in results.values())
    for kind, result in results.items():
        plans = [row["name"] for row in result["rows"] if row["kind"] == "plan"]
        assert all(f"bundled:{kind} | **{plan}**" in README for plan in plans)
        assert {plan for row in result["rows"] for plan in row["control_of"]} == set(plans), (
            "a plan without its control"
        )

"""Fills README's tables and picture from measurements; ``--measure`` measures first, ``--peers`` those of others too.

The measurements lie in ``assets/readme/{image,video,peers-image,peers-video}.json``. The parts of README between marker
comments are replaced, and what the first block of Python prints; none of it is written by hand.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README, MEASURED = ROOT / "README.md", ROOT / "assets" / "readme"
BEGIN, END = "<!-- table: scripts/readme_table.py -->", "<!-- end of table -->"
PEERS_BEGIN, PEERS_END = "<!-- peers: scripts/readme_table.py -->", "<!-- end of peers -->"
PEER_PROMPTS = 8
PLANS = ("balanced", "fast")
SHOWN = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="measure again (minutes), then fill")
    parser.add_argument("--prompts", type=int, default=16, help="prompts of each pipeline (default: 16)")
    parser.add_argument("--peers", action="store_true", help="measure other people's accelerations (5 minutes), fill")
    arguments = parser.parse_args()
    for kind in ("image", "video"):
        if arguments.measure:
            measure(kind, arguments.prompts)
        if arguments.peers:
            measure_peers(kind)
    readme = filled(README.read_text(), measurements(), measurements("peers-"))
    README.write_text(with_output(readme) if arguments.measure else readme)


def measurements(prefix: str = "") -> dict[str, dict[str, Any]]:
    """The committed results by pipeline; empty where nothing was measured."""
    files = {kind: MEASURED / f"{prefix}{kind}.json" for kind in ("image", "video")}
    return {kind: json.loads(file.read_text()) for kind, file in files.items() if file.exists()}


def measure(kind: str, count: int) -> None:
    """Compare the presets on a bundled pipeline; write the result and, for images, the picture.

    Rows change with every prompt, so that what is compared was timed within seconds. Even so use a machine that does
    nothing else: under the load of others a ratio comes out anywhere.
    """
    from diffaccel.cli.console import out, quiet_libraries

    quiet_libraries()
    from diffaccel.cli.machine import describe_machine
    from diffaccel.eval.compare import compare
    from diffaccel.pipelines import BUNDLED, load

    name = f"bundled:{kind}"
    prompts = BUNDLED[name].prompts()[:count]
    result = compare(load(name), PLANS, prompts, turn=1, folder=ROOT / "out" / "readme" / kind)
    out.print(result)
    MEASURED.mkdir(parents=True, exist_ok=True)
    data = {**result.to_dict(), "processor": describe_machine()["processor"]["name"]}
    (MEASURED / f"{kind}.json").write_text(json.dumps(data, indent=1) + "\n")
    if kind == "image":
        _draw_pair(result)


def measure_peers(kind: str) -> None:
    """What ``diffaccel compare -m bundled:KIND --plan balanced --plan fast --peer all -n 8`` measures."""
    from diffaccel.cli.console import out, quiet_libraries

    quiet_libraries()
    from diffaccel.eval.compare import compare
    from diffaccel.pipelines import BUNDLED, load

    name = f"bundled:{kind}"
    folder = ROOT / "out" / f"peers-{kind}"
    result = compare(load(name), PLANS, BUNDLED[name].prompts()[:PEER_PROMPTS], peers=("all",), folder=folder)
    out.print(result)
    keep_peers(kind, result.to_dict())


def keep_peers(kind: str, result: dict[str, Any]) -> None:
    """Write down the result of `measure_peers`, or of that command."""
    from diffaccel.cli.machine import describe_machine

    data = {**result, "processor": describe_machine()["processor"]["name"], "date": f"{date.today():%Y-%m-%d}"}
    (MEASURED / f"peers-{kind}.json").write_text(json.dumps(data, indent=1) + "\n")


def _draw_pair(result: Any) -> None:
    """The first prompts: originals above, accelerated with the same seeds below."""
    import numpy as np
    from PIL import Image

    rows = [[result.store.load(row, i)[0] for i in range(SHOWN)] for row in ("reference", PLANS[0])]
    gap = 8
    height, width, _ = rows[0][0].shape
    sheet = np.ones((2 * height + gap, SHOWN * width + (SHOWN - 1) * gap, 3))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet[y * (height + gap) :, x * (width + gap) :][:height, :width] = picture
    Image.fromarray((sheet.clip(0, 1) * 255).round().astype(np.uint8)).save(MEASURED / "pair.png", optimize=True)


def filled(readme: str, results: dict[str, dict[str, Any]], peers: dict[str, dict[str, Any]]) -> str:
    """``readme`` with the parts between the markers made from ``results`` and ``peers``."""
    body = _table(results) if results else "*Not measured yet: `make readme` fills this table.*"
    readme = _between(readme, BEGIN, body, END)
    return _between(readme, PEERS_BEGIN, _peers_table(peers), PEERS_END)


def _between(readme: str, begin: str, body: str, end: str) -> str:
    before, rest = readme.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{body}\n{end}{after}"


def _peers_table(results: dict[str, dict[str, Any]]) -> str:
    """All rows from slow to fast, with what could not run; a control stands where its speed puts it."""
    lines: list[str] = []
    for kind, result in results.items():
        lines += [f"| bundled:{kind} | speed-up [95 %] | PSNR, mean | worst decile |", "|---|--:|--:|--:|"]
        for row in sorted(result["rows"][1:], key=lambda r: r["speedup"]["value"]):
            name, _, _, *cells = _cells(row)
            lines.append(f"| {name} | {' | '.join(cells)} |")
        cannot = [note for note in result["notes"] if "cannot run here" in note]
        lines += ["", *[f"Could not run: {'; '.join(_first_sentences(cannot))}." for _ in cannot[:1]], ""]
    first = next(iter(results.values()), None)
    if first is not None:
        c = first["conditions"]
        lines.append(
            f"`diffaccel compare -m bundled:... --plan balanced --plan fast --peer all -n {len(first['prompts'])}`, "
            f"{first['date']}, {first['processor']}, {c['threads']} threads. The number behind a name is its setting."
        )
    return "\n".join(lines)


def _first_sentences(notes: list[str]) -> list[str]:
    """One short reason for each peer, whatever its settings."""
    reasons: dict[str, str] = {}
    for note in notes:
        name, _, why = note.partition(" cannot run here: ")
        reasons.setdefault(name.split(" ")[0], why.partition(": ")[2].partition(":")[0].strip())
    return [f"{name} ({why})" for name, why in reasons.items()]


def with_output(readme: str) -> str:
    """``readme`` with what its first block of Python really prints below that block."""
    match = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", readme, re.DOTALL)
    assert match is not None, "README has no Python block with its output below"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(match.group(1), str(README), "exec"), {})
    return readme[: match.start(2)] + printed.getvalue() + readme[match.end(2) :]


def _table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| pipeline | | steps | denoising loop | speed-up [95 %] | PSNR, mean | worst decile |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for kind, result in results.items():
        for row in _in_order(result["rows"]):
            lines.append(f"| bundled:{kind} | {' | '.join(_cells(row))} |")
    return "\n".join([*lines, "", *_conditions(results)])


def _in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each plan followed by its controls."""
    ordered: list[dict[str, Any]] = []
    for row in rows:
        if row["kind"] != "control":
            ordered += [row, *(c for c in rows if row["name"] in c["control_of"] and c not in ordered)]
    return ordered


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    s, psnr = row["speedup"], row["scores"].get("psnr")
    names = {"reference": "original", "control": f"*control: {row['name']}*", "peer": row["name"]}
    name = names.get(row["kind"], f"**{row['name']}**")
    if psnr is None:
        return (name, str(row["steps"]), f"{row['loop_seconds']:.2f} s", "1", "", "")
    speed = f"{s['value']:.2f}x [{s['low']:.2f}, {s['high']:.2f}]"
    fidelity = (f"{psnr['mean']:.1f} dB", f"{psnr['worst_decile']:.1f} dB")
    return (name, str(row["steps"]), f"{row['loop_seconds']:.2f} s", speed, *fidelity)


def _conditions(results: dict[str, dict[str, Any]]) -> list[str]:
    counts = " and ".join(f"{len(r['prompts'])} {kind} prompts" for kind, r in results.items())
    first = next(iter(results.values()))
    c = first["conditions"]
    versions = ", ".join(f"{name} {v}" for name, v in c["versions"].items())
    where = first["processor"] if c["device"] == "cpu" else c["device"]
    threads = f"{c['threads']} thread{'s' if c['threads'] > 1 else ''}"
    return [
        f"{counts} on which nothing was chosen, seed {', '.join(map(str, first['seeds']))}, batch 1, {c['dtype']}, "
        f"{where}, {threads}; {versions}. "
        "Rows took turns; the speed-up is the median over the prompts. PSNR is against the original output of the same "
        "seed. The control runs the original pipeline with as many steps as cost the same time: a plan is worth its "
        "name where it is above its control."
    ]


if __name__ == "__main__":
    main()

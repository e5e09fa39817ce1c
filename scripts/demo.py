"""``make demo``: the bundled pipelines with and without acceleration: a table, pictures and a video in out/.

Needs neither a GPU nor a network. Takes about a minute on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from diffaccel.cli.console import quiet_libraries

PLAN = "balanced"
SCALE = 4  # the bundled video is 64 pixels wide
console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder to write to (default: out)")
    parser.add_argument("--images", type=int, default=4, help="image prompts (default: 4)")
    parser.add_argument("--videos", type=int, default=2, help="video prompts (default: 2)")
    arguments = parser.parse_args()
    started = time.perf_counter()
    console.print("Loading torch and diffusers ...", style="dim")
    quiet_libraries()
    _say_what_is_missing()
    results = {kind: _compare(kind, getattr(arguments, f"{kind}s"), arguments.out) for kind in ("image", "video")}
    (arguments.out / "demo.json").write_text(json.dumps(results, indent=1))
    console.print(f"Done in {time.perf_counter() - started:.0f} s. In {arguments.out}/:")
    for file in sorted(p for p in arguments.out.iterdir() if p.stem.startswith(("image", "video", "demo"))):
        console.print(f"  {file.name}")
    console.print("Next: [bold]diffaccel generate --help[/], [bold]diffaccel compare --help[/]")


def _say_what_is_missing() -> None:
    from diffaccel.cli.machine import describe_machine

    compiler = describe_machine()["compiler"]["C++"]
    if compiler.startswith("none"):
        console.print(f"C++ compiler: {compiler}", style="yellow")


def _compare(kind: str, count: int, out: Path) -> dict[str, object]:
    """Run one bundled pipeline with and without the plan, print the table and write the pictures."""
    from diffaccel.eval.compare import compare
    from diffaccel.eval.figures import contact_sheet, side_by_side
    from diffaccel.pipelines import BUNDLED, load

    name = f"bundled:{kind}"
    wrapped = load(name)
    prompts = BUNDLED[name].prompts()[:count]
    console.print(
        f"\n[bold]{name}[/]: {len(prompts)} prompts, original, plan {PLAN!r} and fewer steps at the same cost"
    )
    result = compare(wrapped, [PLAN], prompts, turn=1, progress=console.is_terminal)
    console.print(result)
    out.mkdir(parents=True, exist_ok=True)
    side_by_side(result, PLAN, out / f"{kind}-side-by-side.png", items=range(min(2, count)))
    contact_sheet(result, out / f"{kind}-contact-sheet.png")
    assert result.store is not None
    original, fast = ([result.store.load(row, i) for i in range(count)] for row in ("reference", PLAN))
    if kind == "image":
        for row, pictures in (("original", original), ("accelerated", fast)):
            _picture(pictures[0][0]).save(out / f"image-{row}.png")
    else:
        _save_videos(original, fast, out)
    return result.to_dict()


def _save_videos(original: list[np.ndarray], fast: list[np.ndarray], out: Path) -> None:
    """The first accelerated video, and all of them below their originals. Arrays are ``[F, H, W, C]`` in [0, 1]."""
    from diffaccel.pipelines.media import save_video

    save_video([_picture(frame, SCALE) for frame in fast[0]], out / "video-accelerated.mp4")
    columns = [np.concatenate(pair, axis=1) for pair in zip(original, fast, strict=True)]
    save_video([_picture(frame, SCALE) for frame in np.concatenate(columns, axis=2)], out / "video-both.mp4")


def _picture(array: np.ndarray, scale: int = 1) -> Image.Image:
    image = Image.fromarray((array.clip(0, 1) * 255).round().astype(np.uint8))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


if __name__ == "__main__":
    main()

"""Build a throw-away link tree in which diffaccel looks like one plain package (for mypy, pyright, editors)."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / ".typecheck" / "diffaccel"
MAPPED = ("assets", "eval", "kernels", "pipelines")


def main() -> None:
    TREE.mkdir(parents=True, exist_ok=True)
    links = {p.name: p for p in (ROOT / "diffaccel").iterdir() if p.name != "__pycache__"}
    links |= {name: ROOT / name for name in MAPPED}
    for stale in [p for p in TREE.iterdir() if p.name not in links]:
        stale.unlink()  # the source was renamed or removed
    for name, target in links.items():
        if not (TREE / name).is_symlink():
            (TREE / name).symlink_to(target)


if __name__ == "__main__":
    main()

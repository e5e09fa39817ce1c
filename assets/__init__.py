"""Files that ship with diffaccel: bundled pipelines and prompt sets."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def path(name: str) -> Path:
    """The absolute path of the shipped file or folder ``name``, such as ``"shapes-image"``.

    Raises:
        FileNotFoundError: no such asset; the message lists those that exist.
    """
    found = _HERE / name
    if not found.exists():
        known = sorted(p.name for p in _HERE.iterdir() if not p.name.startswith(("_", ".")))
        raise FileNotFoundError(f"no asset {name!r}; shipped are: {', '.join(known)}")
    return found

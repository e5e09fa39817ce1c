"""What the wheel holds, and that the folders at the checkout's root hide nothing of other packages."""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]


def test_every_code_folder_is_shipped():
    """An editable install finds a forgotten folder; the wheel does not."""
    on_disk = {"diffaccel", "diffaccel.assets"}
    for base, prefix in (
        ("diffaccel", ""),
        ("kernels", "diffaccel."),
        ("pipelines", "diffaccel."),
        ("eval", "diffaccel."),
    ):
        for file in (ROOT / base).rglob("*.py"):
            on_disk.add(prefix + ".".join(file.parent.relative_to(ROOT).parts))
    assert on_disk == set(SETUPTOOLS["packages"])
    for package in on_disk:
        folder = SETUPTOOLS["package-dir"].get(package, package.replace(".", "/"))
        folder = folder if (ROOT / folder).is_dir() else package.removeprefix("diffaccel.").replace(".", "/")
        assert (ROOT / folder / "__init__.py").is_file(), f"{package} has no __init__.py"


def test_every_asset_that_code_reads_is_shipped():
    assets = ROOT / "assets"
    patterns = SETUPTOOLS["package-data"]["diffaccel.assets"]
    shipped = {file for pattern in patterns for file in assets.glob(pattern) if file.is_file()}
    read_by_code = {
        f for name in ("prompts", "shapes-image", "shapes-video") for f in (assets / name).rglob("*") if f.is_file()
    }
    assert read_by_code <= shipped
    assert not any("make" in file.relative_to(assets).parts for file in shipped)


def test_every_file_beside_the_code_that_code_reads_is_shipped():
    """Templates and kernels' sources: an editable install finds them anyhow."""
    for base in ("diffaccel", "kernels", "pipelines", "eval"):
        for file in (ROOT / base).rglob("*"):
            if file.is_dir() or file.suffix in (".py", ".pyc"):
                continue
            parts = file.parent.relative_to(ROOT).parts
            package = ".".join(parts if base == "diffaccel" else ("diffaccel", *parts))
            patterns = SETUPTOOLS["package-data"].get(package, [])
            assert any(file.match(pattern) for pattern in patterns), f"{file.relative_to(ROOT)} is in no wheel"


def test_the_wheel_stays_small():
    sizes = [f.stat().st_size for f in (ROOT / "assets").glob("shapes-*/**/*") if f.is_file()]
    assert sum(sizes) < 80e6


def test_optional_packages_are_in_no_required_list():
    required = {line.split(">")[0].split("=")[0].strip() for line in PYPROJECT["project"]["dependencies"]}
    assert not required & {"triton", "torchao", "peft", "lpips", "open_clip_torch"}


def test_console_script():
    assert [e.value for e in entry_points(group="console_scripts", name="diffaccel")] == ["diffaccel.cli:main"]


def test_root_kernels_folder_hands_over_to_the_package_it_hides(tmp_path):
    """transformers and diffusers import Hugging Face's ``kernels``; with the checkout root first on the path they find
    our folder of that name, which must give them the real one."""
    fake = tmp_path / "kernels"
    fake.mkdir()
    (fake / "__init__.py").write_text("WHO = 'the real one'\ndef get_kernel(): return WHO\n")
    code = "import sys, kernels; assert 'diffaccel' not in sys.modules; print(kernels.get_kernel())"
    assert _python(code, cwd=ROOT, path=tmp_path) == "the real one"


def test_root_kernels_folder_is_empty_without_that_package():
    """Then both libraries must read it as "not installed": no version, nothing of theirs, nothing of ours loaded."""
    code = (
        "import sys, kernels\n"
        "print([hasattr(kernels, n) for n in ('__version__', 'get_kernel')], 'diffaccel' in sys.modules)"
    )
    assert _python(code, cwd=ROOT, path=None) == "[False, False] False"


def test_checkout_that_is_not_installed_says_what_to_do(tmp_path):
    """From a bare checkout ``import diffaccel`` finds the folder but not what the install maps into it."""
    (tmp_path / "diffaccel").symlink_to(ROOT / "diffaccel")
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in repr(f)]\n"
        "sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
        "try:\n    import diffaccel\nexcept ImportError as error:\n    print(error)"
    )
    assert "pip install -e ." in _python(code, cwd=tmp_path, path=None)


def _python(code: str, *, cwd: Path, path: Path | None) -> str:
    """What a fresh interpreter in ``cwd`` prints; ``-c`` puts ``cwd`` on its path."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()

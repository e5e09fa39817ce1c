"""Arrows go down only, and importing is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TECHNIQUES = ("attention", "caching", "distillation", "exact", "guidance", "pruning", "quantization", "tokens")
TOP = ("attach", "calibration", "quantizing", "presets")
FLOORS = {
    "kernels": 1,
    "eval.metrics": 1,
    "assets": 1,
    "eval": 5,
    "inspection": 5,
    "pipelines": 5,
    "tuning": 5,
    "cli": 6,
}


def _modules() -> dict[str, Path]:
    """Dotted name below ``diffaccel`` -> file, of every module that ships."""
    found = {}
    for base in ("diffaccel", "kernels", "eval", "pipelines", "assets"):
        for file in (ROOT / base).rglob("*.py"):
            parts = file.relative_to(ROOT / base if base == "diffaccel" else ROOT).with_suffix("").parts
            if parts[:2] != ("assets", "make"):
                found[".".join(p for p in parts if p != "__init__")] = file
    return found


MODULES = _modules()


def _floor(module: str) -> int:
    """1 pure functions, 2 core, 3 techniques, 4 attachment, 5 eval, inspection and pipelines, 6 the command line."""
    for name, floor in FLOORS.items():
        if module == name or module.startswith(name + "."):
            return floor
    if module.split(".")[0] in TECHNIQUES:
        return 3
    return 4 if module in TOP else 2


def _imports(file: Path) -> set[str]:
    """Modules of ours that a file imports anywhere but for types, as dotted names below ``diffaccel``."""
    tree = ast.parse(file.read_text())
    for_types = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports between files are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    ours = (n.removeprefix("diffaccel.") for n in names if n.startswith("diffaccel."))
    return {n if n in MODULES else n.rpartition(".")[0] for n in ours}


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m))
def test_arrows_go_down(module):
    floor = _floor(module)
    for imported in _imports(MODULES[module]):
        if imported == "":  # the package's own surface: for those who use it
            assert floor >= 5, f"{module} imports from diffaccel itself"
            continue
        assert _floor(imported) <= floor, f"{module} (floor {floor}) imports {imported} (floor {_floor(imported)})"
        if floor == 3 and _floor(imported) == 3:
            assert imported.split(".")[0] == module.split(".")[0], f"{module} imports another technique, {imported}"


def test_plan_settings_and_errors_need_no_torch():
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "numpy", "diffusers", "transformers"):
            raise ModuleNotFoundError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
import diffaccel, tempfile
plan = diffaccel.Plan(
    quantization=[diffaccel.Quantize()], attention=[diffaccel.BlockSparse(density=0.3)], caching=diffaccel.StepCache()
)
with tempfile.TemporaryDirectory() as folder:
    plan.save(folder)
    assert diffaccel.Plan.load(folder) == plan
import diffaccel.pipelines, diffaccel.cli
assert diffaccel.pipelines.BUNDLED["bundled:image"].unknown_words("a red cat") == ["cat"]
print("fine")
"""
    assert _run(code) == "fine"


def test_import_is_light():
    heavy = ("triton", "torchao", "matplotlib", "torchmetrics", "imageio")
    code = f"""
import sys, diffaccel
assert "torch" not in sys.modules
import diffaccel.plan, diffaccel.errors, diffaccel.cli, diffaccel.pipelines
assert "torch" not in sys.modules, "the command line would start slowly"
print(sorted(m for m in {heavy!r} if m in sys.modules))
"""
    assert _run(code) == "[]"


def test_accelerate_needs_no_optional_package():
    """They are hidden, since torch and diffusers import some of them by themselves where they are installed."""
    code = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        hidden = ("triton", "torchao", "matplotlib", "peft", "torchmetrics", "imageio", "torchvision", "sentencepiece")
        return None if name.split(".")[0] in hidden else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import diffaccel, torch
wrapped = diffaccel.pipelines.load("bundled:image", plan="balanced", device="cpu")
wrapped.remove()
assert not torch.cuda.is_initialized()
print("fine")
"""
    assert _run(code) == "fine"


def test_public_names():
    import diffaccel

    assert "eval" not in diffaccel.__all__  # `from diffaccel import *` must not overwrite the builtin
    assert all(getattr(diffaccel, name) is not None for name in diffaccel.__all__)


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]

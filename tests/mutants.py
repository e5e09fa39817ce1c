"""Kernels with a planted fault, to see that their tests would notice."""

from __future__ import annotations

import importlib.util
import linecache
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


@contextmanager
def mutant(module: ModuleType, right: str, wrong: str):
    """A copy of ``module`` in which the only occurrence of ``right`` in its source reads ``wrong``.

    The copy registers its custom operators under another namespace, so that the real ones stay as they are.
    """
    source = Path(module.__file__).read_text()
    assert source.count(right) == 1, f"{right!r} stands {source.count(right)} times in {module.__name__}"
    name = f"mutant_of_{module.__name__.rpartition('.')[2]}_{abs(hash((right, wrong)))}"
    source = source.replace(right, wrong).replace('"diffaccel::', f'"{name}::')
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.py"  # Triton reads a kernel's source from its file
        file.write_text(source)
        spec = importlib.util.spec_from_file_location(name, file)
        copy = importlib.util.module_from_spec(spec)
        sys.modules[name] = copy
        try:
            spec.loader.exec_module(copy)
            yield copy
        finally:
            del sys.modules[name]
            linecache.clearcache()

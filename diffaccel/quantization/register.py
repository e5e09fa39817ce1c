"""Makes diffusers know the quantizer ``diffaccel``.

diffusers has no function for that, only two tables in `diffusers.quantizers.auto`. Importing that module costs seconds
(it imports torch, and torchao where it is installed), so the tables are filled when something else imports it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_TABLES = "diffusers.quantizers.auto"
_CLASSES = ("DiffAccelConfig", "DiffAccelQuantizer")


def register() -> None:
    """Fill diffusers' tables now if they exist, else as soon as they do. A second call does nothing more."""
    module = sys.modules.get(_TABLES)
    if module is not None and hasattr(module, "AUTO_QUANTIZATION_CONFIG_MAPPING"):
        _fill(module)
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def _fill(module: ModuleType) -> None:
    ours = [sys.modules.get(f"diffaccel.quantization.{name}") for name in ("config", "quantizer")]
    if any(m is not None and not hasattr(m, cls) for m, cls in zip(ours, _CLASSES, strict=True)):
        return  # it is ours that imports diffusers just now, and registers when it is done
    from diffaccel.quantization.config import DiffAccelConfig
    from diffaccel.quantization.quantizer import DiffAccelQuantizer

    module.AUTO_QUANTIZER_MAPPING["diffaccel"] = DiffAccelQuantizer
    module.AUTO_QUANTIZATION_CONFIG_MAPPING["diffaccel"] = DiffAccelConfig


class _WhenImported(MetaPathFinder):
    """Waits for one import, then steps aside."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _TABLES:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenFill(spec.loader)
        return spec


class _ThenFill(Loader):
    """Loads a module as ``loader`` does, then fills its tables."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _fill(module)

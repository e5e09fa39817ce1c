"""Makes diffusers and transformers know the quantizer ``diffaccel``.

diffusers has no function for that, only two tables in `diffusers.quantizers.auto`; transformers, whose text encoders
are parts of pipelines, has two alike. Importing those modules costs seconds (they import torch, and torchao where it is
installed), so the tables are filled when something else imports them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_CONFIG = "diffaccel.quantization.config"
_QUANTIZER = "diffaccel.quantization.quantizer"


def register() -> None:
    """Fill the tables now where they exist, else as soon as they do. A second call does nothing more."""
    for name in _FILL:
        module = sys.modules.get(name)
        if module is not None and hasattr(module, "AUTO_QUANTIZATION_CONFIG_MAPPING"):
            _FILL[name](module)
        elif not any(isinstance(finder, _WhenImported) and finder.awaited == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _WhenImported(name))


def _fill_diffusers(module: ModuleType) -> None:
    ours = ((_CONFIG, "DiffAccelConfig"), (_QUANTIZER, "DiffAccelQuantizer"))
    if any(name in sys.modules and not hasattr(sys.modules[name], cls) for name, cls in ours):
        return  # it is ours that imports the tables just now, and registers when it is done
    config, quantizer = (getattr(import_module(name), cls) for name, cls in ours)
    module.AUTO_QUANTIZER_MAPPING["diffaccel"] = quantizer
    module.AUTO_QUANTIZATION_CONFIG_MAPPING["diffaccel"] = config


def _fill_transformers(module: ModuleType) -> None:
    """With stand-ins: transformers imports its tables before it can be used, and ours need both it and diffusers."""
    config = getattr(sys.modules.get(_CONFIG), "DiffAccelConfig", _ConfigLater)
    module.AUTO_QUANTIZATION_CONFIG_MAPPING["diffaccel"] = config
    module.AUTO_QUANTIZER_MAPPING["diffaccel"] = _encoder_quantizer


_FILL: dict[str, Callable[[ModuleType], None]] = {
    "diffusers.quantizers.auto": _fill_diffusers,
    "transformers.quantizers.auto": _fill_transformers,
}
"""By where the tables are."""


def _encoder_quantizer(config: Any, **kwargs: Any) -> Any:
    return import_module("diffaccel.quantization.encoder_quantizer").EncoderQuantizer(config, **kwargs)


class _Later(type):
    def __instancecheck__(cls, instance: object) -> bool:
        config = getattr(sys.modules.get(_CONFIG), "DiffAccelConfig", None)
        return config is not None and isinstance(instance, config)


class _ConfigLater(metaclass=_Later):
    """Stands for `DiffAccelConfig` until something imports that; what transformers needs of it."""

    @staticmethod
    def from_dict(body: dict[str, Any], **kwargs: Any) -> Any:
        return import_module(_CONFIG).DiffAccelConfig.from_dict(body, **kwargs)


class _WhenImported(MetaPathFinder):
    """Waits for one import, then steps aside."""

    def __init__(self, awaited: str) -> None:
        self.awaited = awaited

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.awaited:
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
        _FILL[module.__name__](module)

"""A baked model's state dict answers for the weights that are in it only in quantized form.

diffusers' LoRA loaders (of Flux and its relatives) look the shape of a layer up as ``model.state_dict()["x.weight"]``.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from diffaccel.quantization.layer import QuantizedLayer


class _StateDict(OrderedDict[str, Any]):
    """Has the keys that it has; asked for ``x.weight`` of a quantized layer x, it gives what ``x.weight`` gives."""

    def __init__(self, entries: OrderedDict[str, Any], model: nn.Module) -> None:
        super().__init__(entries)
        self._metadata = getattr(entries, "_metadata", None)  # torch's, read when a state dict is loaded
        self._model = model

    def __missing__(self, key: str) -> Tensor:
        layer = self._layer(key)
        if layer is None:
            raise KeyError(key)
        return layer.weight

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or self._layer(key) is not None

    def __reduce__(self) -> Any:
        return OrderedDict, (list(self.items()),)

    def _layer(self, key: object) -> QuantizedLayer | None:
        owner, _, own = str(key).rpartition(".")
        try:
            layer = self._model.get_submodule(owner) if own == "weight" else None
        except AttributeError:
            return None
        return layer if isinstance(layer, QuantizedLayer) else None


def answer_for_weights(model: nn.Module) -> None:
    """Make ``model.state_dict()`` such a one from now on."""
    if _replace not in model._state_dict_hooks.values():
        model._register_state_dict_hook(_replace)


def _replace(model: nn.Module, entries: OrderedDict[str, Any], prefix: str, metadata: Any) -> OrderedDict[str, Any]:
    return entries if prefix else _StateDict(entries, model)

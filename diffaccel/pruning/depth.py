"""Depth cuts that a config can say: the same class with fewer blocks, which loads without diffaccel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from torch import nn

from diffaccel.denoiser import Denoiser
from diffaccel.latents import output_tensors
from diffaccel.pruning.verify import relative
from diffaccel.reshape import Pass

_TOLERANCE = 1e-4


def plain_config(denoiser: Denoiser, call: Callable[[], Any]) -> dict[str, int]:
    """What the config would have to say for a model whose blocks were replaced by `Pass`; empty if it cannot.

    A candidate must build a model of the same weights, and the model without the stand-ins must give in a ``call`` what
    it gives with them: where forwards count blocks (control branches, skip connections), it does not.
    """
    model = denoiser.module
    lists = {name: m for name, m in model.named_modules() if _shortened(m)}
    if not isinstance(model, ConfigMixin) or not lists:
        return {}
    with torch.no_grad():
        wanted = output_tensors(call())
    with without_stand_ins(model):
        shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        for config in _candidates(model, lists):
            if _shapes_under(model, config) == shapes:
                try:
                    with torch.no_grad():
                        found = output_tensors(call())
                except Exception:  # whatever a forward makes of fewer blocks
                    return {}
                return config if relative(found, wanted) < _TOLERANCE else {}
    return {}


def drop_stand_ins(model: nn.Module, config: Mapping[str, int]) -> None:
    """Take the stand-ins out for good, and say so in the config."""
    for module in list(model.modules()):
        if _shortened(module):
            _keep(module, list(module._modules.values()))
    assert isinstance(model, ConfigMixin)
    model.register_to_config(**config)


@contextmanager
def without_stand_ins(model: nn.Module) -> Iterator[None]:
    """The model as `drop_stand_ins` leaves it, for a while."""
    before = [(m, list(m._modules.values())) for m in model.modules() if _shortened(m)]
    for module, elements in before:
        _keep(module, elements)
    try:
        yield
    finally:
        for module, elements in before:
            module._modules.clear()
            module._modules.update({str(i): element for i, element in enumerate(elements)})


def _shortened(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and any(isinstance(m, Pass) for m in module)


def _keep(module: nn.Module, elements: Sequence[nn.Module | None]) -> None:
    """All of a list's ``elements`` that are no stand-ins."""
    left = [m for m in elements if not isinstance(m, Pass)]
    module._modules.clear()
    module._modules.update({str(i): element for i, element in enumerate(left)})


def _candidates(model: Any, lists: Mapping[str, Any]) -> Iterator[dict[str, int]]:
    """Configs in which, for every list, a number that was its length is its new length."""
    numbers = {k: v for k, v in model.config.items() if type(v) is int}
    # Inside `without_stand_ins` the lists are short already, so their old lengths are told by what is missing.
    old = {name: length for name, length in _old_lengths(model).items() if name in lists}
    choices = [[(key, len(lists[name])) for key, v in numbers.items() if v == old[name]] for name in lists]
    for chosen in product(*choices):
        if len({key for key, _ in chosen}) == len(chosen):
            yield dict(chosen)


def _old_lengths(model: Any) -> dict[str, int]:
    fresh = _on_meta(model, {})
    return {n: len(m) for n, m in fresh.named_modules() if isinstance(m, nn.ModuleList)}


def _shapes_under(model: Any, config: Mapping[str, int]) -> dict[str, tuple[int, ...]] | None:
    try:
        return {name: tuple(t.shape) for name, t in _on_meta(model, config).state_dict().items()}
    except Exception:  # a class may refuse a number of blocks
        return None


def _on_meta(model: Any, changed: Mapping[str, int]) -> nn.Module:
    config = {k: v for k, v in dict(model.config).items() if k != "quantization_config"}
    with torch.device("meta"):
        return type(model).from_config({**config, **changed})

"""A model on its way from a checkpoint: which layers become quantized, as their tensors arrive one by one.

diffusers and transformers call it through a quantizer of their own kind (`quantizer`, `encoder_quantizer`). The model
is on the meta device at first, so only compressed weights ever take memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.denoiser import find_denoisers, select
from diffaccel.errors import ModelError
from diffaccel.quantization.config import DiffAccelConfig
from diffaccel.quantization.eligible import form_at, parameter_users, why_not
from diffaccel.quantization.layer import SAVED, QuantizedLayer, width
from diffaccel.quantization.linear import become_plain, become_quantized
from diffaccel.quantization.policy import LoadedPhase, PolicyPhase, runs_under
from diffaccel.quantization.prepare import prepare, runs_of
from diffaccel.quantization.saved import SavedLayer, describe, saved_layers
from diffaccel.quantization.schedule import Schedule, Steps
from diffaccel.quantization.stored import Run

Dtype = Callable[[str, torch.dtype], torch.dtype]
"""From a layer's name and the dtype of its empty weight to that of the weight that it stands for."""


class Loading:
    """Between `begin`, before the weights are read, and `finish`; `takes` says which tensors go through `take`.

    Args:
        config: what ``from_pretrained`` was given, or ``config.json`` holds.
        pre_quantized: whether the checkpoint holds quantized weights.
        dtype: see `Dtype`.
    """

    def __init__(
        self, config: DiffAccelConfig, *, pre_quantized: bool, dtype: Dtype = lambda name, dtype: dtype
    ) -> None:
        self._config, self._pre_quantized, self._dtype = config, pre_quantized, dtype
        self._saved: dict[str, SavedLayer] = {}
        self._planned: dict[str, Schedule] = {}
        self._policy = None if config.policy is None else PolicyPhase(config.policy)
        self._phases: dict[Any, LoadedPhase] = {}  # by what layers run when, so that they share one

    def begin(self, model: nn.Module) -> None:
        """Find the layers, all on the meta device.

        Raises:
            PlanError: the settings' pattern matches no layer.
            ModelError: ``config.json`` speaks of layers that ``model`` does not have.
        """
        if self._pre_quantized:
            self._saved = saved_layers(self._config.saved)
            for name, saved in self._saved.items():
                layer = _layer_at(model, name)
                become_quantized(layer, saved.runs, saved.empty(), self._dtype(name, layer.weight.dtype))
            return
        (network,) = find_denoisers(model)
        settings = self._config.settings
        users = parameter_users([network])
        for site in select([network], settings.sites, "layers"):
            if why_not(site.module, users, settings, loaded=False) is None:
                self._planned[site.name] = (((0.0, 1.0), form_at(settings, site)),)

    def takes(self, name: str) -> bool:
        """Whether the tensor ``name`` of the checkpoint is a weight to quantize, or part of one that is."""
        owner, _, own = name.rpartition(".")
        return (owner in self._planned and own == "weight") or (owner in self._saved and own in SAVED)

    def take(self, model: nn.Module, name: str, value: Tensor) -> None:
        """``value``, of a tensor that this `takes`, on the device where it is to be and in the dtype of the file.

        Raises:
            ModelError: a weight that is not finite.
        """
        owner, _, own = name.rpartition(".")
        layer = model.get_submodule(owner)
        if owner in self._saved:
            layer._buffers[own] = value
            return
        schedule = self._planned[owner]
        weight = layer._parameters["weight"]
        assert weight is not None
        dtype = self._dtype(owner, weight.dtype)
        with torch.no_grad():
            value = value.to(dtype)
            tensors = prepare(value, None, schedule) if value.isfinite().all() else {"weight": value}
            if not all(t.isfinite().all() for t in tensors.values() if t.is_floating_point() and t.itemsize > 1):
                raise ModelError(f"{name} holds values that are not finite")
            runs, _ = runs_of(schedule, value.shape)
            self._become(layer, runs, tensors, dtype)

    def finish(self, model: nn.Module) -> None:
        """Bring what was read into the form that is fastest here, one layer at a time, and note it for saving.

        Raises:
            ModelError: the checkpoint holds a part of a layer only, or parts that do not go together.
        """
        for name in self._saved:
            layer = model.get_submodule(name)
            assert isinstance(layer, QuantizedLayer)
            tensors, runs = layer.stored(), layer.runs
            bias = layer._parameters["bias"]
            dtype = layer.weight_dtype if bias is None else bias.dtype
            if any(t.device.type == "meta" or not t.numel() for t in tensors.values()):
                raise ModelError(f"the checkpoint holds only a part of {name}; save the model again")
            try:
                _check_shapes(layer, tensors)
                become_plain(layer, None)
                with torch.no_grad():
                    self._become(layer, runs, tensors, dtype, self._saved[name].pieces)
            except torch.OutOfMemoryError:
                raise
            except (KeyError, ValueError, RuntimeError) as error:
                raise ModelError(
                    f"the checkpoint's tensors of {name} do not go together ({error}); save the model again"
                ) from None
        if self._policy is not None or self._phases:
            what = "leaves activations in 16 bits in some steps" if self._policy else "runs other bits at other steps"
            warnings.warn(
                f"diffaccel: this model {what} under diffaccel.accelerate(pipe, plan) with any plan, such as "
                "diffaccel.Plan(), and the same at all steps without",
                stacklevel=2,
            )
        self._config.saved = describe(model, native=self._policy is not None)
        self._config.dtype = self._config.dtype or str(model.dtype).removeprefix("torch.")

    def _become(
        self,
        layer: nn.Module,
        runs: Sequence[Run],
        tensors: dict[str, Tensor],
        dtype: torch.dtype,
        pieces: tuple[tuple[Steps, int], ...] = (),
    ) -> None:
        phase: LoadedPhase | None = None
        if self._policy is not None:
            runs = runs_under(self._config.policy, runs[0])
            phase = self._policy if len(runs) > 1 else None
        elif pieces:
            widest = max(range(len(runs)), key=lambda index: width(runs[index]))
            phase = self._phases.setdefault((pieces, widest), LoadedPhase(pieces, widest))
        become_quantized(layer, runs, tensors, dtype, phase=phase)


def _check_shapes(layer: QuantizedLayer, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError, or what torch raises, where the layer's weight cannot be made of these; takes no memory."""
    layer._buffers.update({name: tensor.to("meta") for name, tensor in tensors.items()})
    shape = tuple(layer.dequantized().shape)
    if shape != layer.weight_shape:
        raise ValueError(f"they make a weight {shape}, the model's is {layer.weight_shape}")


def dequantize(model: nn.Module) -> None:
    """Turn every quantized layer into a plain one with the rounded weight."""
    for layer in model.modules():
        if isinstance(layer, QuantizedLayer):
            become_plain(layer, nn.Parameter(layer.dequantized(), requires_grad=False))


def _layer_at(model: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise ModelError(
            f"{name} was saved in quantized form, but this {type(model).__name__} has no such layer"
        ) from None
    if type(layer) not in (nn.Linear, nn.Conv2d) or layer._parameters.get("weight") is None:
        raise ModelError(f"{name} was saved in quantized form, but is a {type(layer).__name__} in this model")
    return layer  # type: ignore[return-value]

"""A linear that computes with int8 weights, and mostly int8 activations, in place of the `nn.Linear` that it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffaccel.errors import PlanError
from diffaccel.kernels.int8_linear import PackedWeight, activation_bits, int8_linear, pack
from diffaccel.originals import Parked
from diffaccel.quantization.weight import QuantizedWeight, dequantize_weight, plain


class Phase:
    """Whether the quantized form runs now: shared by sites with the same step ranges, decided outside the blocks."""

    def __init__(self, ranges: tuple[tuple[float, float], ...]) -> None:
        self.ranges = ranges
        self.active = True


class QuantizedLinear(nn.Linear):
    """An `nn.Linear` whose instance was turned into this by `become_quantized`, and is turned back by `become_linear`.

    The instance stays the same object, so LoRA wrappers around it, hooks on it and references to it stay right whatever
    the user does in between. ``bias`` is the original Parameter.

    Attributes:
        qweight: int8, plain [N, K] or blocked for oneDNN. scale: float32 [N].
        original: the weight before, [N, K]; only where the layer has a step range.
        bits: of the activations.
        weight_only: whether activations are left as they come; the weight is then dequantised at every call.
        weight_dtype: what the weight was, and dequantises to.
        parked: where the original waits; None once it was let go.
        phase: None for a layer without a step range.
    """

    qweight: Tensor
    scale: Tensor
    original: Tensor
    bits: int
    weight_only: bool
    weight_dtype: torch.dtype
    parked: Parked | None
    phase: Phase | None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name is nn.Linear's)
        """``input`` [..., K] -> [..., N] in its dtype."""
        if not isinstance(self, QuantizedLinear):
            # A hook that was put on while this was quantized holds the bound method beyond `become_linear`.
            return F.linear(input, self.weight, self.bias)
        if self.phase is not None and not self.phase.active:
            return F.linear(input, self.original, self.bias)
        path = "dense" if self.weight_only else "auto"
        return int8_linear(input, PackedWeight(self.qweight, self.scale, path, self.bits), self.bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantised weight; see `QuantizedWeight`."""
        if torch.compiler.is_compiling():
            return dequantize_weight(self.qweight, self.scale, self.weight_dtype)
        return QuantizedWeight(self.qweight, self.scale, (self.out_features, self.in_features), self.weight_dtype)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight" and param is not None:
            raise PlanError("the weight of a linear that diffaccel quantized cannot be replaced; call remove() first")
        super().register_parameter(name, param)

    def extra_repr(self) -> str:
        activations = "float" if self.weight_only else f"int{self.bits}"
        return f"{super().extra_repr()}, weights=int8, activations={activations}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Moves like any module, but the scale stays float32, and oneDNN's blocked form is made where it is used."""
        scale, device = self.scale, self.scale.device
        probe = fn(torch.empty(0, dtype=self.weight_dtype, device=device))
        blocked, moves = self.qweight.is_mkldnn, probe.device != device
        if blocked and moves:
            self.qweight = plain(self.qweight)
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            self.scale = scale.to(self.scale.device)
        if moves and self.scale.device.type != "meta":
            self.bits = activation_bits(self.scale.device)
        self.weight_dtype = probe.dtype
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """The original while it is kept, else the compressed form; never both, so a save is one or the other."""
        if self.parked is not None:
            values = {"weight": self.parked.read(), "bias": self.bias}
        else:
            values = {"qweight": plain(self.qweight), "scale": self.scale, "bias": self.bias}
        for name, value in values.items():
            if value is not None:
                destination[prefix + name] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        refuse_loading(self, state_dict, prefix)
        missing_keys.append(prefix + ("weight" if self.parked is not None else "qweight"))

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Linear:
        raise PlanError(
            "a linear that diffaccel quantized cannot be copied; call remove() on the acceleration first, or copy the "
            "model by save_pretrained and from_pretrained after bake()"
        )


def refuse_loading(layer: QuantizedLinear, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Raise PlanError if ``state_dict`` holds values for ``layer``, whose keys begin with ``prefix``."""
    for name in ("weight", "bias", "qweight", "scale"):
        if prefix + name in state_dict:
            raise PlanError(
                f"load_state_dict: {prefix}{name} belongs to a linear that diffaccel quantized; call remove() on the "
                "acceleration (after bake(): load the model anew), load, then accelerate again"
            )


def become_quantized(
    layer: nn.Linear,
    qweight: Tensor,
    scale: Tensor,
    weight_dtype: torch.dtype,
    parked: Parked | None = None,
    phase: Phase | None = None,
    *,
    weight_only: bool = False,
) -> None:
    """Turn the plain ``layer`` into a `QuantizedLinear` with int8 ``qweight`` [N, K] and ``scale`` [N]."""
    packed = pack(qweight, scale, "dense" if weight_only else _form(qweight))
    original = layer._parameters["weight"]
    layer.__dict__.pop("forward", None)  # a leftover of removed hooks; resolve made sure that it is nothing else
    layer._parameters["weight"] = None  # keeps its place, and so the order of the state dict
    layer.__class__ = QuantizedLinear
    assert isinstance(layer, QuantizedLinear)
    layer.register_buffer("qweight", packed.data)
    layer.register_buffer("scale", packed.scale)
    layer.bits, layer.weight_dtype, layer.parked, layer.phase = packed.bits, weight_dtype, parked, phase
    layer.weight_only = weight_only
    if phase is not None and original is not None:
        layer.register_buffer("original", original.data, persistent=False)


def become_linear(layer: QuantizedLinear, weight: nn.Parameter | None) -> None:
    """The inverse of `become_quantized`."""
    for name in ("qweight", "scale", "original"):
        layer._buffers.pop(name, None)
        layer._non_persistent_buffers_set.discard(name)
    for name in ("bits", "weight_only", "weight_dtype", "parked", "phase"):
        layer.__dict__.pop(name, None)
    layer.__class__ = nn.Linear  # type: ignore[assignment]
    layer._parameters["weight"] = weight


def _form(qweight: Tensor) -> str:
    """Blocked for oneDNN only where there is no accelerator: moves between devices (offloading) need plain tensors."""
    on_cpu = qweight.device.type == "cpu" and not isinstance(qweight, torch._subclasses.FakeTensor)
    return "dense" if on_cpu and torch.accelerator.is_available() else "auto"

"""A linear that computes with a quantized weight, and mostly quantized activations, in an `nn.Linear`'s place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffaccel.errors import PlanError
from diffaccel.kernels.int8_linear import activation_bits
from diffaccel.originals import Parked
from diffaccel.quantization.conditioning import condition_input, release_weight
from diffaccel.quantization.protection import protect_rows
from diffaccel.quantization.schedule import Phase
from diffaccel.quantization.stored import KINDS, NAMES, Run
from diffaccel.quantization.weight import QuantizedWeight

CONDITIONING = ("before", "after", "up", "down")
"""Names of tensors that a stored weight may have beside those of its kind."""
PROTECTED = ("kept_rows", "kept_outputs")
"""Names of the tensors of protected tokens, which all stored weights of a layer share."""
SAVED = (*NAMES, *CONDITIONING, *PROTECTED)


class QuantizedLinear(nn.Linear):
    """An `nn.Linear` whose instance was turned into this by `become_quantized`, and is turned back by `become_linear`.

    The instance stays the same object, so LoRA wrappers around it, hooks on it and references to it stay right whatever
    the user does in between. ``bias`` is the original Parameter. The stored weights are buffers by the names of their
    kind (see `stored`), those of a second one with a suffix.

    Attributes:
        runs: how it can run; the phase says which.
        stored_names: of the buffers that this needs.
        original: the weight before, [N, K]; only where the layer runs as it was at some steps.
        bits: of int8 activations.
        weight_dtype: what the weight was, and dequantises to.
        parked: where the original waits; None once it was let go.
        phase: None for a layer that always runs in the same way.
    """

    runs: tuple[Run, ...]
    stored_names: tuple[str, ...]
    scale: Tensor
    kept_rows: Tensor
    kept_outputs: Tensor
    original: Tensor
    bits: int
    weight_dtype: torch.dtype
    parked: Parked | None
    phase: Phase | None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name is nn.Linear's)
        """``input`` [..., K] -> [..., N] in its dtype."""
        if not isinstance(self, QuantizedLinear):
            # A hook that was put on while this was quantized holds the bound method beyond `become_linear`.
            return F.linear(input, self.weight, self.bias)
        active = 0 if self.phase is None else self.phase.active
        if active < 0:
            return F.linear(input, self.original, self.bias)
        run = self.runs[active]
        tensors = self.tensors(run)
        x = condition_input(input, tensors.get("before"), tensors.get("after"), rotated=run.rotated)
        y = KINDS[run.kind].linear(x, tensors, run, self.bias, self.bits)
        if "kept_rows" in self._buffers:
            y = protect_rows(y, input, self.kept_rows, self.kept_outputs)
        return y

    def tensors(self, run: Run) -> dict[str, Tensor]:
        """What ``run`` computes with, by name without the suffix."""
        found = {name: self._buffers.get(name + run.suffix) for name in (*KINDS[run.kind].names, *CONDITIONING)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def device(self) -> torch.device:
        return self.scale.device

    @property
    def weight_only(self) -> bool:
        """Whether activations stay as they come at all steps."""
        return all(run.scheme.activations == "float" for run in self.runs)

    @property
    def integer_activations(self) -> bool:
        """Whether they are int8 at some steps."""
        return any(run.scheme.activations == "int8" for run in self.runs)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """What the layer multiplies with first in the schedule, dequantised; see `QuantizedWeight`."""
        if torch.compiler.is_compiling():
            return self.dequantized()
        shape = (self.out_features, self.in_features)
        return QuantizedWeight(self.dequantized, shape, self.weight_dtype, self.device, self.runs[0].scheme.weights)

    def dequantized(self) -> Tensor:
        """[N, K] in ``weight_dtype``, without the conditioning."""
        run = self.runs[0]
        tensors = self.tensors(run)
        weight = KINDS[run.kind].values(tensors, run, self.in_features)
        if "up" in tensors:
            weight = weight + tensors["up"].float() @ tensors["down"].float()
        before, after = tensors.get("before"), tensors.get("after")
        return release_weight(weight, before, after, rotated=run.rotated).to(self.weight_dtype)

    @property
    def stored_bytes(self) -> int:
        """Of everything that the quantized weight needs; the original not included."""
        return sum(tensor.nbytes for tensor in self.stored().values())

    def stored(self) -> dict[str, Tensor]:
        """Every tensor of ours but the original, by name with suffix."""
        return {name: tensor for name in self.stored_names if (tensor := self._buffers.get(name)) is not None}

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight" and param is not None:
            raise PlanError("the weight of a linear that diffaccel quantized cannot be replaced; call remove() first")
        super().register_parameter(name, param)

    def extra_repr(self) -> str:
        forms = " or ".join(dict.fromkeys(_words(run, self.bits) for run in self.runs))
        return f"{super().extra_repr()}, {forms}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Moves like any module, but what is stored keeps its dtype, and oneDNN's form is made where it is used."""
        device = self.device
        probe = fn(torch.empty(0, dtype=self.weight_dtype, device=device))
        moves = probe.device != device
        if moves:
            for run in self.runs:
                for name, tensor in KINDS[run.kind].unpack(self.tensors(run)).items():
                    self._buffers[name + run.suffix] = tensor
        before = self.stored()
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            now = self._buffers[name]
            if now is not None and now.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(now.device)
        if moves and self.device.type != "meta":
            self.bits = activation_bits(self.device)
        self.weight_dtype = probe.dtype
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """The original while it is kept, else the compressed form; never both, so a save is one or the other."""
        values: dict[str, Tensor | None]
        if self.parked is not None:
            values = {"weight": self.parked.read()}
        else:
            values = dict(self.saved())
        values["bias"] = self.bias
        for name, value in values.items():
            if value is not None:
                destination[prefix + name] = value if keep_vars else value.detach()

    def saved(self) -> dict[str, Tensor]:
        """What a file holds of the compressed form: of several, the one with the most bits."""
        run = self.saved_run
        tensors = self.tensors(run)
        tensors |= KINDS[run.kind].unpack({name: tensors[name] for name in KINDS[run.kind].names if name in tensors})
        return tensors | {name: tensor for name, tensor in self.stored().items() if name in PROTECTED}

    @property
    def saved_run(self) -> Run:
        """How a layer runs that is loaded from a file."""
        return max(self.runs, key=lambda run: run.scheme.bits)

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
        missing_keys.append(prefix + ("weight" if self.parked is not None else next(iter(self.saved()))))

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Linear:
        raise PlanError(
            "a linear that diffaccel quantized cannot be copied; call remove() on the acceleration first, or copy the "
            "model by save_pretrained and from_pretrained after bake()"
        )


def refuse_loading(layer: QuantizedLinear, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Raise PlanError if ``state_dict`` holds values for ``layer``, whose keys begin with ``prefix``."""
    for name in ("weight", "bias", *SAVED):
        if prefix + name in state_dict:
            raise PlanError(
                f"load_state_dict: {prefix}{name} belongs to a linear that diffaccel quantized; call remove() on the "
                "acceleration (after bake(): load the model anew), load, then accelerate again"
            )


def become_quantized(
    layer: nn.Linear,
    runs: Sequence[Run],
    tensors: Mapping[str, Tensor],
    weight_dtype: torch.dtype,
    parked: Parked | None = None,
    phase: Phase | None = None,
    *,
    keep_original: bool = False,
) -> None:
    """Turn the plain ``layer`` into a `QuantizedLinear`.

    Args:
        runs: see `QuantizedLinear`.
        tensors: by name with suffix, as they are saved.
        keep_original: whether some steps need the weight as it was.
    """
    original = layer._parameters["weight"]
    device = tensors["scale"].device
    layer.__dict__.pop("forward", None)  # a leftover of removed hooks; resolve made sure that it is nothing else
    layer._parameters["weight"] = None  # keeps its place, and so the order of the state dict
    layer.__class__ = QuantizedLinear
    assert isinstance(layer, QuantizedLinear)
    layer.runs = tuple(runs)
    layer.stored_names = tuple(tensors)
    packed = {} if device.type == "meta" else _packed(layer, tensors)
    for name, tensor in (dict(tensors) | packed).items():
        layer.register_buffer(name, tensor)
    real = device.type != "meta" and not isinstance(tensors["scale"], torch._subclasses.FakeTensor)
    layer.bits = activation_bits(device) if real else 8
    layer.weight_dtype, layer.parked, layer.phase = weight_dtype, parked, phase
    if keep_original and original is not None:
        layer.register_buffer("original", original.data, persistent=False)


def _packed(layer: QuantizedLinear, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every stored weight in the form that is fastest where it is."""
    packed: dict[str, Tensor] = {}
    for suffix in dict.fromkeys(run.suffix for run in layer.runs):
        sharing = [run for run in layer.runs if run.suffix == suffix]
        kind = KINDS[sharing[0].kind]
        own = {name: tensors[name + suffix] for name in kind.names if name + suffix in tensors}
        integer = any(run.scheme.activations == "int8" for run in sharing)
        packed |= {name + suffix: tensor for name, tensor in kind.pack(own, integer_activations=integer).items()}
    return packed


def become_linear(layer: QuantizedLinear, weight: nn.Parameter | None) -> None:
    """The inverse of `become_quantized`."""
    for name in (*layer.stored_names, "original"):
        layer._buffers.pop(name, None)
        layer._non_persistent_buffers_set.discard(name)
    for name in ("runs", "stored_names", "bits", "weight_dtype", "parked", "phase"):
        layer.__dict__.pop(name, None)
    layer.__class__ = nn.Linear  # type: ignore[assignment]
    layer._parameters["weight"] = weight


def _words(run: Run, bits: int) -> str:
    activations = f"int{bits}" if run.scheme.activations == "int8" else run.scheme.activations
    group = f" in groups of {run.scheme.group}" if run.scheme.group else ""
    return f"weights={run.scheme.weights}{group}, activations={activations}"

"""What quantized linears and convolutions have in common: their tensors, how they move, are saved and turned back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.errors import PlanError
from diffaccel.kernels.int8_linear import activation_bits
from diffaccel.originals import Parked
from diffaccel.quantization.conditioning import release_weight
from diffaccel.quantization.schedule import Phase
from diffaccel.quantization.stored import KINDS, NAMES, Run
from diffaccel.quantization.weight import QuantizedWeight

CONDITIONING = ("before", "after", "up", "down", "act_limits")
"""Names of tensors that a stored weight may have beside those of its kind."""
PROTECTED = ("kept_rows", "kept_outputs")
"""Names of the tensors of protected tokens, which all stored weights of a layer share."""
STATIC = ("act_scale", "act_zero", "act_sums")
"""Names of the buffers that a stored weight has for static activations now; made from its ``act_limits``, not saved."""
SAVED = (*NAMES, *CONDITIONING, *PROTECTED)


class QuantizedLayer(nn.Module):
    """Mixed into the class of a layer whose instance was turned into this, and is turned back by `become_plain`.

    The instance stays the same object, so LoRA wrappers around it, hooks on it and references to it stay right whatever
    the user does in between. ``bias`` is the original Parameter. The stored weights are buffers by the names of their
    kind (see `stored`), those of a second one with a suffix.

    Attributes:
        runs: how it can run; the phase says which.
        stored_names: of the buffers that this needs.
        original: the weight before; only where the layer runs as it was at some steps.
        bits: of int8 activations.
        weight_dtype: what the weight was, and dequantises to.
        parked: where the original waits; None once it was let go.
        phase: None for a layer that always runs in the same way.
    """

    runs: tuple[Run, ...]
    stored_names: tuple[str, ...]
    qweight: Tensor
    scale: Tensor
    kept_rows: Tensor
    kept_outputs: Tensor
    original: Tensor
    bits: int
    weight_dtype: torch.dtype
    parked: Parked | None
    phase: Phase | None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the weight that this stands for."""
        raise NotImplementedError

    @property
    def active(self) -> Run | None:
        """How it runs now; None: as it was."""
        active = 0 if self.phase is None else self.phase.active
        return None if active < 0 else self.runs[active]

    def tensors(self, run: Run) -> dict[str, Tensor]:
        """What ``run`` computes with, by name without the suffix."""
        names = (*KINDS[run.kind].names, *CONDITIONING, *STATIC)
        found = {name: self._buffers.get(name + run.suffix) for name in names}
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
        return any(run.scheme.integer_activations for run in self.runs)

    @property
    def weight(self) -> Tensor:
        """What the layer multiplies with first in the schedule, dequantised; see `QuantizedWeight`."""
        if torch.compiler.is_compiling():
            return self.dequantized()
        words = self.runs[0].scheme.weights
        return QuantizedWeight(self.dequantized, self.weight_shape, self.weight_dtype, self.device, words)

    def dequantized(self) -> Tensor:
        """In ``weight_dtype``, without the conditioning."""
        run = self.runs[0]
        tensors = self.tensors(run)
        weight = KINDS[run.kind].values(tensors, run, self.weight_shape[1])
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
            raise PlanError("the weight of a layer that diffaccel quantized cannot be replaced; call remove() first")
        super().register_parameter(name, param)

    def extra_repr(self) -> str:
        forms = " or ".join(dict.fromkeys(_words(run, self.bits) for run in self.runs))
        return f"{super().extra_repr()}, {forms}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLayer:
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
        self.use_limits(None)
        return self

    def use_limits(self, part: int | None) -> None:
        """Round static activations to the range of this part of the schedule, of `channels.RANGES`; None: of any."""
        for suffix in {run.suffix for run in self.runs if run.scheme.activations == "static"}:
            limits = self._buffers["act_limits" + suffix]
            assert limits is not None
            if limits.device.type == "meta":
                continue
            lows, highs = limits[:, 0::2], limits[:, 1::2]  # of each part of a split input
            low, high = (lows.amin(0), highs.amax(0)) if part is None else (lows[part], highs[part])
            for name, value in self.static_form(low, high, suffix).items():
                now = self._buffers.get(name + suffix)
                if now is not None and (now.device, now.dtype) == (value.device, value.dtype):
                    now.copy_(value)  # in place: compiled code and CUDA graphs hold it
                else:
                    self.register_buffer(name + suffix, value, persistent=False)

    def static_form(self, low: Tensor, high: Tensor, suffix: str) -> dict[str, Tensor]:
        """The buffers, by name without ``suffix``, that round activations between ``low`` and ``high``, [1] or [2]."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """The original while it is kept, else the compressed form; never both, so a save is one or the other."""
        values: dict[str, Tensor | None]
        if self.parked is not None:
            values = {"weight": self.parked.read()}
        else:
            values = dict(self.saved())
        values["bias"] = self._parameters["bias"]
        for name, value in values.items():
            if value is not None:
                destination[prefix + name] = value if keep_vars else value.detach()

    def saved(self) -> dict[str, Tensor]:
        """What a file holds of the compressed form: of several, the one with the most bits."""
        run = self.saved_run
        tensors = {name: tensor for name, tensor in self.tensors(run).items() if name not in STATIC}
        tensors |= KINDS[run.kind].unpack({name: tensors[name] for name in KINDS[run.kind].names if name in tensors})
        return tensors | {name: tensor for name, tensor in self.stored().items() if name in PROTECTED}

    @property
    def saved_run(self) -> Run:
        """How a layer runs that is loaded from a file: the widest form, of weights first."""
        return max(self.runs, key=width)

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

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        raise PlanError(
            "a layer that diffaccel quantized cannot be copied; call remove() on the acceleration first, or copy the "
            "model by save_pretrained and from_pretrained after bake()"
        )


def width(run: Run) -> tuple[int, bool]:
    """By which the widest form is chosen: bits of weights first."""
    return run.scheme.bits, run.scheme.activations == "float"


def refuse_loading(layer: QuantizedLayer, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Raise PlanError if ``state_dict`` holds values for ``layer``, whose keys begin with ``prefix``."""
    for name in ("weight", "bias", *SAVED):
        if prefix + name in state_dict:
            raise PlanError(
                f"load_state_dict: {prefix}{name} belongs to a layer that diffaccel quantized; call remove() on the "
                "acceleration (after bake(): load the model anew), load, then accelerate again"
            )


def _words(run: Run, bits: int) -> str:
    activations = f"int{bits}" if run.scheme.activations == "int8" else run.scheme.activations
    group = f" in groups of {run.scheme.group}" if run.scheme.group else ""
    return f"weights={run.scheme.weights}{group}, activations={activations}"

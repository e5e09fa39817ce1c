"""The ways in which a weight is stored, as named tensors: how each is made, multiplied with, and read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.kernels import fp8_linear as fp8
from diffaccel.kernels import int8_linear as int8
from diffaccel.kernels.fit_int4 import quantize_int4, quantize_nested
from diffaccel.kernels.int4_linear import int4_linear
from diffaccel.kernels.int8_conv import quantize_filters
from diffaccel.kernels.int8_rows import PLAIN, Conditioner, conditioned
from diffaccel.kernels.int8_static import int8_static_linear
from diffaccel.kernels.packed_weight import Int4Weight, NestedWeight, int4_from, nested_from
from diffaccel.quantization.scheme import Scheme
from diffaccel.quantization.weight import dequantize_weight, plain

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Run:
    """How a layer's stored weight is used at some of the steps.

    Args:
        kind: which of `KINDS` it is stored in.
        scheme: what it stands for. A nested weight serves several.
        group: of the stored weight.
        rotated: whether its input is turned.
        suffix: of its tensors' names; tells the stored weights of a layer apart.
    """

    kind: str
    scheme: Scheme
    group: int | None = None
    rotated: bool = False
    suffix: str = ""


class Kind(Protocol):
    """One way of storing a weight [N, K]; ``tensors`` are by name, ``down`` and ``up`` of a branch included."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of its tensors; some weights have no ``multiplier``."""

    def quantize(self, weight: Tensor, group: int | None, importance: Tensor | None = None) -> dict[str, Tensor]:
        """Its tensors, as they are saved; float32 [N, K] in. Scales are NaN in channels that are not finite.

        ``importance`` [K] is the mean square of each input, where known; what searches its scales makes use of it.
        """

    def pack(self, tensors: Tensors, *, integer_activations: bool) -> dict[str, Tensor]:
        """What is fastest on the tensors' device; `unpack` is the inverse."""

    def unpack(self, tensors: Tensors) -> dict[str, Tensor]:
        """As they are saved."""

    def values(self, tensors: Tensors, run: Run, columns: int) -> Tensor:
        """The rounded weight, float32 [N, K]."""

    def linear(
        self, x: Tensor, tensors: Tensors, run: Run, bias: Tensor | None, bits: int, how: Conditioner = PLAIN
    ) -> Tensor:
        """``x`` [..., K] -> [..., N] in its dtype, low-rank branch included.

        ``bits`` of int8 activations, ``how`` it is conditioned: in the same pass where that can be.
        """


class _Int8:
    names = ("qweight", "scale")

    def quantize(self, weight: Tensor, group: int | None, importance: Tensor | None = None) -> dict[str, Tensor]:
        return dict(zip(self.names, int8.quantize_per_channel(weight), strict=True))

    def pack(self, tensors: Tensors, *, integer_activations: bool) -> dict[str, Tensor]:
        """Blocked for oneDNN only where there is no accelerator: moves between devices need plain tensors."""
        qweight = tensors["qweight"]
        on_cpu = qweight.device.type == "cpu" and not isinstance(qweight, torch._subclasses.FakeTensor)
        blocked = integer_activations and not (on_cpu and torch.accelerator.is_available())
        packed = int8.pack(qweight, tensors["scale"], "auto" if blocked else "dense")
        return {"qweight": packed.data, "scale": packed.scale}

    def unpack(self, tensors: Tensors) -> dict[str, Tensor]:
        return {"qweight": plain(tensors["qweight"]), "scale": tensors["scale"]}

    def values(self, tensors: Tensors, run: Run, columns: int) -> Tensor:
        return dequantize_weight(tensors["qweight"], tensors["scale"], torch.float32)

    def linear(
        self, x: Tensor, tensors: Tensors, run: Run, bias: Tensor | None, bits: int, how: Conditioner = PLAIN
    ) -> Tensor:
        if "down" in tensors:  # the branch reads it too
            x, how = conditioned(x, how), PLAIN
        if run.scheme.activations == "static":
            grid, sums = (tensors["act_scale"], tensors["act_zero"]), tensors.get("act_sums")
            y = int8_static_linear(x, tensors["qweight"], tensors["scale"], bias, *grid, sums, how.before, bits=bits)
            return _with_branch(y, x, tensors)
        path = "auto" if run.scheme.activations == "int8" else "dense"
        packed = int8.PackedWeight(tensors["qweight"], tensors["scale"], path, bits)
        return _with_branch(int8.int8_linear(x, packed, bias, how), x, tensors)


class _Plain:
    """Saved as it runs."""

    def pack(self, tensors: Tensors, *, integer_activations: bool) -> dict[str, Tensor]:
        return dict(tensors)

    def unpack(self, tensors: Tensors) -> dict[str, Tensor]:
        return dict(tensors)


class _Fp8(_Plain):
    names = ("qweight", "scale")

    def quantize(self, weight: Tensor, group: int | None, importance: Tensor | None = None) -> dict[str, Tensor]:
        return dict(zip(self.names, fp8.quantize_per_channel(weight), strict=True))

    def values(self, tensors: Tensors, run: Run, columns: int) -> Tensor:
        return tensors["qweight"].float() * tensors["scale"][:, None]

    def linear(
        self, x: Tensor, tensors: Tensors, run: Run, bias: Tensor | None, bits: int, how: Conditioner = PLAIN
    ) -> Tensor:
        x = conditioned(x, how)
        path = "auto" if run.scheme.activations == "fp8" else "dense"
        return _with_branch(fp8.fp8_linear(x, tensors["qweight"], tensors["scale"], bias, path), x, tensors)


class _Int4(_Plain):
    names: tuple[str, ...] = ("nibbles", "multiplier", "scale")

    def quantize(self, weight: Tensor, group: int | None, importance: Tensor | None = None) -> dict[str, Tensor]:
        return quantize_int4(weight, group, importance).tensors()

    def values(self, tensors: Tensors, run: Run, columns: int) -> Tensor:
        return self._weight(tensors, run, columns).dequantize()

    def linear(
        self, x: Tensor, tensors: Tensors, run: Run, bias: Tensor | None, bits: int, how: Conditioner = PLAIN
    ) -> Tensor:
        weight = self._weight(tensors, run, x.shape[-1])
        return int4_linear(x, weight, bias, run.scheme.activations, _branch(x, tensors), how=how)

    def _weight(self, tensors: Tensors, run: Run, columns: int) -> Int4Weight | NestedWeight:
        return int4_from(tensors, columns, run.group)


class _Int8Filters(_Plain):
    """Of a convolution, [N, C, kh, kw]; it packs them itself, since that depends on its geometry."""

    names: tuple[str, ...] = ("qweight", "scale")

    def quantize(self, weight: Tensor, group: int | None, importance: Tensor | None = None) -> dict[str, Tensor]:
        return dict(zip(self.names, quantize_filters(weight), strict=True))

    def unpack(self, tensors: Tensors) -> dict[str, Tensor]:
        qweight = tensors["qweight"]
        return {"qweight": qweight.to_dense() if qweight.is_mkldnn else qweight, "scale": tensors["scale"]}

    def values(self, tensors: Tensors, run: Run, columns: int) -> Tensor:
        return self.unpack(tensors)["qweight"].float() * tensors["scale"][:, None, None, None]

    def linear(
        self, x: Tensor, tensors: Tensors, run: Run, bias: Tensor | None, bits: int, how: Conditioner = PLAIN
    ) -> Tensor:
        raise NotImplementedError("a convolution runs by its own forward")


class _SplitFilters(_Int8Filters):
    """Of a convolution that rounds its leading input channels, ``group`` of them, apart from the others."""

    names = ("qweight", "scale", "skip_qweight", "skip_scale")

    def quantize(self, weight: Tensor, group: int | None, importance: Tensor | None = None) -> dict[str, Tensor]:
        halves = (quantize_filters(weight[:, :group]), quantize_filters(weight[:, group:]))
        return dict(zip(self.names, (*halves[0], *halves[1]), strict=True))

    def unpack(self, tensors: Tensors) -> dict[str, Tensor]:
        return {name: t.to_dense() if t.is_mkldnn else t for name, t in tensors.items() if name in self.names}

    def values(self, tensors: Tensors, run: Run, columns: int) -> Tensor:
        plain = self.unpack(tensors)
        parts = [plain[f"{part}qweight"].float() * plain[f"{part}scale"][:, None, None, None] for part in ("", "skip_")]
        return torch.cat(parts, 1)


class _Nested(_Int4):
    """One weight that is read as int8 or as int4."""

    names = ("low", "scale", "high_nibbles", "high_multiplier", "high_scale")

    def quantize(self, weight: Tensor, group: int | None, importance: Tensor | None = None) -> dict[str, Tensor]:
        assert group is not None
        return quantize_nested(weight, group, importance).tensors()

    def _weight(self, tensors: Tensors, run: Run, columns: int) -> Int4Weight | NestedWeight:
        weight = nested_from(tensors, columns, run.group)
        return weight.high if run.scheme.weights == "int4" else weight


def _branch(x: Tensor, tensors: Tensors) -> tuple[Tensor, Tensor] | None:
    """down [R, K] and up [N, R] in the dtype of ``x``, where there is a low-rank branch."""
    if "down" not in tensors:
        return None
    return tensors["down"].to(x.dtype), tensors["up"].to(x.dtype)


def _with_branch(y: Tensor, x: Tensor, tensors: Tensors) -> Tensor:
    branch = _branch(x, tensors)
    return y if branch is None else y + F.linear(F.linear(x, branch[0]), branch[1])


KINDS: dict[str, Kind] = {
    "int8": _Int8(),
    "fp8": _Fp8(),
    "int4": _Int4(),
    "nested": _Nested(),
    "int8_conv": _Int8Filters(),
    "int8_conv_split": _SplitFilters(),
}
"""By the name that `Run.kind` and saved models use."""

NAMES = tuple(dict.fromkeys(name for kind in KINDS.values() for name in kind.names))
"""Of every tensor of every kind."""

"""Linears and convolutions that compute with quantized weights, in the place of those that they were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffaccel.kernels.hadamard import block_for
from diffaccel.kernels.int8_conv import Geometry, PackedFilters, int8_conv, pack_filters
from diffaccel.kernels.int8_linear import activation_bits
from diffaccel.kernels.int8_rows import Conditioner
from diffaccel.kernels.int8_static import grid, row_sums
from diffaccel.kernels.per_token import SCALE_FLOOR
from diffaccel.originals import Parked
from diffaccel.quantization.layer import STATIC, QuantizedLayer
from diffaccel.quantization.protection import protect_rows
from diffaccel.quantization.schedule import Phase
from diffaccel.quantization.stored import KINDS, Run


class QuantizedLinear(QuantizedLayer, nn.Linear):  # type: ignore[override]
    """An `nn.Linear` that was turned into this by `become_quantized`."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name is nn.Linear's)
        """``input`` [..., K] -> [..., N] in its dtype."""
        if not isinstance(self, QuantizedLinear):
            # A hook that was put on while this was quantized holds the bound method beyond `become_plain`.
            return F.linear(input, self.weight, self.bias)
        run = self.active
        if run is None:
            return F.linear(input, self.original, self.bias)
        tensors = self.tensors(run)
        block = block_for(self.in_features) if run.rotated else 1
        how = Conditioner(tensors.get("before"), tensors.get("after"), block)
        y = KINDS[run.kind].linear(input, tensors, run, self.bias, self.bits, how)
        if "kept_rows" in self._buffers:
            y = protect_rows(y, input, self.kept_rows, self.kept_outputs)
        return y

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features

    def static_form(self, low: Tensor, high: Tensor, suffix: str) -> dict[str, Tensor]:
        scale, zero = grid(low, high, self.bits)
        qweight = self._buffers["qweight" + suffix]
        sums = None if qweight is None else row_sums(qweight)
        return {"act_scale": scale, "act_zero": zero} | ({} if sums is None else {"act_sums": sums})

    def pack(self, tensors: Mapping[str, Tensor], runs: Sequence[Run]) -> dict[str, Tensor]:
        """The tensors of one stored weight, shared by ``runs``, in the form that is fastest where they are."""
        integer = any(run.scheme.integer_activations for run in runs)
        return KINDS[runs[0].kind].pack(tensors, integer_activations=integer)


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):  # type: ignore[override]
    """An `nn.Conv2d` that was turned into this by `become_quantized`; W8A8 or W8A16 (MixDQ, arXiv:2405.17873)."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name is nn.Conv2d's)
        """``input`` [B, C, H, W] or [C, H, W], in its dtype."""
        if not isinstance(self, QuantizedConv2d):
            return self._conv_forward(input, self.weight, self.bias)
        run = self.active
        if run is None:
            return self._conv_forward(input, self.original, self.bias)
        tensors, split = self.tensors(run), run.scheme.split
        x = input if input.ndim == 4 else input[None]
        static = tensors["act_scale"] if run.scheme.activations == "static" else None
        path = "auto" if run.scheme.integer_activations else "dense"
        packed = PackedFilters(tensors["qweight"], tensors["scale"], self.geometry, path, self.bits)
        if split:
            y = int8_conv(x[:, :split], packed, self.bias, None if static is None else static[:1])
            packed = PackedFilters(tensors["skip_qweight"], tensors["skip_scale"], self.geometry, path, self.bits)
            y = y + int8_conv(x[:, split:], packed, None, None if static is None else static[1:])
        else:
            y = int8_conv(x, packed, self.bias, static)
        return y if input.ndim == 4 else y[0]

    def static_form(self, low: Tensor, high: Tensor, suffix: str) -> dict[str, Tensor]:
        """Symmetric, since zeros beyond the edges must be exact zeros."""
        return {"act_scale": torch.maximum(high, -low).clamp(min=SCALE_FLOOR) / 127}

    @property
    def geometry(self) -> Geometry:
        """As the kernel takes it."""
        assert not isinstance(self.padding, str)
        stride, padding, dilation = (tuple(pair) for pair in (self.stride, self.padding, self.dilation))
        return Geometry(stride, padding, dilation, self.groups)  # type: ignore[arg-type]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def pack(self, tensors: Mapping[str, Tensor], runs: Sequence[Run]) -> dict[str, Tensor]:
        """As for linears."""
        qweight = tensors["qweight"]
        integer = any(run.scheme.integer_activations for run in runs)
        on_cpu = qweight.device.type == "cpu" and not isinstance(qweight, torch._subclasses.FakeTensor)
        blocked = integer and not (on_cpu and torch.accelerator.is_available())
        found: dict[str, Tensor] = {}
        for part in ("", "skip_") if "skip_qweight" in tensors else ("",):
            weight, scale = tensors[f"{part}qweight"], tensors[f"{part}scale"]
            packed = pack_filters(weight, scale, self.geometry, "auto" if blocked else "dense")
            found |= {f"{part}qweight": packed.data, f"{part}scale": packed.scale}
        return found


_QUANTIZED: dict[type[nn.Module], type[QuantizedLinear] | type[QuantizedConv2d]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv2d: QuantizedConv2d,
}


def become_quantized(
    layer: nn.Module,
    runs: Sequence[Run],
    tensors: Mapping[str, Tensor],
    weight_dtype: torch.dtype,
    parked: Parked | None = None,
    phase: Phase | None = None,
    *,
    keep_original: bool = False,
) -> None:
    """Turn the plain ``layer``, a linear or a convolution, into a `QuantizedLayer`.

    Args:
        runs: see `QuantizedLayer`.
        tensors: by name with suffix, as they are saved.
        keep_original: whether some steps need the weight as it was.
    """
    original = layer._parameters["weight"]
    device = tensors["scale"].device
    layer.__dict__.pop("forward", None)  # a leftover of removed hooks; resolve made sure that it is nothing else
    layer._parameters["weight"] = None  # keeps its place, and so the order of the state dict
    layer.__class__ = _QUANTIZED[type(layer)]
    assert isinstance(layer, QuantizedLinear | QuantizedConv2d)
    layer.runs = tuple(runs)
    layer.stored_names = tuple(tensors)
    packed = {} if device.type == "meta" else _packed(layer, tensors)
    for name, tensor in (dict(tensors) | packed).items():
        layer.register_buffer(name, tensor)
    real = device.type != "meta" and not isinstance(tensors["scale"], torch._subclasses.FakeTensor)
    layer.bits = activation_bits(device) if real else 8
    layer.weight_dtype, layer.parked, layer.phase = weight_dtype, parked, phase
    layer.use_limits(None)
    if keep_original and original is not None:
        layer.register_buffer("original", original.data, persistent=False)


def _packed(layer: QuantizedLinear | QuantizedConv2d, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every stored weight in the form that is fastest where it is."""
    packed: dict[str, Tensor] = {}
    for suffix in dict.fromkeys(run.suffix for run in layer.runs):
        sharing = [run for run in layer.runs if run.suffix == suffix]
        names = KINDS[sharing[0].kind].names
        own = {name: tensors[name + suffix] for name in names if name + suffix in tensors}
        packed |= {name + suffix: tensor for name, tensor in layer.pack(own, sharing).items()}
    return packed


def become_plain(layer: QuantizedLayer, weight: nn.Parameter | None) -> None:
    """The inverse of `become_quantized`."""
    plain = next(plain for plain, quantized in _QUANTIZED.items() if isinstance(layer, quantized))
    derived = [name + run.suffix for run in layer.runs for name in STATIC]
    for name in (*layer.stored_names, *derived, "original"):
        layer._buffers.pop(name, None)
        layer._non_persistent_buffers_set.discard(name)
    for name in ("runs", "stored_names", "bits", "weight_dtype", "parked", "phase"):
        layer.__dict__.pop(name, None)
    layer.__class__ = plain  # type: ignore[assignment]
    layer._parameters["weight"] = weight

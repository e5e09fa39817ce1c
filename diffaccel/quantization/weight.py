"""What ``layer.weight`` gives on a quantized linear: a tensor that dequantises itself when it is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from diffaccel.errors import PlanError


@torch.library.custom_op("diffaccel::dequantize_weight", mutates_args=())
def dequantize_weight(qweight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 ``qweight`` (plain [N, K] or blocked by oneDNN) and ``scale`` [N] -> [N, K] in ``dtype``."""
    return (plain(qweight).float() * scale[:, None]).to(dtype)


@dequantize_weight.register_fake
def _(qweight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    # A blocked weight is [K, N], but shows that only to real kernels; scale tells which side is N.
    columns = qweight.shape[1] if qweight.shape[0] == scale.shape[0] else qweight.shape[0]
    return scale.new_empty((scale.shape[0], columns), dtype=dtype)


def plain(qweight: Tensor) -> Tensor:
    """The int8 weight as an ordinary [N, K] tensor."""
    return qweight.to_dense().t().contiguous() if qweight.is_mkldnn else qweight


class QuantizedWeight(Tensor):
    """Costs nothing to ask for its shape, dtype or device; any operation on it works on the dequantised values.

    Writing to it would be lost, so in-place operations are refused, and so is all but questions to ``.data`` (by which
    LoRA and qkv fusing read what they write).

    Args:
        values: gives them, in ``dtype``.
        stored: how they are stored, for people.
    """

    _is_hf_initialized = True  # transformers asks this before it fills a weight with random values
    _values: Callable[[], Tensor]
    _stored: str

    @staticmethod
    def __new__(
        cls,
        values: Callable[[], Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        stored: str,
    ) -> QuantizedWeight:
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self._values, self._stored = values, stored
        return self

    @property
    def data(self) -> Tensor:
        def refuse() -> Tensor:
            raise _refusal("reads .weight.data")

        return QuantizedWeight(refuse, tuple(self.shape), self.dtype, self.device, self._stored)

    @data.setter
    def data(self, value: Tensor) -> None:
        raise _refusal("replaces .weight.data")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for value, argument in zip(args, func._schema.arguments, strict=False):
            if isinstance(value, cls) and argument.alias_info is not None and argument.alias_info.is_write:
                raise _refusal(f"calls {func._schema.name} on .weight")

        def dequantised(value: Any) -> Any:
            return value._values() if isinstance(value, cls) else value

        return func(*tree_map(dequantised, args), **tree_map(dequantised, kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        shape = tuple(self.shape)
        return f"QuantizedWeight({self._stored}, shape={shape}, dtype={self.dtype}, device={self.device})"


def _refusal(what: str) -> PlanError:
    return PlanError(
        f"something {what} of a linear that diffaccel quantized, as fusing does (fuse_lora, fuse_qkv_projections): the "
        "change would be lost. Call remove() on the acceleration (after bake(): load the model anew), fuse, then "
        "accelerate again; a LoRA that is loaded without fusing runs beside the quantized weight"
    )

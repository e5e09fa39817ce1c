"""`DiffAccelConfig`: what ``from_pretrained(quantization_config=...)`` takes and a saved ``config.json`` holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from diffaccel.errors import PlanError
from diffaccel.quantization.policy import read_policy
from diffaccel.quantization.register import register
from diffaccel.quantization.section import Quantize


class _Method(str, Enum):  # noqa: UP042  (diffusers compares it with text and reads .value, as of its own str enum)
    DIFFACCEL = "diffaccel"


_SETTINGS = ("sites", "weights", "activations", "group", "float_activations", "rotate", "low_rank", "refine")


class DiffAccelConfig(QuantizationConfigMixin):
    """A diffusers quantization config: small weights and activations, as `Quantize` describes them.

    What needs calibration (``balance``, ``protect``) is not found while a checkpoint is read: `diffaccel.accelerate`
    the model with a calibrated plan, ``bake()`` and save it instead; that loads again like any other.

    >>> PixArtTransformer2DModel.from_pretrained(folder, quantization_config=DiffAccelConfig())  # doctest: +SKIP

    Args:
        sites, weights, activations, group, float_activations, rotate, low_rank, refine: as in `Quantize`. Ignored when
            quantized weights are loaded: those know themselves.
        dtype: what the weights were before, such as ``bfloat16``; written when a model is saved. ``torch_dtype`` of
            ``from_pretrained`` goes before it.
        saved: written when a model is saved: what its layers run, a list of objects, each with the names of its
            ``layers``.
        runtime: ``{"diffusion_step_policy": ...}``, see `diffaccel.quantization.policy`: first and last steps whose
            activations are not rounded. `diffaccel.accelerate` makes the loaded pipeline follow it.
        shape: written when a pruned model is saved: what differs from its config, see `diffaccel.reshape`.

    Raises:
        PlanError: a value that `Quantize` refuses, or a policy that cannot be run.
    """

    def __init__(
        self,
        sites: str = Quantize.sites,
        weights: str = "int8",
        activations: str = "int8",
        group: int | None = None,
        float_activations: str = Quantize.float_activations,
        rotate: bool = False,
        low_rank: int = 0,
        refine: int = 0,
        dtype: str | None = None,
        saved: Sequence[Mapping[str, Any]] = (),
        runtime: Mapping[str, Any] | None = None,
        shape: Mapping[str, Any] | None = None,
        quant_method: str = _Method.DIFFACCEL.value,
    ) -> None:
        self.settings = Quantize(
            sites=sites,
            weights=weights,
            activations=activations,
            group=group,
            float_activations=float_activations,
            rotate=rotate,
            low_rank=low_rank,
            refine=refine,
        )
        if dtype is not None and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
            raise PlanError(f"DiffAccelConfig.dtype must name a torch dtype such as 'bfloat16', got {dtype!r}")
        self.quant_method = _Method(quant_method)
        self.dtype = dtype
        self.saved = [dict(entry) for entry in saved]
        self.shape = dict(shape or {})
        self.policy = read_policy(runtime)
        self.runtime = None if runtime is None else dict(runtime)

    @property
    def weight_dtype(self) -> torch.dtype | None:
        """``dtype`` as torch knows it."""
        return None if self.dtype is None else getattr(torch, self.dtype)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        body = {name: getattr(self.settings, name) for name in _SETTINGS}
        extras = {} if self.runtime is None else {"runtime": self.runtime}
        if self.shape:
            extras["shape"] = self.shape
        return {**body, "dtype": self.dtype, "saved": self.saved, **extras, "quant_method": self.quant_method.value}

    def to_diff_dict(self) -> dict[str, Any]:
        """The same; diffusers logs it."""
        return self.to_dict()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DiffAccelConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"DiffAccelConfig({', '.join(f'{k}={v!r}' for k, v in self.to_dict().items() if k != 'quant_method')})"


register()

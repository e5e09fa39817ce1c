"""The transformers quantizer named ``diffaccel``, for the text encoders of pipelines; `quantizer` is for denoisers."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer

from diffaccel.quantization.config import DiffAccelConfig
from diffaccel.quantization.loading import Loading, dequantize
from diffaccel.quantization.register import register


class EncoderQuantizer(HfQuantizer):
    """Called by ``from_pretrained`` of transformers' models; see `Loading`."""

    quantization_config: DiffAccelConfig

    def __init__(self, quantization_config: DiffAccelConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._single: list[str] = []  # patterns of layers that the model keeps in float32, such as T5's wo
        self._loading = Loading(quantization_config, pre_quantized=self.pre_quantized, dtype=self._dtype)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        plan = model._get_dtype_plan(model.dtype)  # type: ignore[operator]
        self._single = [pattern for pattern, dtype in plan.items() if dtype == torch.float32]
        self._loading.begin(model)
        return model

    def _dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if any(re.search(pattern, name) for pattern in self._single) else dtype

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return self._loading.takes(param_name)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self._loading)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """What is stored stays in the dtype of the file."""
        if any(self._loading.takes(name) for name in converter.target_patterns):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self._loading.finish(model)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        dequantize(model)
        return model


class _Quantize(ConversionOps):
    """Quantizes one weight as it is read."""

    def __init__(self, loading: Loading) -> None:
        self._loading = loading

    def convert(
        self,
        input_dict: dict[str, Any],
        model: nn.Module | None = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        assert model is not None
        for name, value in input_dict.items():
            self._loading.take(model, name, value[0] if isinstance(value, list) else value)
            if missing_keys is not None:
                missing_keys.discard(name)
        return {}


register()

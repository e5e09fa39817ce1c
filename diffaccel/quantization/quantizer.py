"""The diffusers quantizer named ``diffaccel``: quantises while a checkpoint is read, and reads a quantized one."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from diffaccel.quantization.config import DiffAccelConfig
from diffaccel.quantization.layer import SAVED, QuantizedLayer
from diffaccel.quantization.loading import Loading, dequantize
from diffaccel.quantization.policy import StepPolicy
from diffaccel.quantization.register import register
from diffaccel.quantization.saved import describe
from diffaccel.quantization.section import Quantize
from diffaccel.quantization.state_dict import answer_for_weights
from diffaccel.reshape import reshape, shape_of


class DiffAccelQuantizer(DiffusersQuantizer):
    """Called by ``from_pretrained`` of diffusers' models; see `Loading`."""

    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: DiffAccelConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._loading = Loading(
            quantization_config,
            pre_quantized=self.pre_quantized,
            dtype=lambda name, dtype: quantization_config.weight_dtype or dtype if self.pre_quantized else dtype,
        )

    @property
    def _only_pruned(self) -> bool:
        """The checkpoint is in full precision, with layers of other sizes than its config says."""
        return bool(self.quantization_config.shape) and not self.quantization_config.saved

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return self._only_pruned

    @property
    def is_compileable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        reshape(model, self.quantization_config.shape)
        self._loading.begin(model)

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        return self._loading.takes(param_name)

    def check_quantized_param_shape(self, param_name: str, current_param: Tensor, loaded_param: Tensor) -> bool:
        """What stands there before is empty."""
        return True

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device | str,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """diffusers has cast ``param_value`` to the model's dtype, which what is stored must not be."""
        value = state_dict[param_name] if param_name.rpartition(".")[2] in SAVED else param_value
        self._loading.take(model, param_name, value.to(target_device))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self._only_pruned:
            model.is_quantized = False  # type: ignore[assignment]
            return model
        self._loading.finish(model)
        answer_for_weights(model)
        return model

    def _dequantize(self, model: nn.Module) -> nn.Module:
        dequantize(model)
        return model


def mark_quantized(model: nn.Module, settings: Quantize, policy: StepPolicy | None = None) -> None:
    """Make ``save_pretrained`` of a model with quantized linears write what ``from_pretrained`` then reads."""
    layers = [m for m in model.modules() if isinstance(m, QuantizedLayer) and m.parked is None]
    config = DiffAccelConfig(
        sites=settings.sites,
        dtype=min(str(layer.weight_dtype).removeprefix("torch.") for layer in layers),
        saved=describe(model, native=policy is not None),
        runtime=None if policy is None else policy.to_dict(),
        shape=shape_of(model),
    )
    quantizer: Any = DiffAccelQuantizer(config, pre_quantized=True)
    if isinstance(model, ConfigMixin):
        model.register_to_config(quantization_config=config)
        answer_for_weights(model)
    elif hasattr(model, "get_input_embeddings"):  # a text encoder of transformers
        from diffaccel.quantization.encoder_quantizer import EncoderQuantizer

        quantizer = EncoderQuantizer(config, pre_quantized=True)
        model.config.quantization_config = config  # type: ignore[union-attr]
    model.hf_quantizer = quantizer
    model.is_quantized = True  # type: ignore[assignment]
    model.quantization_method = config.quant_method  # type: ignore[assignment]


register()

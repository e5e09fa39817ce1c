"""The diffusers quantizer named ``diffaccel``: quantises while a checkpoint is read, and reads a quantized one."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from diffaccel.denoiser import find_denoisers, select
from diffaccel.errors import ModelError
from diffaccel.kernels.int8_linear import quantize_per_channel
from diffaccel.quantization.config import DiffAccelConfig
from diffaccel.quantization.eligible import keeps_activations, parameter_users, why_not
from diffaccel.quantization.linear import QuantizedLinear, become_linear, become_quantized
from diffaccel.quantization.register import register
from diffaccel.quantization.section import Quantize
from diffaccel.quantization.weight import dequantize_weight, plain


class DiffAccelQuantizer(DiffusersQuantizer):
    """Called by ``from_pretrained``, on a model without memory at first, so that only compressed weights take any."""

    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: DiffAccelConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._saved: list[str] = []
        self._planned: set[str] = set()
        self._weight_only: set[str] = set()

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """The keys tell which layers were saved in compressed form."""
        self._saved = [key.removesuffix(".qweight") for key in loaded_keys if key.endswith(".qweight")]
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        (denoiser,) = find_denoisers(model)
        self._weight_only = {s.name for s in denoiser.layers if keeps_activations(self.quantization_config, s)}
        if self.pre_quantized:
            for name in self._saved:
                layer = model.get_submodule(name)
                if type(layer) is not nn.Linear:
                    raise ModelError(
                        f"{name} was saved as an int8 linear, but is a {type(layer).__name__} in this model"
                    )
                shape = (layer.out_features, layer.in_features)
                dtype = self.quantization_config.weight_dtype or layer.weight.dtype
                qweight, scale = (
                    torch.empty(shape, dtype=torch.int8, device="meta"),
                    torch.empty(shape[0], device="meta"),
                )
                self._become(name, layer, qweight, scale, dtype)
            return
        sites = select([denoiser], self.quantization_config.sites, "layers")
        users = parameter_users([denoiser])
        self._planned = {s.name for s in sites if why_not(s.module, users, loaded=False) is None}

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        owner, _, name = param_name.rpartition(".")
        return (owner in self._planned and name == "weight") or (owner in self._saved and name in ("qweight", "scale"))

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
        owner, _, name = param_name.rpartition(".")
        layer = model.get_submodule(owner)
        if name == "weight":
            qweight, scale = quantize_per_channel(param_value.to(target_device))
            if not scale.isfinite().all():
                raise ModelError(f"{param_name} holds values that are not finite")
            self._become(owner, layer, qweight, scale, param_value.dtype)
        else:  # diffusers has cast the scale to the model's dtype; the file has it in float32
            layer._buffers[name] = state_dict[param_name].to(target_device)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name in self._saved:
            layer = model.get_submodule(name)
            assert isinstance(layer, QuantizedLinear)
            if "meta" in (layer.qweight.device.type, layer.scale.device.type):
                raise ModelError(f"the checkpoint holds only a part of {name}; save the model again")
            dtype = layer.weight_dtype if layer.bias is None else layer.bias.dtype
            qweight, scale = layer.qweight, layer.scale
            become_linear(layer, None)
            self._become(name, layer, qweight, scale, dtype)  # in the form that is fastest here, one layer at a time
        self.quantization_config.dtype = self.quantization_config.dtype or str(model.dtype).removeprefix("torch.")
        return model

    def _become(self, name: str, layer: nn.Module, qweight: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        assert isinstance(layer, nn.Linear)
        with torch.no_grad():
            become_quantized(layer, plain(qweight), scale, dtype, weight_only=name in self._weight_only)

    def _dequantize(self, model: nn.Module) -> nn.Module:
        for layer in model.modules():
            if isinstance(layer, QuantizedLinear):
                weight = dequantize_weight(layer.qweight, layer.scale, layer.weight_dtype)
                become_linear(layer, nn.Parameter(weight, requires_grad=False))
        return model


def mark_quantized(model: nn.Module, settings: Quantize) -> None:
    """Make ``save_pretrained`` of a model with quantized linears write what ``from_pretrained`` then reads."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    config = DiffAccelConfig(
        sites=settings.sites,
        # by name: what was saved may come from several sections
        float_activations=" ".join(f"*.{name}" for name, layer in layers.items() if layer.weight_only),
        dtype=min(str(layer.weight_dtype).removeprefix("torch.") for layer in layers.values()),
    )
    if isinstance(model, ConfigMixin):
        model.register_to_config(quantization_config=config)
    model.hf_quantizer = DiffAccelQuantizer(config, pre_quantized=True)
    model.is_quantized = True  # type: ignore[assignment]
    model.quantization_method = config.quant_method  # type: ignore[assignment]


register()

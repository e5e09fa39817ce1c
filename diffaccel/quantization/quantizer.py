"""The diffusers quantizer named ``diffaccel``: quantises while a checkpoint is read, and reads a quantized one."""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import asdict, replace
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from diffaccel.denoiser import find_denoisers, select
from diffaccel.errors import ModelError
from diffaccel.quantization.config import DiffAccelConfig
from diffaccel.quantization.eligible import form_at, parameter_users, why_not
from diffaccel.quantization.layer import SAVED, QuantizedLayer
from diffaccel.quantization.linear import become_plain, become_quantized
from diffaccel.quantization.policy import PolicyPhase, StepPolicy, runs_under
from diffaccel.quantization.prepare import prepare, runs_of
from diffaccel.quantization.register import register
from diffaccel.quantization.schedule import Schedule
from diffaccel.quantization.scheme import Scheme
from diffaccel.quantization.section import Quantize
from diffaccel.quantization.stored import KINDS, Run


class DiffAccelQuantizer(DiffusersQuantizer):
    """Called by ``from_pretrained``, on a model without memory at first, so that only compressed weights take any."""

    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: DiffAccelConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._saved: dict[str, set[str]] = {}  # layer -> names of its tensors in the file
        self._planned: dict[str, Schedule] = {}
        policy = quantization_config.policy
        self._phase = None if policy is None else PolicyPhase(policy)

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
        """The keys tell which layers were saved in compressed form, and in which."""
        found: defaultdict[str, set[str]] = defaultdict(set)
        for key in loaded_keys:
            owner, _, name = key.rpartition(".")
            if name in SAVED:
                found[owner].add(name)
        known = {name for entry in self.quantization_config.saved for name in entry["layers"]}
        self._saved = {owner: names for owner, names in found.items() if owner in known}
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self.pre_quantized:
            runs = _saved_runs(self.quantization_config)
            for name, names in self._saved.items():
                layer = model.get_submodule(name)
                weight = layer._parameters.get("weight")
                if type(layer) not in (nn.Linear, nn.Conv2d) or weight is None:
                    raise ModelError(
                        f"{name} was saved in quantized form, but is a {type(layer).__name__} in this model"
                    )
                dtype = self.quantization_config.weight_dtype or weight.dtype
                empty = {n: torch.empty(0, device="meta") for n in names | set(_least(runs[name]))}
                become_quantized(layer, [runs[name]], empty, dtype)
            return
        (denoiser,) = find_denoisers(model)
        settings = self.quantization_config.settings
        users = parameter_users([denoiser])
        for site in select([denoiser], settings.sites, "layers"):
            if why_not(site.module, users, settings, loaded=False) is None:
                form = form_at(settings, site)
                self._planned[site.name] = (((0.0, 1.0), form),)

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        owner, _, name = param_name.rpartition(".")
        return (owner in self._planned and name == "weight") or (owner in self._saved and name in SAVED)

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
        owner, _, name = param_name.rpartition(".")
        layer = model.get_submodule(owner)
        if name != "weight":  # diffusers has cast it to the model's dtype; the file has it in its own
            layer._buffers[name] = state_dict[param_name].to(target_device)
            return
        schedule = self._planned[owner]
        with torch.no_grad():
            tensors = prepare(param_value.to(target_device), None, schedule)
            if not all(t.isfinite().all() for t in tensors.values() if t.is_floating_point() and t.itemsize > 1):
                raise ModelError(f"{param_name} holds values that are not finite")
            (run,), _ = runs_of(schedule, param_value.shape)
            self._become(layer, run, tensors, param_value.dtype)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name in self._saved:
            layer = model.get_submodule(name)
            assert isinstance(layer, QuantizedLayer)
            tensors, runs = layer.stored(), layer.runs
            bias = layer._parameters["bias"]
            dtype = layer.weight_dtype if bias is None else bias.dtype
            become_plain(layer, None)
            try:
                complete = all(t.device.type != "meta" for t in tensors.values())
                with torch.no_grad():  # in the form that is fastest here, one layer at a time
                    self._become(layer, runs[0], tensors, dtype)
                    complete = complete and layer.dequantized().shape == layer.weight_shape
            except (KeyError, ValueError, RuntimeError) as error:
                raise ModelError(
                    f"the checkpoint's tensors of {name} do not go together ({error}); save the model again"
                ) from None
            if not complete:
                raise ModelError(f"the checkpoint holds only a part of {name}; save the model again")
        if self._phase is not None:
            warnings.warn(
                "diffaccel: by its step policy this model leaves activations in 16 bits in some steps; "
                "diffaccel.accelerate(pipe, diffaccel.Plan()) follows it, until then no step does",
                stacklevel=2,
            )
        self.quantization_config.saved = _describe(model, native=self._phase is not None)
        self.quantization_config.dtype = self.quantization_config.dtype or str(model.dtype).removeprefix("torch.")
        return model

    def _become(self, layer: nn.Module, run: Run, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        runs = runs_under(self.quantization_config.policy, run)
        become_quantized(layer, runs, tensors, dtype, phase=self._phase if len(runs) > 1 else None)

    def _dequantize(self, model: nn.Module) -> nn.Module:
        for layer in model.modules():
            if isinstance(layer, QuantizedLayer):
                become_plain(layer, nn.Parameter(layer.dequantized(), requires_grad=False))
        return model


def mark_quantized(model: nn.Module, settings: Quantize, policy: StepPolicy | None = None) -> None:
    """Make ``save_pretrained`` of a model with quantized linears write what ``from_pretrained`` then reads."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer) and m.parked is None}
    config = DiffAccelConfig(
        sites=settings.sites,
        dtype=min(str(layer.weight_dtype).removeprefix("torch.") for layer in layers.values()),
        saved=_describe(model, native=policy is not None),
        runtime=None if policy is None else policy.to_dict(),
    )
    if isinstance(model, ConfigMixin):
        model.register_to_config(quantization_config=config)
    model.hf_quantizer = DiffAccelQuantizer(config, pre_quantized=True)
    model.is_quantized = True  # type: ignore[assignment]
    model.quantization_method = config.quant_method  # type: ignore[assignment]


def _describe(model: nn.Module, *, native: bool) -> list[dict[str, Any]]:
    """How the quantized layers run, with their names: what `_saved_runs` reads; ``native``: a policy says the rest."""
    by_run: defaultdict[Run, list[str]] = defaultdict(list)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLayer) and layer.parked is None:
            run = layer.saved_run
            rounding = [r for r in layer.runs if r.suffix == run.suffix and r.scheme.activations != "float"]
            run = rounding[0] if native and rounding else run
            by_run[replace(run, suffix="")].append(name)
    entries = []
    for run, names in by_run.items():
        words = {"kind": run.kind, **asdict(run.scheme), "stored_group": run.group, "rotated": run.rotated}
        entries.append({name: value for name, value in words.items() if value not in (None, False)} | {"layers": names})
    return entries


def _saved_runs(config: DiffAccelConfig) -> dict[str, Run]:
    """Layer -> how it runs. Raises ModelError where config.json says what this version does not know."""
    runs: dict[str, Run] = {}
    for entry in config.saved:
        try:
            scheme = Scheme(entry["weights"], entry["activations"], entry.get("group"))
            run = Run(entry["kind"], scheme, entry.get("stored_group"), entry.get("rotated", False))
            if run.kind not in KINDS:
                raise KeyError(run.kind)
            runs |= dict.fromkeys(entry["layers"], run)
        except (KeyError, TypeError) as error:
            raise ModelError(
                f"config.json's quantization_config has an entry that this diffaccel does not know ({error}): save the "
                "model again with this version, or install the one that wrote it"
            ) from None
    return runs


def _least(run: Run) -> list[str]:
    """Names that no stored weight of this kind lacks."""
    return [name for name in KINDS[run.kind].names if name != "multiplier"]


register()

"""Denoisers whose layers have other sizes than their config says: the record of it, and how to get there.

Pruning changes widths layer by layer, which no diffusers config can say. A *shape record* says it in a few words of
JSON; it travels in the ``quantization_config`` of a saved ``config.json`` (quantizer ``diffaccel``), so that
``from_pretrained`` builds the model as its config says, brings it into this shape, and then reads the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from torch import Tensor, nn

from diffaccel.errors import ModelError

Record = dict[str, Any]
"""``layers``: name -> [outputs, inputs] (a norm: [size]); ``counts``: module -> attribute -> value; ``replaced``: name
-> a stand-in's arguments with its ``kind``; ``roles``: layer -> role, where shapes no longer tell it."""

_MARK = "_diffaccel_shape"
_ROLE = "_diffaccel_role"


class StandIn(nn.Module):
    """Takes the place of a module that was removed."""

    kind: str
    """Its name in shape records."""

    def arguments(self) -> dict[str, Any]:
        """What makes another one, JSON-ready."""
        raise NotImplementedError


class Pass(StandIn):
    """Stands for a removed block: gives what it got.

    Args:
        parameters: names of the removed forward's parameters, in order.
        flow: where in the output (``""`` the output itself, ``"[1]"`` an element) each argument goes.
    """

    kind = "pass"

    def __init__(self, parameters: list[str], flow: Mapping[str, str]) -> None:
        super().__init__()
        self.names, self.flow = list(parameters), dict(flow)

    def arguments(self) -> dict[str, Any]:
        return {"parameters": self.names, "flow": self.flow}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        if "" in self.flow:
            return given[self.flow[""]]
        size = 1 + max(int(where.strip("[]")) for where in self.flow)
        places = [self.flow.get(f"[{i}]") for i in range(size)]  # SD3's last block gives no text: None
        return tuple(None if name is None else given[name] for name in places)


class Zeros(StandIn):
    """Stands for a removed sub-layer: adds nothing to the residual.

    Args:
        features: width of its output; ``added``: of a second one, for the text, where it has one.
        joint: whether it gives a second output when it is called with ``encoder_hidden_states``.
    """

    kind = "zeros"

    def __init__(self, features: int, added: int = 0, *, joint: bool = False, channels_first: bool = False) -> None:
        super().__init__()
        self.features, self.added, self.joint, self.channels_first = features, added, joint, channels_first

    def arguments(self) -> dict[str, Any]:
        return {n: getattr(self, n) for n in ("features", "added", "joint", "channels_first")}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = _first(args, kwargs)
        text = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
        if self.channels_first:
            return x.new_zeros(x.shape[0], self.features, *x.shape[2:])
        zeros = x.new_zeros(*x.shape[:-1], self.features)
        if self.joint and text is not None:
            return zeros, text.new_zeros(*text.shape[:-1], self.added)
        return zeros


class Shortcut(StandIn):
    """Stands for a residual block of a UNet without its residual: what is left is the projection to other channels."""

    kind = "shortcut"

    def __init__(self, channels: list[int] | None, scale: float = 1.0) -> None:
        super().__init__()
        self.channels, self.scale = channels, scale
        self.conv_shortcut = None if channels is None else nn.Conv2d(channels[0], channels[1], 1)

    def arguments(self) -> dict[str, Any]:
        return {"channels": self.channels, "scale": self.scale}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = _first(args, kwargs)
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) / self.scale


class LowRank(StandIn):
    """A linear as the product of two of rank ``rank``."""

    kind = "low_rank"

    def __init__(self, inputs: int, outputs: int, rank: int, *, bias: bool) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=bias)

    def arguments(self) -> dict[str, Any]:
        down, up = self.down, self.up
        inputs, rank, outputs = down.in_features, down.out_features, up.out_features
        return {"inputs": inputs, "outputs": outputs, "rank": rank, "bias": up.bias is not None}

    @property
    def in_features(self) -> int:
        return self.down.in_features

    @property
    def out_features(self) -> int:
        return self.up.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))


STAND_INS: dict[str, Any] = {cls.kind: cls for cls in (Pass, Zeros, Shortcut, LowRank)}


def shape_of(model: nn.Module) -> Record:
    """The shape record of a model; empty for one that is as its config says."""
    return model.__dict__.get(_MARK, {})


def role_of(layer: nn.Module) -> str | None:
    """The role that a layer had before it was cut, or None."""
    return layer.__dict__.get(_ROLE)


def set_role(layer: nn.Module, role: str | None) -> None:
    """Keep the role of a layer whose shape no longer tells it; None forgets it."""
    if role is None:
        layer.__dict__.pop(_ROLE, None)
    else:
        layer.__dict__[_ROLE] = role


def set_shape(model: nn.Module, record: Record | None) -> None:
    """Make ``record`` the model's; empty or None: it is as its config says. Changes nothing else."""
    if record:
        model.__dict__[_MARK] = record
    else:
        model.__dict__.pop(_MARK, None)


def mark_reshaped(model: nn.Module, record: Record) -> None:
    """Make ``save_pretrained`` of a model of another shape write what ``from_pretrained`` then reads.

    A model that is quantized later writes the shape with the rest.
    """
    set_shape(model, record)
    if isinstance(model, ConfigMixin) and record:
        from diffusers.quantizers.auto import DiffusersAutoQuantizer  # takes seconds; it knows our quantizer

        before = model.config.get("quantization_config") or {"quant_method": "diffaccel"}
        words = before if isinstance(before, dict) else before.to_dict()
        quantizer = DiffusersAutoQuantizer.from_config({**words, "shape": record}, pre_quantized=True)
        model.register_to_config(quantization_config=quantizer.quantization_config)
        model.hf_quantizer = quantizer


def merged(before: Record, after: Record) -> Record:
    """The record of a model that had one and was cut again; what a stand-in replaced is not mentioned any more."""
    gone = tuple(f"{name}." for name in after.get("replaced", {}))
    kept = {
        part: {n: v for n, v in before.get(part, {}).items() if not f"{n}.".startswith(gone)} if gone else before[part]
        for part in before
    }
    counts = dict(kept.get("counts", {}))
    for owner, values in after.get("counts", {}).items():
        counts[owner] = {**counts.get(owner, {}), **values}
    both = {p: {**kept.get(p, {}), **after.get(p, {})} for p in ("layers", "replaced", "roles")} | {"counts": counts}
    return {part: values for part, values in both.items() if values}


def reshape(model: nn.Module, record: Record) -> None:
    """Bring a model without weights (on the meta device) into the shape that ``record`` says.

    Raises:
        ModelError: the record is not of this model, or not one that this version knows.
    """
    try:
        for name, arguments in record.get("replaced", {}).items():
            values = {n: v for n, v in arguments.items() if n != "kind"}
            old = model.get_submodule(name)
            with torch.device("meta"):
                new = STAND_INS[arguments["kind"]](**values)
            put(model, name, new.to(_dtype_of(old) or torch.get_default_dtype()))
        for name, size in record.get("layers", {}).items():
            layer = model.get_submodule(name)
            for parameter_name, parameter in layer._parameters.items():
                if parameter is not None:
                    shape = _shape(parameter, size, parameter_name)
                    layer._parameters[parameter_name] = nn.Parameter(
                        torch.empty(shape, dtype=parameter.dtype, device="meta"), requires_grad=parameter.requires_grad
                    )
            set_sizes(layer, size)
        for owner, values in record.get("counts", {}).items():
            for name, value in values.items():
                set_count(model.get_submodule(owner), name, value)
        for name, role in record.get("roles", {}).items():
            set_role(model.get_submodule(name), role)
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise ModelError(
            f"config.json's shape of pruned layers does not fit this model ({error}): save the model again with this "
            "version of diffaccel and diffusers"
        ) from None
    set_shape(model, record)


def _shape(parameter: Tensor, size: list[int], name: str) -> tuple[int, ...]:
    if parameter.ndim == 1:
        return (size[0],)
    inputs = 1 if parameter.ndim > 2 and parameter.shape[1] == 1 else size[1]  # 1: depthwise
    return (size[0], inputs, *parameter.shape[2:])


def sizes_of(layer: nn.Module) -> list[int]:
    """Outputs and inputs of a linear or convolution, the size of a norm or of a module's own vector."""
    if isinstance(layer, nn.Linear):
        return [layer.out_features, layer.in_features]
    if isinstance(layer, nn.modules.conv._ConvNd):
        return [layer.out_channels, layer.in_channels]
    own = [p for p in layer._parameters.values() if p is not None]
    return list(own[0].shape) if own else list(layer.normalized_shape)  # type: ignore[arg-type]


def set_sizes(layer: nn.Module, size: list[int]) -> None:
    """Make the attributes of a layer say what its weights are."""
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = size
    elif isinstance(layer, nn.modules.conv._ConvNd):
        if layer.groups > 1:
            layer.groups = size[0]
        layer.out_channels, layer.in_channels = size
    else:
        for name in ("normalized_shape", "dim"):
            if isinstance(getattr(layer, name, None), tuple | torch.Size):
                setattr(layer, name, type(getattr(layer, name))(size))


def count_of(module: nn.Module, name: str) -> int:
    """An attribute, maybe of the module's processor (``processor.heads``)."""
    owner, name = _holder(module, name)
    return getattr(owner, name)


def set_count(module: nn.Module, name: str, value: int) -> None:
    """The inverse of `count_of`."""
    owner, name = _holder(module, name)
    setattr(owner, name, value)


def _holder(module: nn.Module, name: str) -> tuple[Any, str]:
    return (module.processor, name.removeprefix("processor.")) if name.startswith("processor.") else (module, name)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` at a dotted name."""
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent)._modules[leaf] = module


def _dtype_of(module: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in module.parameters()), None)

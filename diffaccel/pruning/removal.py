"""Physical removal of units: smaller weights in the same module objects, and the way back to the bit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.denoiser import Denoiser
from diffaccel.errors import PlanError
from diffaccel.originals import Originals, Parked
from diffaccel.pruning.groups import Group, Part
from diffaccel.reshape import Record, count_of, put, role_of, set_count, set_role, set_sizes, sizes_of


def why_not(denoiser: Denoiser, groups: Sequence[Group]) -> str | None:
    """Why units of these groups cannot be removed physically, or None."""
    layers = {p.layer: p.module for g in groups for p in (*g.rows, *g.norms, *g.columns)}
    for group in groups:
        if group.stand_in is not None and group.module is not None:
            layers |= {f"{group.name}.{n}": m for n, m in group.module.named_modules() if m._parameters}
    users: defaultdict[int, set[str]] = defaultdict(set)
    for name, module in denoiser.module.named_modules(remove_duplicate=False):
        for parameter_name, parameter in module._parameters.items():
            if parameter is not None:
                users[id(parameter)].add(f"{name}.{parameter_name}")
    for name, layer in layers.items():
        where = f"{denoiser.component}.{name}"
        if "base_layer" in name.split(".") or any("lora_" in n for n, _ in layer.named_children()):
            return f"{where} has a LoRA adapter; merge it (fuse_lora, unload_lora_weights) before pruning"
        for parameter_name, parameter in layer._parameters.items():
            if parameter is None:
                continue
            plain = type(parameter) is nn.Parameter and type(parameter.data) is Tensor
            if not plain and not isinstance(parameter.data, torch._subclasses.FakeTensor):
                return f"{where} is already quantized ({type(parameter.data).__name__}); prune first, then quantize"
            if parameter.device.type == "meta":
                return f"{where} is not in memory (sequential offload); prune first, then enable offloading"
            if len(users[id(parameter)]) > 1:
                return f"{where}.{parameter_name} is shared with {' and '.join(sorted(users[id(parameter)]))}"
        if isinstance(layer, nn.Linear) and layer._parameters.get("weight") is None:
            return f"{where} has no plain weight (already quantized, or a parametrization); prune first"
    return None


def remove_units(
    denoiser: Denoiser, groups: Sequence[Group], kept: Mapping[str, Tensor], originals: Originals, undo: ExitStack
) -> tuple[Record, dict[str, Parked]]:
    """Remove what is not in ``kept``.

    Args:
        groups: of this denoiser.
        kept: group key -> indices of the units that stay, ascending; groups that are not there stay as they are.
        originals: where the original weights wait.
        undo: gets the way back, one step for each change.

    Returns:
        The shape record of what was changed, and the original parameters by name.

    Raises:
        PlanError: see `why_not`, or a group that would lose all of its units and cannot; nothing was changed.
    """
    cut = [g for g in groups if g.key in kept and len(kept[g.key]) < g.units]
    for group in cut:
        if not len(kept[group.key]) and group.stand_in is None:
            raise PlanError(f"{group.key} cannot lose all of its {group.units} units; keep one at least")
    if reason := why_not(denoiser, cut):
        raise PlanError(reason)
    removed = [g for g in cut if len(kept[g.key]) == 0]
    gone = tuple(f"{g.name}." for g in removed if g.stand_in is not None)
    narrowed = [g for g in cut if len(kept[g.key]) and not f"{g.name}.".startswith(gone or "\0")]
    record: Record = {"layers": {}, "counts": {}, "replaced": {}, "roles": {}}
    parked: dict[str, Parked] = {}
    reference = next(denoiser.module.parameters())
    roles = {site.name: site.role for site in denoiser.layers}
    with torch.no_grad():
        for name, (layer, rows, columns) in _slices(narrowed, kept).items():
            _narrow(name, layer, rows, columns, originals, undo, parked)
            record["layers"][name] = sizes_of(layer)
            if name in roles:
                undo.callback(set_role, layer, role_of(layer))
                set_role(layer, roles[name])
                record["roles"][name] = roles[name]
        for group in narrowed:
            for count in group.counts:
                module = denoiser.module.get_submodule(count.owner)
                before = count_of(module, count.name)
                undo.callback(set_count, module, count.name, before)
                value = before - (group.units - len(kept[group.key])) * count.each
                set_count(module, count.name, value)
                record["counts"].setdefault(count.owner, {})[count.name] = value
        for group in removed:
            if any(f"{group.name}.".startswith(g) and f"{group.name}." != g for g in gone):
                continue  # inside another that is removed
            assert group.stand_in is not None
            stand_in = group.stand_in()
            replace_module(denoiser.module, group.name, stand_in, reference, originals, undo, parked)
            record["replaced"][group.name] = {"kind": stand_in.kind, **stand_in.arguments()}
    return {part: values for part, values in record.items() if values}, parked


def _slices(
    groups: Sequence[Group], kept: Mapping[str, Tensor]
) -> dict[str, tuple[nn.Module, Tensor | None, Tensor | None]]:
    """Layer -> the outputs and the inputs that stay; None: all of them."""
    lost: defaultdict[str, dict[int, set[int]]] = defaultdict(lambda: {0: set(), 1: set()})
    modules: dict[str, nn.Module] = {}

    def lose(part: Part, axis: int, group: Group) -> None:
        stays = set(kept[group.key].tolist())
        out = [i for i in range(group.units) if i not in stays]
        modules[part.layer] = part.module
        lost[part.layer][axis] |= set(part.index[out].flatten().tolist())

    for group in groups:
        for part in (*group.rows, *group.norms):
            lose(part, 0, group)
        for part in group.columns:
            lose(part, 1, group)
    found = {}
    for name, layer in modules.items():
        size = sizes_of(layer)
        rows, columns = (
            torch.tensor([i for i in range(size[axis]) if i not in lost[name][axis]]) if lost[name][axis] else None
            for axis in (0, 1)
        )
        found[name] = layer, rows, columns
    return found


def _narrow(
    name: str,
    layer: nn.Module,
    rows: Tensor | None,
    columns: Tensor | None,
    originals: Originals,
    undo: ExitStack,
    parked: dict[str, Parked],
) -> None:
    size = sizes_of(layer)
    depthwise = isinstance(layer, nn.modules.conv._ConvNd) and layer.groups > 1
    undo.callback(set_sizes, layer, size)
    for parameter_name, parameter in list(layer._parameters.items()):
        if parameter is None or (parameter_name == "bias" and rows is None):
            continue
        data = parameter.data
        if rows is not None:
            data = data.index_select(0, rows.to(data.device))
        if columns is not None and data.ndim > 1 and not depthwise:
            data = data.index_select(1, columns.to(data.device))
        place = originals.claim(parameter)
        parked[f"{name}.{parameter_name}"] = place
        undo.callback(_restore, layer, parameter_name, place)
        layer._parameters[parameter_name] = nn.Parameter(data.clone(), requires_grad=parameter.requires_grad)
        place.store()
    outputs = size[0] if rows is None else len(rows)
    inputs = [len(columns)] if columns is not None and len(size) > 1 else size[1:]
    set_sizes(layer, [outputs, outputs] if depthwise else [outputs, *inputs])


def _restore(layer: nn.Module, name: str, place: Parked) -> None:
    now = layer._parameters[name]
    assert now is not None
    layer._parameters[name] = place.restore(now.device, now.dtype)


def replace_module(
    model: nn.Module,
    name: str,
    stand_in: nn.Module,
    reference: nn.Parameter,
    originals: Originals,
    undo: ExitStack,
    parked: dict[str, Parked],
) -> None:
    """Put ``stand_in`` in place of a module, with the parameters that both have."""
    module = model.get_submodule(name)
    stand_in.train(module.training)
    kept = dict(stand_in.named_parameters())
    places = []
    for parameter_name, parameter in module.named_parameters():
        if parameter_name in kept:
            owner, _, leaf = parameter_name.rpartition(".")
            stand_in.get_submodule(owner)._parameters[leaf] = parameter
        else:
            places.append(originals.claim(parameter))
            parked[f"{name}.{parameter_name}"] = places[-1]
    dtype = reference.dtype

    def back() -> None:
        now = next(model.parameters())
        for place in places:
            own = place.parameter.dtype
            place.restore(now.device, own if now.dtype == dtype else now.dtype)
        for buffer_owner in module.modules():
            for buffer_name, buffer in buffer_owner._buffers.items():
                if buffer is not None:
                    buffer_owner._buffers[buffer_name] = buffer.to(now.device)
        module.train(stand_in.training)
        put(model, name, module)

    undo.callback(back)
    put(model, name, stand_in)
    for place in places:
        place.store()


def keep_originals(model: nn.Module, names: Sequence[str], parked: Mapping[str, Parked]) -> Any:
    """While attached, ``state_dict`` and ``save_pretrained`` give the model as it was. Returns the hook's handle.

    Args:
        names: of the original state dict, in its order.
        parked: where its parameters wait, by name.
    """

    def hook(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        found = {name: state.pop(prefix + name, None) for name in names}
        for name in [n for n in state if n.startswith(prefix)]:  # of stand-ins
            if any(name.startswith(f"{prefix}{n.rpartition('.')[0]}.") for n in parked):
                del state[name]
        for name, tensor in found.items():
            if name in parked:
                tensor = parked[name].read().detach()
            if tensor is not None:
                state[prefix + name] = tensor

    return model.register_state_dict_post_hook(hook)

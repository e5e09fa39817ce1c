"""What can be cut out of a denoiser, and which rows and columns go together.

A *group* holds units that are alike: the heads of an attention module, the hidden neurons of a feed-forward, or, as a
group of one unit, a sub-layer or a block. It says which slices of which layers belong to each unit, so that the same
description serves for masking a unit (its columns in the layers that read it are multiplied) and for removing it.
Groups follow from the roles and shapes of linears (see `diffaccel.denoiser`), not from classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from diffaccel.denoiser import Denoiser
from diffaccel.reshape import StandIn

KINDS = ("heads", "neurons", "sublayer", "resnet", "block")


@dataclass(frozen=True, eq=False)
class Part:
    """The slices of one layer that belong to the units of a group.

    Attributes:
        layer: dotted name inside the denoiser.
        module: that layer: a linear, a convolution, or a norm.
        index: which outputs (or inputs) of the layer, int64 [units, width].
    """

    layer: str
    module: nn.Module = field(repr=False)
    index: Tensor = field(repr=False)


@dataclass(frozen=True)
class Count:
    """An attribute that a forward reads, ``each`` times the number of units; ``owner`` is a module's dotted name.

    ``name`` may be ``processor.heads``.
    """

    owner: str
    name: str
    each: int


@dataclass(frozen=True, eq=False)
class Group:
    """Units that can be cut.

    Attributes:
        kind: see `KINDS`.
        name: of the module that the units are in, dotted, inside the denoiser.
        units: how many there are.
        rows: layers whose outputs belong to units.
        norms: norms over all units of the group (Wan's of queries and keys): without a unit, their statistics change.
        columns: layers whose inputs belong to units: here a mask acts.
        counts: attributes that must follow.
        outputs: for a group of one unit, the layers whose whole output is its contribution.
        flow: for a block, where in its output each of its arguments goes on, see `diffaccel.reshape.Pass`.
        parameters: for a block, the names of its forward's parameters.
        stand_in: for a group of one unit, what takes its place.
    """

    kind: str
    name: str
    units: int
    rows: tuple[Part, ...] = ()
    norms: tuple[Part, ...] = ()
    columns: tuple[Part, ...] = ()
    counts: tuple[Count, ...] = ()
    outputs: tuple[str, ...] = ()
    flow: Mapping[str, str] | None = None
    parameters: tuple[str, ...] = ()
    stand_in: Callable[[], StandIn] | None = field(default=None, repr=False)
    module: nn.Module | None = field(default=None, repr=False)

    @property
    def key(self) -> str:
        """Its name among all groups of a denoiser."""
        return f"{self.kind}:{self.name}"

    @property
    def parameters_each(self) -> int:
        """Weights and biases that a unit holds."""
        if self.module is not None and self.stand_in is not None:
            left = sum(p.numel() for p in self.stand_in().parameters())
            return sum(p.numel() for p in self.module.parameters()) - left
        return sum(_weights(part, 0) for part in (*self.rows, *self.norms)) + sum(_weights(p, 1) for p in self.columns)


def groups_of(denoiser: Denoiser, kinds: Sequence[str] = ("heads", "neurons")) -> tuple[Group, ...]:
    """The groups of these ``kinds`` (heads and neurons here, see `blocks` for the others), in order of the modules."""
    found: list[Group] = []
    if "heads" in kinds:
        found += _heads(denoiser)
    if "neurons" in kinds:
        found += _neurons(denoiser)
    order = {name: i for i, (name, _) in enumerate(denoiser.module.named_modules())}
    return tuple(sorted(found, key=lambda group: order[group.name]))


def _weights(part: Part, axis: int) -> int:
    weight = getattr(part.module, "weight", None)
    if not isinstance(weight, Tensor):  # a vector of the module's own, or a norm without gains
        return part.index.shape[1] * sum(p is not None for p in part.module._parameters.values())
    if weight.ndim == 1:  # a norm
        return part.index.shape[1] * (1 if getattr(part.module, "bias", None) is None else 2)
    each = weight.numel() // weight.shape[axis] if weight.shape[axis] else 0
    return part.index.shape[1] * (each + (axis == 0 and getattr(part.module, "bias", None) is not None))


# --- heads -----------------------------------------------------------------------------------------------------------

_HEADS = ("heads", "num_heads", "n_heads", "num_attention_heads", "sliceable_head_dim")
_KV_HEADS = ("num_kv_heads", "kv_heads", "n_kv_heads", "num_key_value_heads")
_WIDTHS = ("inner_dim", "inner_kv_dim", "kv_inner_dim", "hidden_size", "out_dim")


def _heads(denoiser: Denoiser) -> Iterator[Group]:
    groups = [g for site in denoiser.attentions if (g := _heads_of(denoiser, site.name, site.module)) is not None]
    # Lumina adds up the heads of two attentions before one output projection: they are cut together.
    unread = [group for group in groups if not group.columns]
    for group in groups:
        mates = [g for g in unread if _parent(g.name) == _parent(group.name)]
        if group.columns and mates:
            if any(m.units != group.units or _head_width(m) != _head_width(group) for m in mates):
                continue
            together = [group, *mates]
            yield replace(
                group,
                rows=tuple(p for g in together for p in g.rows),
                norms=tuple(p for g in together for p in g.norms),
                counts=tuple(c for g in together for c in g.counts),
            )
        elif group.columns:
            yield group


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _head_width(group: Group) -> int:
    return group.rows[0].index.shape[1]


def _heads_of(denoiser: Denoiser, name: str, module: nn.Module) -> Group | None:
    """The heads of one attention module, without columns where nothing reads them; None where they cannot be told."""
    heads = next((c for n in _HEADS if isinstance(c := getattr(module, n, None), int)), None)
    layers = {s.name: (s.role.partition(".")[2], s.module) for s in denoiser.layers if s.name.startswith(name + ".")}
    by_part: dict[str, list[tuple[str, nn.Module]]] = {}
    for layer_name, (part, layer) in layers.items():
        by_part.setdefault(part.removeprefix("added_"), []).append((layer_name, layer))
    packed = [(n, layer) for n, (part, layer) in layers.items() if part == "in" and "qkv" in n.rpartition(".")[2]]
    sizes = _head_sizes(module, heads, by_part, packed=bool(packed)) if heads else None
    if heads is None or sizes is None:
        return None
    inner, kv_inner = sizes
    width = inner // heads
    kv_heads = kv_inner // width
    units, each = kv_heads, heads // kv_heads * width  # query heads that share a key are one unit
    rows = [Part(n, layer, spans(units, each)) for n, layer in by_part.get("q", []) if _outputs(layer) == inner]
    rows += [Part(n, layer, spans(units, each, repeats=3)) for n, layer in [*by_part.get("qkv", []), *packed]]
    for n, layer in [*by_part.get("k", []), *by_part.get("v", [])]:
        repeats = _outputs(layer) // kv_inner
        if repeats not in (1, 2) or _outputs(layer) % kv_inner:
            return None
        rows.append(Part(n, layer, spans(units, width, repeats=repeats)))
    for n, layer in by_part.get("", []):  # a gate beside the attention
        if "gate" in n.rpartition(".")[2] and _outputs(layer) in (inner, heads):
            rows.append(Part(n, layer, spans(units, _outputs(layer) // units)))
    readers = [(n, layer) for n, layer in by_part.get("out", []) if _inputs(layer) >= inner]
    if not readers:
        readers = list(_reader_outside(denoiser, name, inner))
    if any(_inputs(layer) != inner and not packed and "out" in by_part for _, layer in readers):
        return None
    columns = [Part(n, layer, spans(units, each)) for n, layer in readers]
    norms = [Part(f"{name}.{n}", norm, spans(units, s // units)) for n, norm, s in _wide_norms(module, inner, kv_inner)]
    block = denoiser.module.get_submodule(_parent(name))
    if any(p is not None and tuple(p.shape) == (heads,) for p in block._parameters.values()):  # Lumina's gate of heads
        rows.append(Part(_parent(name), block, spans(units, heads // units)))
    counts = [
        *_counts(name, module, _HEADS, heads, heads // units),
        *_counts(name, module, _KV_HEADS, kv_heads, 1),
        *_counts(name, module, _WIDTHS, inner, each),
    ]
    if kv_inner != inner:
        counts += _counts(name, module, _WIDTHS, kv_inner, width)
    return Group("heads", name, units, tuple(rows), tuple(norms), tuple(columns), tuple(counts))


def _head_sizes(
    module: nn.Module, heads: int, by_part: Mapping[str, Sequence[tuple[str, nn.Module]]], *, packed: bool
) -> tuple[int, int] | None:
    """Widths of all queries and of all keys; None where they do not make that many heads."""
    if by_part.get("q"):
        inner = kv_inner = _outputs(by_part["q"][0][1])
        if by_part.get("k"):  # one projection of keys and values where there is none of values
            kv_inner = _outputs(by_part["k"][0][1]) // (1 if by_part.get("v") else 2)
    elif by_part.get("qkv"):
        inner = kv_inner = _outputs(by_part["qkv"][0][1]) // 3
    else:
        inner = kv_inner = getattr(module, "inner_dim", 0) if packed else 0
    if not inner or inner % heads or kv_inner % (inner // heads):
        return None
    kv_heads = kv_inner // (inner // heads)
    return (inner, kv_inner) if kv_heads and heads % kv_heads == 0 else None


def _reader_outside(denoiser: Denoiser, name: str, inner: int) -> Iterator[tuple[str, nn.Module]]:
    """The layer of the block that reads the attention's heads, and after them its neurons (FLUX's single blocks)."""
    siblings = [s for s in denoiser.layers if _parent(s.name) == _parent(name)]
    hidden = sum(_outputs(s.module) for s in siblings if s.role == "fused.in")
    for site in siblings:
        if site.role == "fused.out" and _inputs(site.module) - inner in (hidden, hidden // 2):
            yield site.name, site.module


def _wide_norms(module: nn.Module, inner: int, kv_inner: int) -> Iterator[tuple[str, nn.Module, int]]:
    """Norms of queries and keys over all heads at once: name, module, size."""
    for name, child in module.named_children():
        words = name.lower().split("_")
        if not {"q", "k", "query", "key"} & set(words) or isinstance(child, nn.Linear | nn.modules.conv._ConvNd):
            continue
        weight = getattr(child, "weight", None)
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else getattr(child, "normalized_shape", None)
        head = getattr(module, "head_dim", None)
        if shape is not None and len(shape) == 1 and shape[0] in (inner, kv_inner) and shape[0] != head:
            yield name, child, shape[0]


def _counts(owner: str, module: nn.Module, names: Iterable[str], value: int, each: int) -> list[Count]:
    found = []
    for prefix, thing in (("", module), ("processor.", getattr(module, "processor", None))):
        for name in names:
            own = vars(thing).get(name) if thing is not None and hasattr(thing, "__dict__") else None
            if own == value and not isinstance(own, bool):
                found.append(Count(owner, prefix + name, each))
    return found


# --- neurons ---------------------------------------------------------------------------------------------------------

_READS = ("ff.out", "fused.out", "attn.out", "conv")


def _neurons(denoiser: Denoiser) -> Iterator[Group]:
    for site in denoiser.layers:
        inside = site.role != "conv" or {"ff", "feed_forward", "mlp"} & set(site.name.split("."))
        if site.role in _READS and inside and (group := _neurons_before(denoiser, site.name, site.module, site.role)):
            yield group


def _neurons_before(denoiser: Denoiser, name: str, reader: nn.Module, role: str) -> Group | None:
    """The neurons that ``reader`` gets, alone or after the heads of an attention; None where that cannot be told."""
    block = next((b for b, _ in denoiser.blocks if name.startswith(b + ".")), "")
    parent = _parent(name)
    while True:
        inside = [s for s in denoiser.layers if s.name.startswith(parent + ".") and s.name != name]
        writers = [s for s in inside if s.role in ("ff.in", "fused.in") or (s.role == "conv" and "conv" in name)]
        if writers or parent == block or not parent:
            break
        parent = _parent(parent)
    packed = [s for s in writers if "qkv" in s.name.rpartition(".")[2]]
    if not writers or not parent or (role == "attn.out" and not packed):
        return None
    owner = denoiser.module.get_submodule(parent)
    before = 0
    if any(s.role == "fused.in" for s in writers):
        width = _attention_width(denoiser, parent)
        if width is None:
            return None
        before = width
        offset = 3 * before if packed else 0
    else:
        offset = 0
    hidden = _inputs(reader) - before
    order = [s.name for s in denoiser.layers]
    gated = [s for s in writers if _outputs(s.module) - offset == 2 * hidden and s.role != "conv"]
    if len(gated) > 1:  # one of them is something else of that size: modulation, say, which comes later
        earlier = [s for s in gated if order.index(s.name) < order.index(name)]
        writers = earlier[-1:]
    rows, taken = [], {id(reader)}
    for site in writers:
        outputs, depthwise = _outputs(site.module) - offset, getattr(site.module, "groups", 1) > 1
        if outputs not in (hidden, 2 * hidden) or (depthwise and site.module.groups != outputs):
            return None
        rows.append(Part(site.name, site.module, spans(hidden, 1, repeats=outputs // hidden, offset=offset)))
        taken.add(id(site.module))
    # Whatever else has a size for each neuron is a norm over them or another reader: they do not stand alone.
    for module in owner.modules():
        if id(module) not in taken and not (before and _is_inside_attention(denoiser, module)):
            for parameter in module._parameters.values():
                if parameter is not None and {hidden, 2 * hidden} & set(parameter.shape) and parent != block:
                    return None
    rival = [s for s in inside if s.role in ("ff.out", "fused.out") and _inputs(s.module) == _inputs(reader)]
    if rival or hidden < 1:
        return None
    widths = [n for n, v in vars(owner).items() if v == hidden and type(v) is int and ("hidden" in n or "mlp" in n)]
    counts = tuple(Count(parent, n, 1) for n in widths)
    columns = (Part(name, reader, spans(hidden, 1, offset=before)),)
    return Group("neurons", _caller(denoiser, parent), hidden, tuple(rows), (), columns, counts)


def _attention_width(denoiser: Denoiser, parent: str) -> int | None:
    """How many inputs the reader of a fused block gets from its attention, which come first."""
    for site in denoiser.attentions:
        if parent in (site.name, _parent(site.name)):
            group = _heads_of(denoiser, site.name, site.module)
            return None if group is None or not group.columns else group.columns[0].index.numel()
    return None


def _is_inside_attention(denoiser: Denoiser, module: nn.Module) -> bool:
    return any(module is inner for site in denoiser.attentions for inner in site.module.modules())


def _caller(denoiser: Denoiser, name: str) -> str:
    """The module that is called: not a list inside it."""
    while isinstance(denoiser.module.get_submodule(name), nn.ModuleList | nn.Sequential) and "." in name:
        name = _parent(name)
    return name


# --- indices ---------------------------------------------------------------------------------------------------------


def spans(units: int, width: int, *, repeats: int = 1, offset: int = 0) -> Tensor:
    """Indices of ``units`` consecutive spans of ``width``, again in each of ``repeats`` equal stretches, [units, n]."""
    one = torch.arange(units * width).view(units, width) + offset
    return torch.cat([one + i * units * width for i in range(repeats)], 1)


def _outputs(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels  # type: ignore[return-value]


def _inputs(layer: nn.Module) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels  # type: ignore[return-value]

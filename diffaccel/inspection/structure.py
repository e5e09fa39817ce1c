"""What an inspection holds, as data; and the part of it that needs no run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

from torch import nn

from diffaccel.denoiser import Denoiser, unwrap_compiled
from diffaccel.inspection.weights import module_bytes

ATTENTION = "attention"
"""The row of the attention calls themselves: softmax(QK')V, which has no parameters."""
REST = "rest"
"""The row of everything else: norms, activations, rotary embeddings, tables."""


@dataclass(frozen=True)
class Share:
    """What a role or a component has of a model.

    Attributes:
        name: a role of `diffaccel.sites`, ``attention``, ``rest``, or a component of the pipeline.
        modules: number of layers behind it.
        parameters, bytes: of its weights.
        flops: multiplications and additions, 2 for each pair, over the whole run; 0 without a run.
        seconds: measured over the whole run; 0 without one.
    """

    name: str
    modules: int
    parameters: int
    bytes: int
    flops: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class SiteInfo:
    """A linear or convolution."""

    name: str
    role: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class AttentionCalls:
    """Attention calls of one kind.

    Attributes:
        sites: names of the modules that make them.
        role: ``attn`` (self or joint) or ``cross``.
        calls: how many in one call of the denoiser.
        batch, heads, queries, keys, width: their shape; ``width`` is that of a head.
        masked: with an attention mask (a causal one counts).
        layout: how the tokens lie, as far as that is known.
    """

    sites: tuple[str, ...]
    role: str
    calls: int
    batch: int
    heads: int
    queries: int
    keys: int
    width: int
    masked: bool
    layout: str = ""


@dataclass(frozen=True)
class DenoiserInfo:
    """One denoiser.

    Attributes:
        component, class_name: where it stands in the pipeline, and what it is.
        blocks: class of the repeated blocks -> their names in order of execution.
        sites: every linear and convolution.
        roles: its shares, those of the sites' roles first, then ``attention`` and ``rest``.
        attention: the kinds of attention calls that really happened; empty without a run.
        calls: how often it was called in the run.
    """

    component: str
    class_name: str
    blocks: Mapping[str, tuple[str, ...]]
    sites: tuple[SiteInfo, ...] = field(repr=False)
    roles: tuple[Share, ...]
    attention: tuple[AttentionCalls, ...] = ()
    calls: int = 0


@dataclass(frozen=True)
class Inspection:
    """What a model consists of. ``rich.print(inspection)`` shows a tree; `diffaccel.inspection.draw` a picture.

    Attributes:
        model: class of the pipeline or denoiser.
        denoisers: each in detail.
        components: the pipeline's networks.
        phases: seconds of the run before, in and after the denoising loop (``text encoding``, ``denoising``,
            ``decoding``); empty without a run of a pipeline.
        run: the arguments of the run in words; None where there was none.
        notes: what a reader must know, such as why there was no run.
    """

    model: str
    denoisers: tuple[DenoiserInfo, ...]
    components: tuple[Share, ...]
    phases: Mapping[str, float]
    run: str | None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def __rich__(self) -> Any:
        from diffaccel.inspection.render import tree

        return tree(self)


def component_share(name: str, module: nn.Module, flops: int = 0, seconds: float = 0.0) -> Share:
    """A whole network."""
    module = unwrap_compiled(module)
    layers = sum(1 for m in module.modules() if not any(True for _ in m.children()))
    return Share(name, layers, sum(p.numel() for p in module.parameters()), module_bytes(module), flops, seconds)


def denoiser_info(
    denoiser: Denoiser,
    flops: Mapping[str, int] | None = None,
    seconds: Mapping[str, float] | None = None,
    attention: tuple[AttentionCalls, ...] = (),
    calls: int = 0,
) -> DenoiserInfo:
    """Structure, with the figures of a run by role where there was one."""
    flops, seconds = flops or {}, seconds or {}
    by_role: dict[str, list[nn.Module]] = {}
    for site in denoiser.layers:
        by_role.setdefault(site.role, []).append(site.module)
    owned = {id(t) for site in denoiser.layers for t in site.module.parameters()}
    others = [p for p in denoiser.module.parameters() if id(p) not in owned]
    roles = [
        Share(
            role,
            len(modules),
            sum(p.numel() for m in modules for p in m.parameters()),
            sum(module_bytes(m) for m in modules),
            flops.get(role, 0),
            seconds.get(role, 0.0),
        )
        for role, modules in by_role.items()
    ]
    roles.append(
        Share(ATTENTION, sum(a.calls for a in attention), 0, 0, flops.get(ATTENTION, 0), seconds.get(ATTENTION, 0.0))
    )
    buffers = sum(b.nbytes for b in denoiser.module.buffers())
    rest_bytes = sum(p.nbytes for p in others) + buffers
    roles.append(Share(REST, 0, sum(p.numel() for p in others), rest_bytes, flops.get(REST, 0), seconds.get(REST, 0.0)))
    blocks: dict[str, tuple[str, ...]] = {}
    for name, block in denoiser.blocks:
        kind = type(block).__name__
        blocks[kind] = (*blocks.get(kind, ()), name)
    sites = tuple(SiteInfo(s.name, s.role, _weight_shape(s.module)) for s in denoiser.layers)
    return DenoiserInfo(
        denoiser.component, type(denoiser.module).__name__, blocks, sites, tuple(roles), attention, calls
    )


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    weight = next(
        chain((p for n, p in module.named_parameters(recurse=False) if n == "weight"), module.parameters()), None
    )
    return () if weight is None else tuple(weight.shape)

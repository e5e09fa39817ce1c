"""The denoiser: the network called once or twice per step, described by its structure.

Nothing here keys on a class. Repeated blocks, attention modules and the roles of linears and convolutions follow from
the module tree, the names that the field uses for projections, and shapes. What a name cannot tell (which attention
calls really happen, how their tokens lie) the attention technique learns from the first real call.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from diffaccel.errors import ModelError, PlanError
from diffaccel.reshape import role_of
from diffaccel.sites import SitePattern


@dataclass(frozen=True, eq=False)
class Site:
    """A linear or convolution, or (``role`` ``attn`` or ``cross``) a module that makes attention calls.

    ``name`` is dotted and relative to the component; for the root it is empty.
    """

    component: str
    name: str
    role: str
    module: nn.Module = field(repr=False)

    @property
    def full_name(self) -> str:
        return f"{self.component}.{self.name}" if self.name else self.component


@dataclass(frozen=True, eq=False)
class Denoiser:
    """One denoising network of a pipeline, or a bare one.

    Args:
        component: its name in the pipeline, such as ``transformer_2``.
        module: the network itself, never a `torch.compile` wrapper.
        blocks: names and modules of the repeated blocks in execution order; empty for networks without any.
        layers: every linear and convolution.
        attentions: modules inside which attention calls happen, innermost first known by structure; a repeated block
            stands for itself where no projection names give an attention module away.
    """

    component: str
    module: nn.Module
    blocks: tuple[tuple[str, nn.Module], ...] = field(repr=False)
    layers: tuple[Site, ...] = field(repr=False)
    attentions: tuple[Site, ...] = field(repr=False)

    @classmethod
    def of(cls, module: nn.Module, component: str) -> Denoiser:
        """Describe ``module`` by its structure. Unwraps ``torch.compile``."""
        module = unwrap_compiled(module)
        attention_names = _attention_modules(module)
        blocks = _repeated_blocks(module, attention_names)
        layers = tuple(
            Site(component, name, role_of(layer) or role, layer)
            for name, layer, role in _layers(module, attention_names, blocks)
        )
        by_name = dict(module.named_modules())
        attentions = [
            Site(component, name, "cross" if _is_cross(name, by_name[name]) else "attn", by_name[name])
            for name in attention_names
        ]
        hidden = [(name, block) for name, block in blocks if not any(_inside(a, name) for a in attention_names)]
        attentions += [Site(component, name, "attn", block) for name, block in hidden]
        if not attentions and not blocks:
            attentions = [Site(component, "", "attn", module)]
        return cls(component, module, tuple(blocks), layers, tuple(attentions))

    @property
    def config(self) -> dict[str, Any]:
        """The config (of diffusers, or of transformers) as a plain dict; empty for a module without one."""
        config = getattr(self.module, "config", None) or {}
        return dict(config.to_dict() if hasattr(config, "to_dict") else config)

    @property
    def heads(self) -> tuple[int, ...]:
        """Sorted distinct head counts of the attention modules (identity of the model for plans)."""
        counts = (
            attribute_of(site.module, "heads", "num_heads", "n_heads", "num_attention_heads")
            for site in self.attentions
        )
        return tuple(sorted({c for c in counts if isinstance(c, int)}))


def select(denoisers: Iterable[Denoiser], sites: str, kind: str, encoders: Iterable[Denoiser] = ()) -> list[Site]:
    """The ``layers`` or ``attentions`` (``kind``) that a pattern names, over all denoisers and the encoders it names.

    Raises:
        PlanError: the pattern matches none of them; the message lists the roles that exist.
    """
    pattern = SitePattern(sites)
    networks = [*denoisers, *(encoder for encoder in encoders if pattern.names(encoder.component))]
    all_sites = [site for network in networks for site in getattr(network, kind)]
    chosen = [site for site in all_sites if pattern.matches(site.role, site.component, site.name)]
    if not chosen:
        roles = Counter(site.role for site in all_sites)
        there = ", ".join(f"{role} ({n})" for role, n in sorted(roles.items())) or "none at all"
        raise PlanError(f"sites={sites!r} matches none of this model's {kind}; roles present: {there}")
    return chosen


def find_denoisers(model: Any) -> tuple[Denoiser, ...]:
    """The denoisers of a pipeline (classic or modular), or the one that a bare module is.

    A component is a denoiser when it is a network whose forward takes a timestep and no control image, or when
    diffusers' naming says so (``transformer*``, ``unet*``).

    Raises:
        ModelError: ``model`` is neither, or holds no denoiser.
    """
    if isinstance(model, nn.Module):
        inner = unwrap_compiled(model)
        return (Denoiser.of(inner, "unet" if hasattr(inner, "down_blocks") else "transformer"),)
    components = getattr(model, "components", None)
    if not isinstance(components, dict):
        raise ModelError(
            f"expected a diffusers pipeline or a denoiser module, got {type(model).__name__}; "
            "load one with DiffusionPipeline.from_pretrained(...) or diffaccel.pipelines.load(...)"
        )
    found = []
    for name, component in components.items():
        if isinstance(component, nn.Module):
            module = unwrap_compiled(component)
            named_so = name.startswith(("transformer", "unet"))
            if (named_so or _takes_timestep(module)) and next(module.parameters(), None) is not None:
                found.append(Denoiser.of(module, name))
    if not found:
        names = ", ".join(f"{n} ({type(c).__name__})" for n, c in components.items() if c is not None)
        raise ModelError(f"{type(model).__name__} holds no denoiser; its components are: {names}")
    return tuple(found)


def find_encoders(model: Any) -> tuple[Denoiser, ...]:
    """The networks of transformers in a pipeline, such as text encoders, described like denoisers; none in a module."""
    components = {} if isinstance(model, nn.Module) else getattr(model, "components", {})
    found = []
    for name, component in components.items():
        module = unwrap_compiled(component) if isinstance(component, nn.Module) else None
        if module is not None and hasattr(module, "get_input_embeddings") and not _takes_timestep(module):
            found.append(Denoiser.of(module, name))
    return tuple(found)


def unwrap_compiled(module: nn.Module) -> nn.Module:
    """The module behind ``torch.compile(module)``; any other module unchanged."""
    inner = module.__dict__.get("_orig_mod") or module._modules.get("_orig_mod")
    return inner if isinstance(inner, nn.Module) else module


def attribute_of(module: nn.Module, *names: str) -> Any:
    """The first of ``names`` that is an attribute of ``module``, or None."""
    return next((getattr(module, n) for n in names if getattr(module, n, None) is not None), None)


def timestep_parameter(module: nn.Module) -> str | None:
    """Name of the forward parameter that carries the timestep, or None."""
    parameters = inspect.signature(module.forward).parameters
    exact = [n for n in parameters if n in ("timestep", "timesteps", "t", "sigma")]
    return next(iter(exact or [n for n in parameters if "timestep" in n and "cond" not in n]), None)


def _takes_timestep(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters
    return timestep_parameter(module) is not None and not any("controlnet_cond" in p for p in parameters)


# --- structure -------------------------------------------------------------------------------------------------------

_Q = re.compile(r"(to_)?(q|query|wq)(_proj|_linear|_img|_t)?")
_K = re.compile(r"(to_)?(k|key|wk)(_proj|_linear|_img|_t|_ip)?")
_V = re.compile(r"(to_)?(v|value|wv)(_proj|_linear|_img|_t|_ip)?")
_QKV = re.compile(r"(.*_)?(w?qkv|kv)(_.*)?|in_proj|query_key_value", re.IGNORECASE)
_ADDED = re.compile(r"(to_)?add(ed)?_?(q|k|v|qkv|kv|out)(_proj)?|to_add_out")
_OUT = re.compile(r"(to_)?out(_proj|_layer|_t)?|o|o_proj|proj_attn|wo|.*attn_proj|proj|proj_out|linear_out")
_MODULATION = re.compile(
    r"(^|[._])(ada|adaln|norm\w*|mod|modulation|\w*modulation|time_emb_proj|temb\w*|gate_layer)", re.IGNORECASE
)
_FINAL = re.compile(
    r"^(proj_out|norm_out|conv_out|out|head|lm_head|last|unpatch|project_from|to_logits)|(^|[._])final", re.IGNORECASE
)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _leaf(name: str) -> str:
    """Last part of a dotted name that says something: neither an index nor a LoRA wrapper's ``base_layer``."""
    return next((p for p in reversed(name.split(".")) if not p.isdigit() and p not in ("base_layer", "linear")), name)


def _inside(name: str, parent: str) -> bool:
    return not parent or name == parent or name.startswith(parent + ".")


def _plain_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_modules():
        if isinstance(child, (nn.Linear, *_CONVS)) and "lora_" not in name:
            yield name, child


def _attention_modules(module: nn.Module) -> list[str]:
    """Names of the modules that own query projections (or a fused qkv) as direct children."""
    found: dict[str, None] = {}
    for name, layer in _plain_layers(module):
        path = name.removesuffix(".base_layer").split(".")
        leaf, parent = path[-1], ".".join(path[:-1])
        fused = _QKV.fullmatch(leaf) and "mapper" not in leaf and not _ADDED.fullmatch(leaf)
        if leaf == "in_proj":  # a name that others use too
            fused = _is_qkv_shaped(layer)
        if _Q.fullmatch(leaf) or fused:
            found[parent] = None
    return list(found)


def _repeated_blocks(module: nn.Module, attention_names: list[str]) -> list[tuple[str, nn.Module]]:
    """Innermost list elements that hold attention; else the elements of the outermost lists that hold two layers."""
    lists = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.ModuleList)]
    elements = [(f"{n}.{i}" if n else str(i), e) for n, m in lists for i, e in enumerate(m)]
    owning = [(n, e) for n, e in elements if any(_inside(a, n) for a in attention_names)]
    if owning:
        names = [n for n, _ in owning]
        return [(n, e) for n, e in owning if not any(other != n and _inside(other, n) for other in names)]
    layered = [(n, e) for n, e in elements if sum(1 for _ in _plain_layers(e)) >= 2]
    names = [n for n, _ in layered]
    return [(n, e) for n, e in layered if not any(other != n and _inside(n, other) for other in names)]


def _is_cross(name: str, module: nn.Module) -> bool:
    declared = getattr(module, "is_cross_attention", None)
    if declared is False:  # a declared True may only mean fewer key heads, so look on
        return False
    q = next((c for n, c in module.named_children() if _Q.fullmatch(n)), None)
    k = next((c for n, c in module.named_children() if _K.fullmatch(n)), None)
    if isinstance(q, nn.Linear) and isinstance(k, nn.Linear) and q.in_features != k.in_features:
        return True
    return bool(re.search(r"(attn2|cross)", name))


def _layers(
    module: nn.Module, attention_names: list[str], blocks: list[tuple[str, nn.Module]]
) -> Iterator[tuple[str, nn.Module, str]]:
    by_name = dict(module.named_modules())
    owners = sorted(attention_names, key=len, reverse=True)
    block_names = sorted((n for n, _ in blocks), key=len, reverse=True)
    for name, layer in _plain_layers(module):
        owner = next((a for a in owners if _inside(name, a)), None)
        block = next((b for b in block_names if _inside(name, b)), None)
        inner = name if block is None else name.removeprefix(block + ".")
        if isinstance(layer, _CONVS):
            role = _conv_role(name)
        elif _MODULATION.search(inner):
            role = "modulation"
        elif block is None:
            role = "final" if _FINAL.search(name) else _loose_role(name, layer, by_name)
        elif owner is not None and (role_ := _attention_role(_leaf(name), _is_cross(owner, by_name[owner]))):
            role = role_
        else:
            role = _block_role(inner, layer, by_name[block])
        yield name, layer, role


def _conv_role(name: str) -> str:
    leaf = _leaf(name)
    if "shortcut" in leaf or "skip" in leaf:
        return "skip"
    if _FINAL.search(name):
        return "final"
    return "embed" if re.search(r"embed|patch|^conv_in|^proj_in", name) else "conv"


def _attention_role(leaf: str, cross: bool) -> str | None:
    kind = "cross" if cross else "attn"
    if "mlp" in leaf:
        return "fused.in"
    if match := _ADDED.fullmatch(leaf):
        part = match.group(3) or "out"
        return f"attn.added_{'k' if part in ('kv', 'qkv') else part}"
    for pattern, part in ((_Q, "q"), (_K, "k"), (_V, "v")):
        if pattern.fullmatch(leaf):
            return f"{kind}.{part}"
    if _QKV.fullmatch(leaf):
        return f"{kind}.k" if cross or ("qkv" not in leaf.lower() and leaf != "in_proj") else f"{kind}.qkv"
    return f"{kind}.out" if _OUT.fullmatch(leaf) else None


def _block_role(inner: str, layer: nn.Module, block: nn.Module) -> str:
    leaf = _leaf(inner)
    if "skip" in leaf:
        return "skip"
    assert isinstance(layer, nn.Linear)
    siblings = {n for n, c in block.named_children() if isinstance(c, nn.Linear)}
    if "." not in inner.removesuffix(".base_layer") and "proj_mlp" in siblings:  # FLUX-like: attention beside the MLP
        return "fused.in" if leaf == "proj_mlp" else "fused.out" if leaf == "proj_out" else "other"
    if layer.out_features == 3 * layer.in_features and not _contracts_to(block, layer):
        return "attn.qkv"
    if layer.out_features == layer.in_features:
        ends_attention = "attention.output." in inner or any(_is_qkv_shaped(c) for c in block.modules())
        return "attn.out" if ends_attention else "other"
    return "ff.in" if layer.out_features > layer.in_features else "ff.out"


def _loose_role(name: str, layer: nn.Module, by_name: dict[str, nn.Module]) -> str:
    """Role of a linear outside the attention blocks: a feed-forward of a residual stack, an embedding, or neither."""
    parts = name.split(".")
    ends = [i for i, part in enumerate(parts) if part.isdigit() and i + 1 < len(parts)]
    if not any(part.isdigit() for part in parts) or re.search(r"embed|patch", name):
        return "embed"
    if not ends or not isinstance(layer, nn.Linear):
        return "other"
    element = by_name[".".join(parts[: ends[0] + 1])]
    if layer.out_features > layer.in_features and _contracts_to(element, layer):
        return "ff.in"
    wider = (m for m in element.modules() if isinstance(m, nn.Linear) and m.in_features == layer.out_features)
    return "ff.out" if any(m.out_features == layer.in_features and m is not layer for m in wider) else "other"


def _is_qkv_shaped(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and layer.out_features == 3 * layer.in_features


def _contracts_to(block: nn.Module, layer: nn.Linear) -> bool:
    """Whether another linear of the block leads from ``layer``'s width (half of it, when gated) back to its input's."""
    widths = (layer.out_features, layer.out_features // 2)
    return any(
        isinstance(other, nn.Linear) and other.in_features in widths and other.out_features == layer.in_features
        for other in block.modules()
    )

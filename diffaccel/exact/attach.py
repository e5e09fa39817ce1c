"""Puts exact reuse on the denoisers and text encoders of a pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffaccel.clock import Call
from diffaccel.denoiser import Denoiser, timestep_parameter
from diffaccel.exact.constants import ConstantHook, Constants
from diffaccel.exact.encoders import EncoderHook
from diffaccel.exact.section import ExactReuse
from diffaccel.exact.trim import Trim
from diffaccel.hooks import install
from diffaccel.latents import latent_tensors
from diffaccel.report import TechniqueReport
from diffaccel.root import Compute
from diffaccel.technique import Context


def resolve(sections: Sequence[ExactReuse], context: Context) -> ExactReuse:
    """There is one section, for the whole pipeline."""
    (section,) = sections
    return section


def attach(section: ExactReuse, context: Context) -> AttachedExact:
    """Hook the modules that can see constants only, the text encoders, and the arguments of every denoiser."""
    hooks: list[ConstantHook] = []
    trims: list[Trim] = []
    for denoiser in context.denoisers:
        root = context.root(denoiser)
        if section.trim:
            trims.append(Trim())
            root.changes.append(trims[-1])
            context.undo.callback(root.changes.remove, trims[-1])
        if section.constants:
            constants = Constants()
            for module in _candidates(denoiser):
                hooks.append(ConstantHook(constants))
                context.undo.callback(install(module, hooks[-1], "exact"))
            follower = _Follower(denoiser, constants)
            root.wrappers.append(follower)
            context.undo.callback(root.wrappers.remove, follower)
    encoders: list[EncoderHook] = []
    for encoder in context.encoders if section.encoders else ():
        encoders.append(EncoderHook())
        context.undo.callback(install(encoder.module, encoders[-1], "exact"))
    return AttachedExact(section, hooks, encoders, trims)


def _candidates(denoiser: Denoiser) -> Iterator[nn.Module]:
    """Modules whose inputs may all be constants: embeddings of text and time, which stand outside the blocks; inside
    them modulation, and keys and values of cross-attention with their norms."""
    blocks = [name for name, _ in denoiser.blocks]
    roles = {site.name: site.role for site in denoiser.layers}
    cross = [site.name for site in denoiser.attentions if site.role == "cross"]
    for name, module in denoiser.module.named_modules():
        inside = any(name == b or name.startswith(f"{b}.") or b.startswith(f"{name}.") for b in blocks)
        if not name or isinstance(module, nn.ModuleList | nn.Identity | nn.Dropout) or _changes(module):
            continue
        if not inside:
            if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                yield module
        elif (
            (roles.get(name) in ("cross.k", "cross.v", "modulation") and type(module) is nn.Linear)
            or any(name == f"{site}.{norm}" for site in cross for norm in ("norm_k", "norm_added_k"))
            or (isinstance(module, nn.SiLU) and _beside(name, roles))
        ):
            yield module


def _beside(name: str, roles: Mapping[str, str]) -> bool:
    """Whether a module stands beside a linear of modulation."""
    parent = name.rpartition(".")[0]
    return any(role == "modulation" and other.rpartition(".")[0] == parent for other, role in roles.items())


def _changes(module: nn.Module) -> bool:
    """Whether the module, or one inside, runs differently at different steps."""
    return any(getattr(m, "phase", None) is not None for m in module.modules())


class _Follower:
    """Runs around a denoiser's calls: its arguments other than the latents are constants."""

    def __init__(self, denoiser: Denoiser, constants: Constants) -> None:
        self._constants = constants
        self._timestep = timestep_parameter(denoiser.module)
        self._run: int | None = None

    def __call__(self, call: Call, arguments: Mapping[str, Any], compute: Compute) -> Any:
        if call.run != self._run:
            self._run = call.run
            self._constants.clear()
        latents = {t.untyped_storage().data_ptr() for t in latent_tensors(arguments) if type(t) is Tensor}
        for name, value in arguments.items():
            for leaf in pytree.tree_leaves(value):
                if type(leaf) is not Tensor or leaf.untyped_storage().data_ptr() in latents:
                    continue
                one_value = leaf.numel() == 1 or not any(leaf.stride())
                named = name == self._timestep and call.timestep is not None and one_value
                identity = ("timestep", call.timestep, tuple(leaf.shape), leaf.dtype) if named else None
                self._constants.add(leaf, identity)
        return compute()


class AttachedExact:
    """Exact reuse at work."""

    def __init__(
        self,
        section: ExactReuse,
        hooks: Sequence[ConstantHook],
        encoders: Sequence[EncoderHook],
        trims: Sequence[Trim],
    ) -> None:
        self._section, self._hooks, self._encoders, self._trims = section, hooks, encoders, trims

    def report(self) -> TechniqueReport:
        on = [name for name in ("constants", "encoders", "trim") if getattr(self._section, name)]
        return TechniqueReport(
            "exact",
            ", ".join(on),
            sites=len(self._hooks) + len(self._encoders) + len(self._trims),
            facts={
                "constants_reused": sum(h.spared for h in self._hooks),
                "constant_bytes": sum(h.nbytes for h in self._hooks),
                "texts_reused": sum(e.spared for e in self._encoders),
                "padding_cut": sum(t.cut for t in self._trims),
            },
            notes=list(dict.fromkeys(t.note for t in self._trims if t.note)),
        )

    def bake(self) -> None:
        """Nothing is kept for undoing."""

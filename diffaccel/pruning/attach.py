"""Applies a pruned plan: takes out what its artefacts do not keep, and puts it back to the bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from diffaccel.denoiser import Denoiser
from diffaccel.errors import PlanError
from diffaccel.originals import Originals
from diffaccel.plan import Section
from diffaccel.pruning.blocks import Flow, whole_groups
from diffaccel.pruning.depth import drop_stand_ins
from diffaccel.pruning.groups import Group, groups_of
from diffaccel.pruning.lowrank import factorise, ranks_of
from diffaccel.pruning.removal import keep_originals, remove_units, why_not
from diffaccel.pruning.section import PREFIX, LowRank, Pruning
from diffaccel.report import TechniqueReport
from diffaccel.reshape import Record, mark_reshaped, merged, shape_of
from diffaccel.technique import Context


@dataclass
class Resolved:
    """What goes, by component: the groups that lose units with the indices that stay, and ranks by linear."""

    sections: Sequence[Section]
    cuts: dict[str, tuple[list[Group], dict[str, Tensor]]]
    ranks: dict[str, dict[str, int]]


def resolve(sections: Sequence[Section], context: Context) -> Resolved:
    """Find the groups that the artefacts speak of.

    Raises:
        PlanError: no artefacts, artefacts of another model, or layers that cannot be cut (quantized, LoRA, offloaded).
    """
    pruned = [s for s in sections if isinstance(s, Pruning)]
    if len(pruned) > 1:
        raise PlanError("a plan takes one Pruning section: prune(), bake() and save, then prune the result further")
    cuts: dict[str, tuple[list[Group], dict[str, Tensor]]] = {}
    if pruned:
        for denoiser in context.denoisers:
            _refuse_wrapped(denoiser)
            begin = f"{PREFIX}{denoiser.component}."
            kept = {n.removeprefix(begin): t.long() for n, t in context.artefacts.items() if n.startswith(begin)}
            groups = all_groups(denoiser, tuple({k.partition(":")[0] for k in kept}), flows_in(pruned[0], denoiser))
            known = {g.key: g for g in groups}
            _check(denoiser, known, kept)
            cuts[denoiser.component] = [known[key] for key in kept], kept
            if reason := why_not(denoiser, cuts[denoiser.component][0]):
                raise PlanError(reason)
        if not any(kept for _, kept in cuts.values()):
            raise PlanError(
                "Pruning: this plan does not say what to remove; plan = diffaccel.prune(pipe, plan, prompts=[...]) does"
            )
    ranks: dict[str, dict[str, int]] = {}
    for section in sections:
        if isinstance(section, LowRank):
            for component, found in ranks_of(section, context.denoisers).items():
                ranks[component] = ranks.get(component, {}) | found
    return Resolved(sections, cuts, ranks)


def attach(resolved: Resolved, context: Context) -> Pruned:
    """Remove one layer at a time, then factorise."""
    originals = Originals(context.originals, context.undo)
    records: dict[str, Record] = {}
    handles: list[Any] = []
    facts = {"parameters_before": 0, "parameters_after": 0, "bytes_before": 0, "bytes_after": 0}
    for denoiser in context.denoisers:
        facts["parameters_before"] += sum(p.numel() for p in denoiser.module.parameters())
        facts["bytes_before"] += sum(p.nbytes for p in denoiser.module.parameters())
        groups, kept = resolved.cuts.get(denoiser.component, ([], {}))
        names = list(denoiser.module.state_dict(keep_vars=True))
        record, parked = remove_units(denoiser, groups, kept, originals, context.undo)
        ranks = resolved.ranks.get(denoiser.component, {})
        more, factored = factorise(denoiser, ranks, originals, context.undo)
        records[denoiser.component] = merged(record, more)
        handle = keep_originals(denoiser.module, names, parked | {n: p for n, p in factored.items() if n not in parked})
        context.undo.callback(handle.remove)
        guard = denoiser.module.register_load_state_dict_pre_hook(_refuse_loading)
        context.undo.callback(guard.remove)
        facts["parameters_after"] += sum(p.numel() for p in denoiser.module.parameters())
        facts["bytes_after"] += sum(p.nbytes for p in denoiser.module.parameters())
        handles += [handle, guard]
    return Pruned(resolved, context, originals, records, handles, facts)


class Pruned:
    """A pruned model; see `diffaccel.technique.Attached`."""

    def __init__(
        self,
        resolved: Resolved,
        context: Context,
        originals: Originals,
        records: dict[str, Record],
        handles: list[Any],
        facts: dict[str, int],
    ) -> None:
        self._resolved, self._context, self._originals = resolved, context, originals
        self._records, self._handles, self._facts = records, handles, facts

    def report(self) -> TechniqueReport:
        """Parameters and bytes before and after, and what was removed by kind."""
        removed: dict[str, int] = {}
        for groups, kept in self._resolved.cuts.values():
            for kind in dict.fromkeys(g.kind for g in groups):
                own = [g for g in groups if g.kind == kind]
                removed[kind] = removed.get(kind, 0) + sum(g.units - len(kept[g.key]) for g in own)
        sites = sum(len(groups) for groups, _ in self._resolved.cuts.values())
        factored = sum(len(ranks) for ranks in self._resolved.ranks.values())
        facts: dict[str, Any] = {**self._facts, "removed": removed}
        if factored:
            facts["low_rank"] = factored
        settings = "; ".join(_describe(s) for s in self._resolved.sections)
        return TechniqueReport("pruning", settings, sites + factored, facts)

    def bake(self) -> None:
        """Let the originals go, and make ``save_pretrained`` write what ``from_pretrained`` then reads."""
        for handle in self._handles:
            handle.remove()
        self._originals.discard()
        for denoiser in self._context.denoisers:
            record = merged(shape_of(denoiser.module), self._records[denoiser.component])
            config = self._depth_of(denoiser)
            if config and set(record) == {"replaced"}:
                drop_stand_ins(denoiser.module, config)
            else:
                mark_reshaped(denoiser.module, record)

    def _depth_of(self, denoiser: Denoiser) -> dict[str, int]:
        """What the config is to say of a model that only lost blocks; see `Pruning.depth`."""
        begin = f"{denoiser.component}."
        lines = [x for s in self._resolved.sections if isinstance(s, Pruning) for x in s.depth if x.startswith(begin)]
        pairs = (line.removeprefix(begin).split("=") for line in lines)
        return {name: int(value) for name, value in pairs}


def all_groups(denoiser: Denoiser, kinds: Sequence[str], flows: Mapping[str, Flow]) -> tuple[Group, ...]:
    """The groups of ``kinds``."""
    return (*groups_of(denoiser, kinds), *whole_groups(denoiser, kinds, flows))


def flows_in(section: Pruning, denoiser: Denoiser) -> dict[str, Flow]:
    """What `texts_of` wrote of this denoiser."""
    flows: dict[str, Flow] = {}
    for line in section.flows:
        name, *pairs = line.split(" ")
        component, _, inner = name.partition(".")
        if component == denoiser.component:
            flows[inner] = {where: argument for where, _, argument in (pair.rpartition("=") for pair in pairs)}
    return flows


def texts_of(denoiser: Denoiser, flows: Mapping[str, Flow]) -> tuple[str, ...]:
    """Flows as texts for a section: ``transformer.blocks.0 [0]=hidden_states``."""
    return tuple(
        " ".join([f"{denoiser.component}.{name}", *(f"{where}={argument}" for where, argument in flow.items())])
        for name, flow in flows.items()
    )


def _check(denoiser: Denoiser, known: Mapping[str, Group], kept: Mapping[str, Tensor]) -> None:
    for key, indices in kept.items():
        if key not in known:
            raise PlanError(
                f"the plan was pruned for another model: {denoiser.component} has no {key!r} that can be cut; prune "
                "this one"
            )
        units = known[key].units
        ascending = bool((indices[1:] > indices[:-1]).all())
        if not ascending or (len(indices) and not 0 <= int(indices[0]) <= int(indices[-1]) < units):
            raise PlanError(
                f"the plan was pruned for another model: the units that stay in {denoiser.component}'s {key} are not "
                f"among its {units}; prune this one"
            )


def _refuse_wrapped(denoiser: Denoiser) -> None:
    if any("base_layer" in site.name.split(".") for site in denoiser.layers):
        raise PlanError(
            f"{denoiser.component} has a LoRA adapter; merge it (fuse_lora, unload_lora_weights) before pruning"
        )
    hooks = getattr(getattr(denoiser.module, "_diffusers_hook", None), "hooks", {})
    if any("group_offload" in name for name in hooks):
        raise PlanError(
            f"{denoiser.component} uses group offloading, which keeps copies of weights of the old sizes; accelerate "
            "first, then enable it"
        )


def _refuse_loading(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
    raise PlanError(
        "weights cannot be loaded into a pruned model that can still be restored; call remove() first, or bake() it"
    )


def _describe(section: Section) -> str:
    if isinstance(section, Pruning):
        return f"{section.ratio:.0%} of {section.budget} by {section.method} over {section.units}"
    assert isinstance(section, LowRank)
    kept = f"energy {section.energy:g}" if section.energy is not None else f"ratio {section.ratio:g}"
    return f"low rank, {kept}, on {section.sites}"

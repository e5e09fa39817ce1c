"""`prune`: decides what a denoiser can do without, and gives the plan that removes it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffaccel.denoiser import Denoiser, find_denoisers
from diffaccel.errors import PlanError
from diffaccel.key import plan_key
from diffaccel.originals import Originals
from diffaccel.plan import Artefacts, Plan
from diffaccel.pruning.attach import all_groups, texts_of
from diffaccel.pruning.blocks import flows_of
from diffaccel.pruning.budget import choose
from diffaccel.pruning.costs import costs_of
from diffaccel.pruning.depth import plain_config
from diffaccel.pruning.groups import Group
from diffaccel.pruning.removal import remove_units, why_not
from diffaccel.pruning.scores import (
    Scores,
    activation_scores,
    magnitude_scores,
    position,
    random_scores,
    replacement_scores,
    taylor_scores,
)
from diffaccel.pruning.section import PREFIX, Pruning
from diffaccel.pruning.verify import cuttable, mismatch
from diffaccel.recording import Recorded, record, requests_of

_STEPS = 4  # calls that are kept of each prompt
Notify = Callable[[str], None]


def prune(
    model: Any,
    plan: Plan | Pruning,
    *,
    prompts: Any,
    folder: str | os.PathLike[str] | None = None,
    settings: Any = None,
    notify: Notify | None = None,
    **call: Any,
) -> Plan:
    """Decide what to remove, and give the plan with it. Nothing is changed: `diffaccel.accelerate` removes it.

    Args:
        model: a diffusers pipeline, or a bare denoiser.
        plan: a `Plan` with a `Pruning` section, or the section alone.
        prompts: some prompts, or the arguments of a pipeline's call each; for a bare denoiser, the keyword arguments of
            a forward each. Units are tried on these.
        folder: where EcoDiff keeps its masks as it learns; with the same arguments one that was cut off goes on there.
        settings: of EcoDiff, an `EcoDiff`.
        notify: is told in words what is going on.
        **call: further arguments of every call of the pipeline, such as ``num_inference_steps``.

    Returns:
        The plan with the indices of what stays among its artefacts, and the key of this model.

    Raises:
        PlanError: no Pruning section, a ratio that cannot be reached, or weights that cannot be cut (quantized, with a
            LoRA adapter, offloaded).
        InputError: no prompts.
        ModelError: no denoiser in ``model``.
    """
    plan, section = _with_section(plan)
    requests = requests_of(prompts)
    denoisers = find_denoisers(model)
    notify = notify or (lambda text: None)
    for denoiser in denoisers:
        if "_diffaccel" in denoiser.module.__dict__:
            raise PlanError(f"{denoiser.component} is accelerated; call remove() on its handle, then prune")
    # These methods do not look at calls; one is needed to try what can be cut.
    looked_at = requests[:1] if section.method in ("ecodiff", "magnitude", "random") else requests
    recorded = record(model, denoisers, looked_at, call, _STEPS)
    artefacts: dict[str, Tensor] = {}
    flow_texts: list[str] = []
    depth: list[str] = []
    for denoiser in denoisers:
        calls = recorded[denoiser.component]
        one = partial(calls[0].run, denoiser.module)
        flows = flows_of(denoiser, one)
        groups = _usable(denoiser, section, flows, calls, notify)
        whole = {g.name for g in groups if g.stand_in is not None}
        flow_texts += texts_of(denoiser, {n: f for n, f in flows.items() if n in whole})
        costs = costs_of(denoiser, groups, section.budget, one)

        def decide(scores: Scores, groups: Sequence[Group] = groups, costs: Any = costs) -> dict[str, Tensor]:
            return choose(groups, scores, costs, section.ratio, section.multiple, section.scope)

        decide({g.key: torch.ones(g.units) for g in groups})  # refuses what cannot be reached before the long part
        notify(f"{denoiser.component}: {sum(g.units for g in groups)} units in {len(groups)} groups may go")
        if section.method == "ecodiff":
            from diffaccel.pruning.ecodiff import EcoDiff, learn

            uncut = sum(costs.each[g.key] * g.units for g in groups)
            logits = learn(
                *(model, denoiser, groups, requests, call, settings or EcoDiff(), folder, notify),
                target=1 - section.ratio * costs.total / uncut,
                each=costs.each,
                prior=activation_scores(denoiser, [g for g in groups if g.stand_in is None], calls),
            )
            kept = decide({g.key: logits[g.key].sigmoid() * costs.each[g.key] for g in groups})
        elif section.method == "evolution":
            from diffaccel.pruning.evolution import evolve

            kept = evolve(denoiser, groups, calls, decide, section.seed, notify)
        else:
            kept = decide(_scores(section, denoiser, groups, calls))
        cut = [g for g in groups if g.key in kept]
        if reason := mismatch(denoiser, cut, kept, one):
            raise PlanError(f"{denoiser.component} cannot be cut like this: {reason}; name fewer units")
        depth += _depth(denoiser, cut, kept, calls[0])
        artefacts |= {f"{PREFIX}{denoiser.component}.{key}": k.to(torch.int32) for key, k in kept.items()}
    section = dataclasses.replace(section, flows=tuple(flow_texts), depth=tuple(depth))
    others = tuple(s for s in plan.pruning if not isinstance(s, Pruning))
    kept_artefacts = {n: t for n, t in plan.artefacts.items() if not n.startswith(PREFIX)}
    return dataclasses.replace(
        plan,
        pruning=(section, *others),
        artefacts=Artefacts({**kept_artefacts, **artefacts}),
        key=plan_key(denoisers),
    )


def _depth(denoiser: Denoiser, cut: Sequence[Group], kept: Mapping[str, Tensor], call: Recorded) -> list[str]:
    """``transformer.num_layers=6`` where only blocks go and a config can say so."""
    if not cut or any(g.kind != "block" for g in cut):
        return []
    with ExitStack() as undo:
        remove_units(denoiser, cut, kept, Originals("device", undo), undo)
        config = plain_config(denoiser, lambda: call.run(denoiser.module))
    return [f"{denoiser.component}.{name}={value}" for name, value in config.items()]


def _scores(section: Pruning, denoiser: Denoiser, groups: Sequence[Group], calls: Sequence[Recorded]) -> Scores:
    if section.method == "magnitude":
        return magnitude_scores(groups)
    if section.method == "activation":
        return activation_scores(denoiser, groups, calls)
    if section.method == "taylor":
        return taylor_scores(denoiser, groups, calls)
    if section.method == "hierarchy":
        return replacement_scores(denoiser, groups, calls)
    return random_scores(groups, section.seed)


def _usable(
    denoiser: Denoiser,
    section: Pruning,
    flows: Mapping[str, Mapping[str, str]],
    calls: Sequence[Recorded],
    notify: Notify,
) -> tuple[Group, ...]:
    """The groups that may be cut: by structure, not protected, and tried on a call."""
    found = all_groups(denoiser, section.kinds, flows)
    if section.method == "activation":
        found = tuple(g for g in found if g.stand_in is None)
    order = [name for name, _ in denoiser.blocks]
    first = round(section.protect * len(order))
    found = tuple(g for g in found if (at := position(g, order)) is None or at >= first)
    if reason := why_not(denoiser, found):
        raise PlanError(reason)
    groups, refused = cuttable(denoiser, found, lambda: calls[0].run(denoiser.module))
    for reason in dict.fromkeys(refused.values()):
        names = [key for key, why in refused.items() if why == reason]
        notify(f"{denoiser.component}: {names[0]} and {len(names) - 1} more stay: {reason}")
    if not groups:
        raise PlanError(
            f"{denoiser.component} has no {section.units.replace(' ', ' or ')} that can be cut"
            + (f": {next(iter(refused.values()))}" if refused else "; name other units")
        )
    return groups


def _with_section(plan: Plan | Pruning) -> tuple[Plan, Pruning]:
    if isinstance(plan, Pruning):
        plan = Plan(pruning=(plan,))
    sections = [s for s in plan.pruning if isinstance(s, Pruning)] if isinstance(plan, Plan) else []
    if len(sections) != 1:
        raise PlanError(f"prune needs a plan with one Pruning section, such as Pruning(ratio=0.2), got {plan!r:.200}")
    return plan, sections[0]

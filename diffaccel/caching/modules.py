"""Which modules of a denoiser can have their outputs cached: attentions, feed-forwards and whole blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from diffaccel.denoiser import Denoiser, Site
from diffaccel.errors import PlanError
from diffaccel.sites import SitePattern


def cacheable(denoiser: Denoiser) -> list[Site]:
    """Modules by the roles ``attn``, ``cross``, ``ff`` and ``block``.

    An attention that stands for a whole block, and a feed-forward whose layers are the block's own, have no module.
    """
    blocks = {id(block) for _, block in denoiser.blocks}
    found = [site for site in denoiser.attentions if site.name and id(site.module) not in blocks]
    found += [Site(denoiser.component, name, "ff", module) for name, module in _feed_forwards(denoiser)]
    found += [Site(denoiser.component, name, "block", block) for name, block in denoiser.blocks]
    return found


def chosen(denoisers: Sequence[Denoiser], sites: str) -> dict[str, list[Site]]:
    """The modules that a pattern names, by component.

    Raises:
        PlanError: none, or a block together with a module inside it: its output would be kept twice.
    """
    pattern = SitePattern(sites)
    known = {d.component: cacheable(d) for d in denoisers}
    found = {c: [s for s in all_ if pattern.matches(s.role, s.component, s.name)] for c, all_ in known.items()}
    if not any(found.values()):
        roles = sorted({s.role for all_ in known.values() for s in all_})
        raise PlanError(
            f"StepCache.sites={sites!r} names none of this model's modules; the roles are {', '.join(roles) or 'none'}"
        )
    for sites_of in found.values():
        inside = next(((a, b) for a in sites_of for b in sites_of if a.name.startswith(f"{b.name}.")), None)
        if inside is not None:
            raise PlanError(
                f"StepCache.sites={sites!r} names {inside[1].full_name} and, inside it, {inside[0].full_name}; what is "
                "kept of the one holds the other: leave out 'block', or the parts"
            )
    return {component: sites_of for component, sites_of in found.items() if sites_of}


def _feed_forwards(denoiser: Denoiser) -> Iterator[tuple[str, nn.Module]]:
    """Modules below a block that hold a block's linears ``ff.in`` and ``ff.out``, the smallest that do.

    Experts that see tokens chosen anew in every call are taken together with what chooses.
    """
    modules = dict(denoiser.module.named_modules())
    for block, _ in denoiser.blocks:
        inner = [s for s in denoiser.layers if s.name.startswith(f"{block}.")]
        found: dict[str, None] = {}
        for first in (s.name for s in inner if s.role == "ff.in"):
            for last in (s.name for s in inner if s.role == "ff.out"):
                common = _common(first, last)
                while "expert" in common.removeprefix(block) or isinstance(modules[common], nn.ModuleList):
                    common = common.rpartition(".")[0]
                if common.startswith(f"{block}."):
                    found[common] = None
        names = [name for name in found if not any(other.startswith(f"{name}.") for other in found)]
        yield from ((name, modules[name]) for name in names)


def _common(first: str, second: str) -> str:
    """The name of the smallest module that holds both."""
    parts = []
    for a, b in zip(first.split("."), second.split("."), strict=False):
        if a != b:
            break
        parts.append(a)
    return ".".join(parts)

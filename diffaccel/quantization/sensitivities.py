"""What measuring sensitivities gives: numbers by site, candidate and range of steps, and a file for them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffaccel.errors import PlanError
from diffaccel.quantization.schedule import Steps
from diffaccel.quantization.section import Quantize

_TENSORS = ("weights", "error", "text", "shows", "bytes", "before", "macs", "seconds")


@dataclass(frozen=True)
class Sensitivities:
    """What `measure` found. Errors are energies relative to the output's.

    Args:
        sites: full names. roles: what they are for. weights: elements of each.
        candidates: from coarse to fine, without sites and steps of their own.
        ranges: of progress, adjoining.
        error: of the denoiser's output, float64 [sites, candidates, ranges].
        text: of what the text changes in it, likewise; NaN where that cannot be told.
        shows: how much an error in each range shows in the final latents, [ranges].
        bytes: stored, [sites, candidates]. before: bytes of the weights as they were, [sites].
        macs: multiplications of one call, [sites].
        seconds: of the linear at one call's tokens, [sites, candidates].
    """

    sites: tuple[str, ...]
    roles: tuple[str, ...]
    weights: Tensor
    candidates: tuple[Quantize, ...]
    ranges: tuple[Steps, ...]
    error: Tensor
    text: Tensor
    shows: Tensor
    bytes: Tensor
    before: Tensor
    macs: Tensor
    seconds: Tensor
    way: str = "scaled"

    @property
    def lengths(self) -> Tensor:
        """Share of the steps in each range, [ranges]."""
        return torch.tensor([b - a for a, b in self.ranges], dtype=torch.float64)

    def save(self, file: str | os.PathLike[str]) -> None:
        """As safetensors, for `load_sensitivities`: measuring takes long."""
        words: dict[str, Any] = {"sites": self.sites, "roles": self.roles, "ranges": self.ranges, "way": self.way}
        words["candidates"] = [asdict(c) for c in self.candidates]
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        partial = f"{os.fspath(file)}.partial"
        save_file(tensors, partial, {"sensitivities": json.dumps(words)})
        os.replace(partial, file)


def load_sensitivities(file: str | os.PathLike[str]) -> Sensitivities:
    """What `Sensitivities.save` wrote.

    Raises:
        PlanError: the file cannot be read, or holds something else.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            words: Mapping[str, Any] = json.loads((opened.metadata() or {})["sensitivities"])
            tensors = {name: opened.get_tensor(name) for name in _TENSORS}
        return Sensitivities(
            sites=tuple(words["sites"]),
            roles=tuple(words["roles"]),
            ranges=tuple((a, b) for a, b in words["ranges"]),
            candidates=tuple(Quantize(**{**c, "steps": tuple(c["steps"])}) for c in words["candidates"]),
            way=words["way"],
            **tensors,
        )
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise PlanError(f"{os.fspath(file)} holds no sensitivities ({error}); measure them again") from None


def sharpen(rough: Sensitivities, exact: Sensitivities) -> Sensitivities:
    """``rough`` with the errors of the sites that ``exact`` has too.

    Raises:
        PlanError: the two are of other candidates or ranges.
    """
    if rough.ranges != exact.ranges or [c.form() for c in rough.candidates] != [c.form() for c in exact.candidates]:
        raise PlanError("sensitivities of other candidates or ranges of steps cannot sharpen these; measure them alike")
    error, text = rough.error.clone(), rough.text.clone()
    for i, name in enumerate(exact.sites):
        if name in rough.sites:
            at = rough.sites.index(name)
            error[at], text[at] = exact.error[i], exact.text[i]
    return replace(rough, error=error, text=text)


def regroup(fine: Sensitivities, ranges: int) -> Sensitivities:
    """``fine`` with fewer ranges, each of several adjoining ones; errors count by how much they show.

    Raises:
        PlanError: the number does not divide that of ``fine``.
    """
    each, left = divmod(len(fine.ranges), ranges) if ranges > 0 else (0, 1)
    if left:
        raise PlanError(f"{len(fine.ranges)} ranges of steps cannot become {ranges}: each takes as many of them")
    shows = fine.shows.view(ranges, each).sum(1)

    def merged(values: Tensor) -> Tensor:
        return (values * fine.shows).unflatten(-1, (ranges, each)).sum(-1) / shows.clamp(min=1e-300)

    parts = tuple((fine.ranges[i * each][0], fine.ranges[(i + 1) * each - 1][1]) for i in range(ranges))
    return replace(fine, ranges=parts, error=merged(fine.error), text=merged(fine.text), shows=shows)


def subset(s: Sensitivities, mask: Tensor) -> Sensitivities:
    """``s`` of some of its sites, bool [sites]."""
    keep = mask.tolist()
    by_site = [name for name in _TENSORS if name != "shows"]
    return replace(
        s,
        sites=tuple(x for x, k in zip(s.sites, keep, strict=True) if k),
        roles=tuple(x for x, k in zip(s.roles, keep, strict=True) if k),
        **{name: getattr(s, name)[mask] for name in by_site},
    )

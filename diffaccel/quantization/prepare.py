"""From the forms that a site is to run in to the tensors that it stores: each weight once, where forms can share it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.quantization.channels import Channels
from diffaccel.quantization.conditioning import balance_multiplier, condition_weight, low_rank
from diffaccel.quantization.rotation import block_size, random_signs
from diffaccel.quantization.schedule import Schedule, Steps
from diffaccel.quantization.scheme import Conditioning, Form, Scheme
from diffaccel.quantization.stored import KINDS, Run


@dataclass(frozen=True)
class _Store:
    """One stored weight, and the runs that read it."""

    kind: str
    group: int | None
    conditioning: Conditioning
    runs: tuple[Run, ...]

    @property
    def suffix(self) -> str:
        return self.runs[0].suffix


def runs_of(schedule: Schedule, shape: Sequence[int]) -> tuple[tuple[Run, ...], tuple[tuple[Steps, int], ...]]:
    """How a layer with a weight of this shape runs, and which run (-1: as it was) each range of the schedule takes."""
    stores = _stores(schedule, shape)
    runs = tuple(run for store in stores for run in store.runs)
    forms = {(run.scheme, store.conditioning): runs.index(run) for store in stores for run in store.runs}
    pieces = tuple((steps, -1 if form is None else forms[form.scheme, form.conditioning]) for steps, form in schedule)
    return runs, pieces


def prepare(
    weight: Tensor, bias: Tensor | None, schedule: Schedule, channels: Channels | None = None
) -> dict[str, Tensor]:
    """The tensors, by name with suffix, of ``weight`` [N, K] (or of a convolution) in the forms of ``schedule``.

    Args:
        channels: what calibration measured; needed where the conditioning is balanced.
    """
    tensors: dict[str, Tensor] = {}
    for store in _stores(schedule, weight.shape):
        ranges = [s for s, form in schedule if form is not None and _reads(form, store)]
        made = _prepare(weight.detach().float(), store, ranges, channels, _half(weight.dtype))
        tensors |= {name + store.suffix: tensor for name, tensor in made.items()}
    protects = any(form is not None and form.conditioning.protect for _, form in schedule)
    if protects and channels is not None and channels.constant is not None:
        rows = channels.constant.to(weight)
        tensors |= {"kept_rows": rows, "kept_outputs": F.linear(rows, weight.detach(), bias)}
    return tensors


@dataclass(frozen=True)
class Learnable:
    """A weight whose rounding is to be learnt: see `diffaccel.quantization.rounding.Rounding`."""

    weight: Tensor
    tensors: dict[str, Tensor]
    run: Run


def learnable(weight: Tensor, steps: Steps, form: Form, channels: Channels | None) -> Learnable:
    """Of ``weight`` [N, K], as ``form`` conditions it at ``steps``, with what rounding to nearest makes of it."""
    (store,) = _stores(((steps, form),), weight.shape)
    rest, importance, extras = _conditioned(weight.detach().float(), store, [steps], channels, _half(weight.dtype))
    (run,) = store.runs
    return Learnable(rest, KINDS[store.kind].quantize(rest, store.group, importance) | extras, run)


def learnt_key(form: Form) -> str:
    """By which artefacts tell learnt weights of one site apart."""
    scheme = replace(form.scheme, activations="float")  # which do not matter for the weight
    return re.sub(r"[^A-Za-z0-9.]+", "_", Form(scheme, form.conditioning).label)


def _stores(schedule: Schedule, shape: Sequence[int]) -> list[_Store]:
    """Forms with the same conditioning share a weight; int8 beside int4 in groups makes a nested one."""
    forms = list(dict.fromkeys(form for _, form in schedule if form is not None))
    stores: list[_Store] = []
    for conditioning in dict.fromkeys(form.conditioning for form in forms):
        schemes = [form.scheme for form in forms if form.conditioning == conditioning]
        groups = [s.group for s in schemes if s.weights == "int4" and s.group]
        nests = groups[0] if groups and not conditioning.learnt and any(s.weights == "int8" for s in schemes) else None
        kinds: dict[tuple[str, int | None], list[Scheme]] = {}
        for scheme in schemes:
            nested = nests and (scheme.weights == "int8" or (scheme.weights == "int4" and scheme.group == nests))
            parts = scheme.group or scheme.split or None
            kinds.setdefault(("nested", nests) if nested else (scheme.weights, parts), []).append(scheme)
        for (kind, group), members in kinds.items():
            suffix = f"_{len(stores)}" if stores else ""
            rotated = conditioning.rotate and block_size(shape[1]) is not None
            if len(shape) == 4:
                kind = "int8_conv" if group is None else "int8_conv_split"
            runs = tuple(Run(kind, scheme, group, rotated, suffix) for scheme in members)
            stores.append(_Store(kind, group, conditioning, runs))
    return stores


def _reads(form: Form, store: _Store) -> bool:
    return form.conditioning == store.conditioning and any(run.scheme == form.scheme for run in store.runs)


def _prepare(
    weight: Tensor, store: _Store, ranges: Sequence[Steps], channels: Channels | None, half: torch.dtype
) -> dict[str, Tensor]:
    if store.conditioning.learnt:
        assert channels is not None
        learnt = channels.learnt(learnt_key(Form(store.runs[0].scheme, store.conditioning)))
        made = {name: tensor.to(weight.device) for name, tensor in learnt.items()}
    else:
        weight, importance, extras = _conditioned(weight, store, ranges, channels, half)
        made = KINDS[store.kind].quantize(weight, store.group, importance) | extras
    if any(run.scheme.activations == "static" for run in store.runs):
        assert channels is not None
        made["act_limits"] = channels.limits(made.get("before"), store.runs[0].scheme.split).to(weight)
    return made


def _conditioned(
    weight: Tensor, store: _Store, ranges: Sequence[Steps], channels: Channels | None, half: torch.dtype
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """What is left of ``weight`` to round, how much each column of it matters, the tensors of its conditioning."""
    how, kind = store.conditioning, KINDS[store.kind]
    columns, rotated = weight.shape[1], store.runs[0].rotated
    before = random_signs(columns, weight.device) if rotated else None
    after = None
    if how.balance is not None:
        assert channels is not None
        turned = rotated and how.first == "rotate"
        against = condition_weight(weight, before, None, rotated=True) if turned else weight
        balance = balance_multiplier(channels.squares(ranges, rotated=turned), against, how.balance)
        if turned:
            after = balance
        else:
            before = balance if before is None else balance * before
    weight = condition_weight(weight, before, after, rotated=rotated)
    extras = {name: t.half() for name, t in (("before", before), ("after", after)) if t is not None}  # exact
    known = channels is not None and channels.measured
    importance = (
        None
        if channels is None or not known
        else _importance(channels.squares(ranges).to(weight), before, after, rotated)
    )
    if how.low_rank:
        coarsest = min(store.runs, key=lambda run: run.scheme.bits)

        def rounded(rest: Tensor) -> Tensor:
            return kind.values(kind.quantize(rest, store.group, importance), coarsest, columns)

        up, down = low_rank(weight, how.low_rank, half, rounded, how.refine)
        weight = weight - up.float() @ down.float()
        extras |= {"up": up, "down": down}
    return weight, importance, extras


def _importance(squares: Tensor, before: Tensor | None, after: Tensor | None, rotated: bool) -> Tensor:
    """Mean square of each conditioned input, [K]; a rotation evens it out within its blocks."""
    squares = squares if before is None else squares * before.square()
    if rotated:
        block = block_size(len(squares))
        assert block is not None
        squares = squares.view(-1, block).mean(1).repeat_interleave(block)
    return squares if after is None else squares * after.square()


def _half(dtype: torch.dtype) -> torch.dtype:
    """Of the low-rank branch: that of the weight where it has 16 bits, else float16, the finer of the two."""
    return dtype if dtype.itemsize == 2 else torch.float16

"""Block-sparse attention at the planned sites: which they are, when the mask holds there, and what came of it."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffaccel.attention.intercept import NativeBackend, SiteHook
from diffaccel.attention.layout import SIZES, Geometry, is_fake
from diffaccel.attention.learn import Active, Learner
from diffaccel.attention.learned import Learned
from diffaccel.attention.patterns import PatternMaker, require_calibration
from diffaccel.attention.record import SPARSE, AttachedAttention, Record
from diffaccel.attention.section import BlockSparse
from diffaccel.clock import Call
from diffaccel.denoiser import Denoiser, Site, select, timestep_parameter
from diffaccel.errors import DiffAccelError, PlanError
from diffaccel.hooks import install
from diffaccel.plan import in_steps
from diffaccel.root import Compute
from diffaccel.technique import Context


@dataclass(frozen=True)
class Resolved:
    """The planned sites of each denoiser, and for each site the indices of the sections that may hold there."""

    sections: tuple[BlockSparse, ...]
    sites: dict[str, list[tuple[Site, tuple[int, ...]]]]
    notes: tuple[str, ...]


def resolve(sections: Sequence[BlockSparse], context: Context) -> Resolved:
    """Find the sites.

    Raises:
        PlanError: a section matches no attention, or only cross-attention; or the denoiser runs ring attention, which
            splits the keys so that no call sees all of them; or a section needs a calibration that the plan lacks.
    """
    require_calibration(sections, context.artefacts)
    chosen: dict[Site, list[int]] = {}
    cross = 0
    for index, section in enumerate(sections):
        sites = select(context.denoisers, section.sites, "attentions")
        own = [site for site in sites if site.role != "cross"]
        if not own:
            raise PlanError(
                f"BlockSparse.sites={section.sites!r} matches cross-attention only ({len(sites)} sites), which is "
                "never made sparse; use sites='attn' for self-attention and joint attention"
            )
        cross += len(sites) - len(own)
        for site in own:
            chosen.setdefault(site, []).append(index)
    by_denoiser: dict[str, list[tuple[Site, tuple[int, ...]]]] = {}
    for denoiser in context.denoisers:
        planned = [(site, tuple(chosen[site])) for site in denoiser.attentions if site in chosen]
        if planned:
            _refuse_ring(denoiser)
            by_denoiser[denoiser.component] = planned
    notes = (f"{cross} cross-attention sites stay dense",) if cross else ()
    return Resolved(tuple(sections), by_denoiser, notes)


def _refuse_ring(denoiser: Denoiser) -> None:
    config = getattr(getattr(denoiser.module, "_parallel_config", None), "context_parallel_config", None)
    degree = getattr(config, "ring_degree", None) or 1
    if degree > 1:
        raise PlanError(
            f"{denoiser.component} runs ring attention (ring_degree={degree}), where no call sees all "
            "keys; use Ulysses (ulysses_degree), or leave attention out of the plan"
        )


def _rank(denoiser: Denoiser) -> int:
    """Which share of the heads a call sees under Ulysses: 0 without it."""
    config = getattr(getattr(denoiser.module, "_parallel_config", None), "context_parallel_config", None)
    return getattr(config, "_ulysses_local_rank", None) or 0


def attach(resolved: Resolved, context: Context) -> AttachedAttention:
    """Hook every planned site, and the root of its denoiser."""
    runners = []
    for denoiser in context.denoisers:
        planned = resolved.sites.get(denoiser.component)
        if planned:
            runner = SparseDenoiser(denoiser, planned, resolved.sections, context)
            wrappers = context.root(denoiser).wrappers
            context.undo.callback(wrappers.remove, runner)
            wrappers.append(runner)
            runners.append(runner)
    return AttachedAttention(resolved.sections, [(r.sites, r.record) for r in runners], resolved.notes)


class SparseDenoiser:
    """Runs around every call of one denoiser and sets the phase of each site: dense, or the section that holds."""

    def __init__(
        self,
        denoiser: Denoiser,
        planned: Sequence[tuple[Site, tuple[int, ...]]],
        sections: Sequence[BlockSparse],
        context: Context,
    ) -> None:
        self.sites = [site for site, _ in planned]
        self.record = Record(len(planned))
        self._known: dict[_Key, Learned] = {}
        self._moving: set[Any] = set()
        self._read: tuple[int, dict[str, tuple[Any, ...]]] = (-1, {})
        self._component = denoiser.component
        self._sections = sections
        self._choices = [choice for _, choice in planned]
        self._config = denoiser.config
        self._latents = next(iter(inspect.signature(denoiser.module.forward).parameters), "")
        self._timestep = timestep_parameter(denoiser.module)
        self._set: tuple[_Key, _Phase] | None = None
        self._tally: Counter[str] = Counter()
        self._hooks = [SiteHook() for _ in planned]
        self._root_hook: SiteHook | None = None
        self._backends: list[NativeBackend] = []
        for site, hook in zip(self.sites, self._hooks, strict=True):
            if site.module is denoiser.module:
                self._root_hook = hook  # its mode is entered here: the root's own hook stands below
            else:
                context.undo.callback(install(site.module, hook, "attention"))
            backend = NativeBackend(site.module)
            context.undo.callback(backend.restore)
            self._backends.append(backend)
        self._learner = Learner(
            context.root(denoiser),
            denoiser.module,
            self._hooks,
            [[sections[i] for i in choice] for choice in self._choices],
            self._latents,
            PatternMaker(sections, context.artefacts, self.sites, _rank(denoiser)),
        )

    @torch.compiler.disable(recursive=False)
    def __call__(self, call: Call, arguments: Mapping[str, Any], compute: Compute) -> Any:
        other_processors = [backend.hold() for backend in self._backends]
        for backend in self._backends:
            self.record.backends |= backend.overridden
        if any(other_processors):  # they may attend in another way, or not by PyTorch's function: learn again
            self._known.clear()
            self._moving.clear()
            self._set = None
        phase = tuple(
            section.mask_at(call.progress) if in_steps(call.progress, section.steps) else None
            for section in self._sections
        )
        shapes = tuple(_shape(name, value) for name, value in arguments.items() if name != self._timestep)
        key = (shapes, self._lengths(call, arguments) if shapes in self._moving else ())
        if key not in self._known:
            key, output, again = torch.compiler.disable(self._learn)(shapes, call, phase, arguments, compute)
            self._enter(key, phase)
            if not again:
                self.record.calls.update(self._tally)
                return output
        self._enter(key, phase)
        output = self._run(compute)
        self.record.calls.update(self._tally)
        return output

    def _learn(
        self, shapes: Any, call: Call, phase: _Phase, arguments: Mapping[str, Any], compute: Compute
    ) -> tuple[_Key, Any, bool]:
        geometry = Geometry(arguments, self._config, self._latents)
        active = [self._active(site, phase) for site in range(len(self.sites))]
        learned, output, was_compiled = self._learner.learn(geometry, active, lambda: self._run(compute))
        if not learned.seen:
            had = ", ".join(sorted(self.record.backends))
            raise DiffAccelError(
                f"sparse attention was planned for {len(self.sites)} sites of {self._component}, but none of them "
                f"called scaled_dot_product_attention{f' (backend set before: {had})' if had else ''}: linear "
                "attention, or a processor with an implementation of its own. Leave attention out of the plan, or set "
                "processors that call PyTorch's function"
            )
        key: _Key = (shapes, ())
        if learned.probed:  # text among the tokens: masks may move the image, or change how many tokens there are
            self._moving.add(shapes)
            key = (shapes, self._lengths(call, arguments))
        while len(self._known) >= _MOST_SHAPES:
            del self._known[next(iter(self._known))]
        self._known[key] = learned
        self.record.learned(learned)
        return key, output, was_compiled

    def _enter(self, key: _Key, phase: _Phase) -> None:
        """Put the patterns of this phase on the hooks."""
        if self._set == (key, phase):
            return
        learned = self._known[key]
        self._tally = Counter()
        for site, hook in enumerate(self._hooks):
            active = self._active(site, phase)
            section = active[0] if active is not None else None
            hook.patterns = learned.patterns(site, *active) if active is not None else ()
            for reason, calls in learned.dense.get(site, {}).items():
                self._tally[reason] += calls
            for tokens, calls in learned.suitable.get(site, {}).items():
                why = learned.why_dense(site, tokens, section) if section is not None else "outside its steps"
                self._tally[why or SPARSE] += calls
        self.record.saw(learned)
        self._set = (key, phase)

    def _lengths(self, call: Call, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        """Text lengths by masks. Off the CPU they are read once a run and branch: later calls of it have the same."""
        masks = [v for name, v in arguments.items() if isinstance(v, Tensor) and _tells_length(name, v)]
        if any(mask.device.type != "cpu" for mask in masks):
            if self._read[0] != call.run:
                self._read = (call.run, {})
            if call.branch not in self._read[1]:
                self._read[1][call.branch] = _sums(masks)
            return self._read[1][call.branch]
        return _sums(masks)

    def _active(self, site: int, phase: _Phase) -> Active:
        """The last section that covers the site and holds now, and its set of masks."""
        held = ((self._sections[i], phase[i]) for i in reversed(self._choices[site]))
        return next(((section, masks) for section, masks in held if masks is not None), None)

    def _run(self, compute: Compute) -> Any:
        mode = self._root_hook.mode() if self._root_hook is not None else None
        with mode or nullcontext():
            return compute()


_Phase = tuple[int | None, ...]
_Key = tuple[Any, tuple[Any, ...]]

_MOST_SHAPES = 32


def _tells_length(name: str, value: Tensor) -> bool:
    """A mask over tokens, or lengths; not per-token data, which changes with every prompt."""
    return not is_fake(value) and (value.dtype == torch.bool or "mask" in name or name.endswith(("lens", "lengths")))


def _sums(masks: Sequence[Tensor]) -> tuple[Any, ...]:
    return tuple(tuple(mask.reshape(len(mask), -1).sum(1).tolist()) if mask.ndim else () for mask in masks)


def _shape(name: str, value: Any) -> Any:
    """What layouts depend on, hashable: the shapes of all tensors inside, and whole numbers where they are sizes."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device, id(getattr(value, "fake_mode", None))
    if isinstance(value, Mapping):
        return tuple((k, _shape(k, v)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return tuple(v if isinstance(v, int) else _shape("", v) for v in value)
    return value if name in SIZES else None

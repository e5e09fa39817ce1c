"""What happens at the planned sites during one denoiser call: learned on the first real call of each shape.

The first call runs uncompiled and watched. Where a call's tokens are more than the image grid, it is cut off there and
run again up to the same place with changed latents: rows that stay the same are not image tokens. Then it runs to its
end. Models without text among their tokens are never run twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffaccel.attention.intercept import SiteHook, WatchedCalls, sparse_attention, uncompiled, unsuitable
from diffaccel.attention.layout import Geometry, Layout, Span, is_fake, span_of
from diffaccel.attention.learned import FEWEST_BLOCKS, Learned, Timing
from diffaccel.attention.patterns import Pattern, PatternMaker
from diffaccel.attention.section import BlockSparse
from diffaccel.kernels._candidates import seconds_of
from diffaccel.kernels.block_pattern import BlockPattern
from diffaccel.kernels.block_sparse import path_for
from diffaccel.plan import Artefacts
from diffaccel.root import Compute, RootHook

Active = tuple[BlockSparse, int] | None
"""The section that holds at a site, and which of its sets of masks."""

_MOST_PROBES = 6


class _CutOff(BaseException):
    """Ends a forward early; not an Exception, so that no model's ``except`` swallows it."""


class _Unexplained(_CutOff):
    """The call at hand has tokens that the arguments do not explain."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens


class Learner:
    """Learns the calls of one denoiser.

    Args:
        root: the hook on the denoiser's root.
        module: the denoiser.
        hooks: of the planned sites.
        sections: for each site, the sections that may hold there.
        latents: name of the denoiser's argument that holds the latents, its first.
        maker: of the patterns; not needed to learn layouts only.
    """

    def __init__(
        self,
        root: RootHook,
        module: nn.Module,
        hooks: Sequence[SiteHook],
        sections: Sequence[Sequence[BlockSparse]],
        latents: str,
        maker: PatternMaker | None = None,
    ) -> None:
        self._maker = maker or PatternMaker((), Artefacts(), ())
        self._root = root
        self._module = module
        self._hooks = hooks
        self._sections = sections
        self._latents = latents

    def learn(self, geometry: Geometry, active: Sequence[Active], run: Compute) -> tuple[Learned, Any, bool]:
        """Run the call to its end, learning.

        Returns:
            What was learned, the output, and whether something compiled was run uncompiled for it.
        """
        spans: dict[int, Span] = {}
        text_only: set[tuple[int, int]] = set()
        with uncompiled(self._module) as was_compiled:
            while True:
                survey = _Survey(Learned(geometry, self._maker), active, self._sections, spans, text_only)
                survey.may_probe = len(spans) < _MOST_PROBES
                try:
                    with self._watched(survey):
                        output = run()
                    survey.learned.probed = bool(spans)
                    return survey.learned, output, was_compiled
                except _Unexplained as cut:
                    changed = _Survey(Learned(geometry, self._maker), active, self._sections, spans, text_only)
                    changed.stop_at = len(survey.digests)
                    with self._perturbed_latents(), self._watched(changed), suppress(_CutOff):
                        run()
                    spans[cut.tokens] = Span(0, cut.tokens)
                    for (site, plain), (_, other) in zip(survey.digests, changed.digests, strict=False):
                        tokens = plain.shape[1]
                        span = span_of(plain, other) if plain.shape == other.shape else Span(0, tokens, scattered=True)
                        if span.end == 0:
                            text_only.add((site, tokens))
                        if tokens == cut.tokens:
                            spans[tokens] = span

    @contextmanager
    def _watched(self, survey: _Survey) -> Iterator[None]:
        for site, hook in enumerate(self._hooks):
            hook.watcher = partial(WatchedCalls, survey, site)
        try:
            yield
        finally:
            for hook in self._hooks:
                hook.watcher = None

    @contextmanager
    def _perturbed_latents(self) -> Iterator[None]:
        """The root's forward gets other latents (its first argument), whoever calls it."""
        reference = self._root.fn_ref
        forward = reference.original_forward
        name = self._latents

        def perturbed(*args: Any, **kwargs: Any) -> Any:
            if args:
                args = (_perturb(args[0]), *args[1:])
            elif name in kwargs:
                kwargs = {**kwargs, name: _perturb(kwargs[name])}
            return forward(*args, **kwargs)

        reference.original_forward = perturbed
        try:
            yield
        finally:
            reference.original_forward = forward


def _perturb(latents: Any) -> Any:
    """Other latents, each element changed, made without random numbers."""
    if isinstance(latents, list | tuple):
        return type(latents)(_perturb(item) for item in latents)
    if not isinstance(latents, Tensor):
        return latents
    if latents.is_floating_point():
        return latents * 0.5 + 1
    return (latents + 1) % (latents.max() + 1).clamp_min(2)  # token ids stay in the vocabulary


class _Survey:
    """Sees every call of a forward, computes it, and notes what the hooks will need."""

    def __init__(
        self,
        learned: Learned,
        active: Sequence[Active],
        sections: Sequence[Sequence[BlockSparse]],
        spans: Mapping[int, Span],
        text_only: set[tuple[int, int]],
    ) -> None:
        self.learned = learned
        self.digests: list[tuple[int, Tensor]] = []
        self.may_probe = False
        self.stop_at = 0
        self._active = active
        self._sections = sections
        self._spans = spans
        self._text_only = text_only
        self._timed: set[tuple[Any, ...]] = set()

    def __call__(
        self,
        site: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        learned = self.learned
        learned.seen += 1
        learned.fake_mode = getattr(query, "fake_mode", None)
        dense = partial(
            F.scaled_dot_product_attention,
            *(query, key, value, attn_mask, dropout_p, is_causal),
            scale=scale,
            enable_gqa=enable_gqa,
        )
        tokens = query.shape[-2]
        reason = unsuitable(query, key, dropout_p, is_causal) or self._why_dense(site, query)
        if reason is not None:
            learned.dense.setdefault(site, Counter())[reason] += 1
            return dense()
        learned.suitable.setdefault(site, Counter())[tokens] += 1
        learned.devices[site, tokens] = query.device
        learned.heads[site, tokens] = query.shape[1]
        result = None
        active = self._active[site]
        for section in self._sections[site]:
            holds = active is not None and section == active[0]
            pattern = learned.pattern(site, tokens, section, active[1] if holds and active else 0)
            if pattern is None:
                continue
            sparse = partial(
                sparse_attention,
                *(query, key, value, pattern),
                attn_mask=attn_mask,
                scale=scale,
                enable_gqa=enable_gqa,
            )
            self._measure(query, section, attn_mask, pattern, dense, sparse)
            if holds:
                result = sparse()
            if isinstance(pattern, BlockPattern) and not is_fake(query):
                learned.paths.add(str(path_for(query, key, value, pattern, attn_mask)))
        return dense() if result is None else result

    def _why_dense(self, site: int, query: Tensor) -> str | None:
        """Also finds the layout; cuts the forward off where only a probe can tell it."""
        tokens = query.shape[-2]
        smallest = min(section.block_size for section in self._sections[site])
        if -(-tokens // smallest) < FEWEST_BLOCKS:
            return f"fewer than {FEWEST_BLOCKS} blocks of tokens"
        learned = self.learned
        if not is_fake(query):
            self._note(site, query)
        if (site, tokens) in self._text_only:
            return "no image tokens"
        if learned.layouts.get(tokens) is None:
            span = self._spans.get(tokens)
            if span is not None and span.end == 0:
                return "no image tokens"
            known = [layout for layout in learned.layouts.values() if layout is not None]
            layout = learned.geometry.layout(tokens, span, known)
            if layout is None and self.may_probe and not is_fake(query):
                raise _Unexplained(tokens)
            if layout is None:
                why = "no data to look at" if is_fake(query) else "too many kinds of calls to probe"
                layout = Layout((tokens,), 0, 0, "one row", f"{why}: nothing assumed about text")
            learned.layouts[tokens] = layout
        return None

    def _note(self, site: int, query: Tensor) -> None:
        rows = query[:, 0].detach().float()
        weights = torch.arange(1, rows.shape[-1] + 1, device=rows.device, dtype=rows.dtype)
        self.digests.append((site, rows @ weights))
        if self.stop_at == len(self.digests):
            raise _CutOff

    def _measure(
        self,
        query: Tensor,
        section: BlockSparse,
        attn_mask: Tensor | None,
        pattern: Pattern,
        dense: Callable[[], Tensor],
        sparse: Callable[[], Tensor],
    ) -> None:
        kind = (tuple(query.shape), section, attn_mask is None)
        if pattern.whole or kind in self._timed or self.stop_at or is_fake(query) or _capturing(query):
            return
        self._timed.add(kind)
        sparse()  # the kernel chooses its path and compiles
        seconds = [(seconds_of(dense, query.device), seconds_of(sparse, query.device))]
        while len(seconds) < 5 and sum(map(sum, seconds)) < 0.05:
            seconds.append((seconds_of(dense, query.device), seconds_of(sparse, query.device)))
        best_dense, best_sparse = (min(column) for column in zip(*seconds, strict=True))
        self.learned.timings.append(Timing(best_dense, best_sparse, tuple(query.shape)))


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()

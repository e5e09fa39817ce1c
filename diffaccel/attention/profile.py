"""Watches the attention of a denoiser while the pipeline runs, for the calibration of sparse attention.

The first call of each shape teaches the layouts and is not watched; it and all others are computed densely.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.attention.intercept import Patterns, SiteHook, WatchedCalls, uncompiled, unsuitable
from diffaccel.attention.layout import Geometry, Layout
from diffaccel.attention.learn import Learner
from diffaccel.attention.learned import FEWEST_BLOCKS, Learned
from diffaccel.attention.patterns import PatternMaker
from diffaccel.attention.section import BlockSparse
from diffaccel.clock import Call
from diffaccel.denoiser import Denoiser, Site
from diffaccel.hooks import install
from diffaccel.latents import output_tensors
from diffaccel.root import Compute
from diffaccel.technique import Context


@dataclass(frozen=True)
class Seen:
    """One attention call on an image.

    Args:
        site: index of the site.
        layout: of its tokens.
        query: [B, H, N, D]; key, value: [B, H or Hkv, N, D].
        attn_mask: None, bool or additive.
        scale: None for D ** -0.5.
    """

    site: int
    layout: Layout
    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    scale: float | None


Witness = Callable[[Call, Seen], None]


class Profiler:
    """Shows every attention call of the planned sites of one denoiser to a witness.

    Args:
        denoiser: the denoiser.
        sites: of its attentions.
        section: whose block size says which calls are too short.
        context: hooks are installed in it.

    Attributes:
        witness: told of each call; None while nobody listens.
        trial: called after each call of the denoiser with where it stands, its outputs, and how to run it again.
    """

    def __init__(self, denoiser: Denoiser, sites: Sequence[Site], section: BlockSparse, context: Context) -> None:
        self.sites = list(sites)
        self.witness: Witness | None = None
        self.trial: Callable[[Call, list[Tensor], Callable[[], list[Tensor]]], None] | None = None
        self._denoiser = denoiser
        self._block_size = section.block_size
        self._hooks = [SiteHook() for _ in sites]
        self._at_root: SiteHook | None = None
        for site, hook in zip(self.sites, self._hooks, strict=True):
            if site.module is denoiser.module:
                self._at_root = hook  # its mode is entered here: the root's own hook stands below
            else:
                context.undo.callback(install(site.module, hook, "profile"))
        self._latents = next(iter(inspect.signature(denoiser.module.forward).parameters), "")
        layouts_only = BlockSparse(density=1.0, block_size=section.block_size)
        self._learner = Learner(
            context.root(denoiser), denoiser.module, self._hooks, [[layouts_only]] * len(self._hooks), self._latents
        )
        self._known: dict[Any, Learned] = {}
        context.root(denoiser).wrappers.append(self)

    def put(self, site: int, patterns: Patterns) -> None:
        """Lets calls of a site run sparse while nobody watches: during a `trial`."""
        self._hooks[site].patterns = patterns

    def why_nothing(self) -> str:
        """Why no call was shown."""
        reasons: Counter[str] = Counter()
        for learned in self._known.values():
            if not learned.seen:
                reasons["no call of scaled_dot_product_attention: linear attention, or a processor of its own"] += 1
            for calls in learned.dense.values():
                reasons.update(calls)
            for lengths in learned.suitable.values():
                for tokens, count in lengths.items():
                    reasons["no image tokens" if learned.layouts.get(tokens) is None else "outside its steps"] += count
        return ", ".join(f"{reason} ({count})" for reason, count in reasons.items()) or "the denoiser was never called"

    def sparse(self, section: BlockSparse, maker: PatternMaker, call: Call) -> dict[int, Patterns]:
        """Site -> what `put` needs for it to run under ``section`` where ``call`` stands."""
        found: dict[int, Patterns] = {}
        for learned in self._known.values():
            for site, calls in learned.suitable.items():
                for tokens in calls:
                    layout, heads = learned.layouts[tokens], learned.heads[site, tokens]
                    assert layout is not None
                    if maker.why_dense(site, layout, section, heads) is None:
                        made = maker.make(site, layout, section, section.mask_at(call.progress), heads)
                        found[site] = (*found.get(site, ()), (tokens, made.to(learned.devices[site, tokens])))
        return found

    def __call__(self, call: Call, arguments: Mapping[str, Any], compute: Compute) -> Any:
        shapes = tuple((n, tuple(v.shape)) for n, v in arguments.items() if isinstance(v, Tensor))
        if shapes not in self._known:
            geometry = Geometry(arguments, self._denoiser.config, self._latents)
            run = partial(self._run, compute)
            learned, output, _ = self._learner.learn(geometry, [None] * len(self.sites), run)
            self._known[shapes] = learned
            return output
        watch = partial(self._watch, call, self._known[shapes])
        with uncompiled(self._denoiser.module):
            if self.witness is not None:
                for site, hook in enumerate(self._hooks):
                    hook.watcher = partial(WatchedCalls, watch, site)
            try:
                output = self._run(compute)
            finally:
                for hook in self._hooks:
                    hook.watcher = None
            if self.trial is not None:
                self.trial(call, output_tensors(output), lambda: output_tensors(self._run(compute)))
        return output

    def _run(self, compute: Compute) -> Any:
        mode = self._at_root.mode() if self._at_root is not None else None
        with mode or nullcontext():
            return compute()

    def _watch(
        self,
        call: Call,
        learned: Learned,
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
        tokens = query.shape[-2]
        layout = learned.layouts.get(tokens)
        long = -(-tokens // self._block_size) >= FEWEST_BLOCKS
        seen_there = tokens in learned.suitable.get(site, ())
        if layout is not None and long and seen_there and unsuitable(query, key, dropout_p, is_causal) is None:
            assert self.witness is not None
            with torch.no_grad():
                self.witness(call, Seen(site, layout, query, key, value, attn_mask, scale))
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

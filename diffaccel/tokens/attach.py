"""Token merging at the planned attention sites."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks import ModelHook
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffaccel.clock import Call
from diffaccel.denoiser import Denoiser, Site, select
from diffaccel.errors import PlanError
from diffaccel.hooks import install
from diffaccel.latents import latent_tensors
from diffaccel.plan import in_steps
from diffaccel.report import TechniqueReport
from diffaccel.root import Compute
from diffaccel.technique import Context
from diffaccel.tokens.merge import features, merge, neighbours_in_space, neighbours_in_time
from diffaccel.tokens.section import MergeTokens

_LEVELS = 6  # of a UNet
_MOST_TEXT = 4096  # tokens beside the image's in one call
_FEWEST = 16  # keys below which nothing is merged


@dataclass(frozen=True)
class Resolved:
    """The sections and, by denoiser, the sites with the indices of the sections that may hold there."""

    sections: tuple[MergeTokens, ...]
    sites: Mapping[str, Sequence[tuple[Site, tuple[int, ...]]]]


def resolve(sections: Sequence[MergeTokens], context: Context) -> Resolved:
    """Find the sites.

    Raises:
        PlanError: a section matches no attention, or only cross-attention.
    """
    chosen: dict[Site, list[int]] = {}
    for index, section in enumerate(sections):
        own = [s for s in select(context.denoisers, section.sites, "attentions") if s.role != "cross" and s.name]
        if not own:
            raise PlanError(
                f"MergeTokens.sites={section.sites!r} matches cross-attention only, whose keys are text; use 'attn'"
            )
        for site in own:
            chosen.setdefault(site, []).append(index)
    sites = {d.component: [(s, tuple(chosen[s])) for s in d.attentions if s in chosen] for d in context.denoisers}
    return Resolved(tuple(sections), {component: found for component, found in sites.items() if found})


def attach(resolved: Resolved, context: Context) -> AttachedTokens:
    """Hook every planned site, and the root of its denoiser."""
    runners = []
    for denoiser in context.denoisers:
        if planned := resolved.sites.get(denoiser.component):
            runner = _Runner(denoiser, planned, resolved.sections, context)
            wrappers = context.root(denoiser).wrappers
            wrappers.append(runner)
            context.undo.callback(wrappers.remove, runner)
            runners.append(runner)
    return AttachedTokens(resolved.sections, runners)


@dataclass(frozen=True)
class _Image:
    """How many tokens the image of a call has, and its frames."""

    tokens: int
    frames: int

    def span(self, n: int) -> tuple[int, int] | None:
        """Begin and end of the keys that may be merged in a call with ``n``; None where it is not told which are.

        Text stands before the image or behind it: as many tokens are left alone at both ends.
        """
        whole = (self.tokens, self.tokens // self.frames)
        if any(n == size >> (2 * level) for size in whole for level in range(_LEVELS)):
            return 0, n
        text = n - self.tokens
        return (text, n - text) if 0 < text <= min(_MOST_TEXT, self.tokens // 2) else None


class _Runner:
    """Runs around every call of one denoiser and tells its sites what holds now."""

    def __init__(
        self,
        denoiser: Denoiser,
        planned: Sequence[tuple[Site, tuple[int, ...]]],
        sections: Sequence[MergeTokens],
        context: Context,
    ) -> None:
        self.sites = len(planned)
        self.calls: Counter[str] = Counter()
        self._config = denoiser.config
        self._sections = sections
        self._choices = [choice for _, choice in planned]
        self._hooks = [_SiteHook(self.calls) for _ in planned]
        for (site, _), hook in zip(planned, self._hooks, strict=True):
            context.undo.callback(install(site.module, hook, "tokens"))

    def __call__(self, call: Call, arguments: Mapping[str, Any], compute: Compute) -> Any:
        image = _image_of(arguments, self._config)
        for hook, choice in zip(self._hooks, self._choices, strict=True):
            held = [self._sections[i] for i in choice if in_steps(call.progress, self._sections[i].steps)]
            hook.section, hook.image = held[-1] if held else None, image
        try:
            return compute()
        finally:
            for hook in self._hooks:
                hook.section = None


def _image_of(arguments: Mapping[str, Any], config: Mapping[str, Any]) -> _Image | None:
    """By the latents: packed tokens [B, N, C], planes [B, C, H, W] or a volume with the channels before or behind the
    frames, cut into patches."""
    latents = latent_tensors(arguments)
    if not latents:
        return None
    shape = tuple(latents[0].shape)
    patch = config.get("patch_size", 1)
    sides = [patch] * 2 if isinstance(patch, int) else list(patch or [1])[-2:]
    in_time = config.get("patch_size_t") or (patch[0] if isinstance(patch, list | tuple) and len(patch) == 3 else 1)
    given = arguments.get("num_frames")
    if len(shape) == 3:
        return _Image(shape[1], given if isinstance(given, int) and given > 0 and shape[1] % given == 0 else 1)
    if len(shape) not in (4, 5):
        return None
    frames = 1
    if len(shape) == 5:
        channels_first = shape[1] == config.get("in_channels") or shape[2] != config.get("in_channels")
        frames = max(shape[2 if channels_first else 1] // in_time, 1)
    return _Image(frames * (shape[-2] // sides[0]) * (shape[-1] // sides[-1]), frames)


class _SiteHook(ModelHook):
    """On an attention module: merges keys inside its calls while a section holds."""

    _is_stateful = False

    def __init__(self, calls: Counter[str]) -> None:
        super().__init__()
        self.section: MergeTokens | None = None
        self.image: _Image | None = None
        self._calls = calls

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.section is None or self.image is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        with _MergedCalls(self.section, self.image, self._calls):
            return self.fn_ref.original_forward(*args, **kwargs)


class _MergedCalls(TorchFunctionMode):
    """Replaces attention over all keys by attention over merged ones."""

    def __init__(self, section: MergeTokens, image: _Image, calls: Counter[str]) -> None:
        super().__init__()
        self._section, self._image, self._calls = section, image, calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        why, span = self._unsuitable(query, key, attn_mask, is_causal)
        if not torch.compiler.is_compiling():  # compiled, the site's calls are not counted
            self._calls[why or "merged"] += 1
        if span is not None:
            key, value, sizes = self._merged(key, value, span)
            attn_mask = sizes if self._section.proportional else None
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    def _unsuitable(
        self, query: Tensor, key: Tensor, mask: Tensor | None, causal: bool
    ) -> tuple[str | None, tuple[int, int] | None]:
        """Why a call stays as it is, or which of its keys may be merged."""
        if query.ndim != 4 or query.shape[-2] != key.shape[-2]:
            return "not self-attention", None
        if mask is not None or causal:
            return "masked", None
        n = key.shape[-2]
        span = self._image.span(n)
        if span is None or span[1] - span[0] < _FEWEST:
            return f"{n} keys are not those of the image", None
        frames = self._image.frames
        if self._section.axis == "time" and (frames < 2 or n != self._image.tokens):
            return "no frames alone in one call", None
        return None, span

    def _merged(self, key: Tensor, value: Tensor, span: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        section, (begin, end) = self._section, span
        compared = features(key[:, :, begin:end])
        if section.axis == "time":
            groups = neighbours_in_time(compared, section.ratio, self._image.frames)
        else:
            groups = neighbours_in_space(compared, section.ratio, section.window)
        return merge(key, value, groups, begin)


class AttachedTokens:
    """Token merging at work."""

    def __init__(self, sections: Sequence[MergeTokens], runners: Sequence[_Runner]) -> None:
        self._sections, self._runners = sections, runners

    def report(self) -> TechniqueReport:
        calls = sum((runner.calls for runner in self._runners), Counter())
        merged = calls.pop("merged", 0)
        notes = []
        if calls and not merged:
            notes.append("no call was merged: " + ", ".join(calls))
        return TechniqueReport(
            "tokens",
            "; ".join(
                f"{s.ratio:.0%} of the keys along {s.axis} at {s.sites!r}, progress {s.steps[0]:g} to {s.steps[1]:g}"
                for s in self._sections
            ),
            sites=sum(runner.sites for runner in self._runners),
            facts={"calls_merged": merged, "calls_left": dict(calls)},
            notes=notes,
        )

    def bake(self) -> None:
        """Nothing is kept for undoing."""

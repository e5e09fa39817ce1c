"""One point where every attention call passes: ``torch.nn.functional.scaled_dot_product_attention`` inside a site.

A hook on the site's module enters a function mode inside the wrapped forward. Compiled with the site, the mode leaves
no trace but the call it replaced. What it reads is the same for all blocks: tensors, and how many there are. No name,
counter or density is a Python value here, so that blocks of one class share one graph for each phase.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from diffusers.hooks import ModelHook
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffaccel.kernels.block_pattern import BlockPattern
from diffaccel.kernels.block_sparse import block_sparse_attention
from diffaccel.kernels.online_sparse import OnlinePattern, online_sparse_attention

Patterns = tuple[tuple[int, BlockPattern | OnlinePattern], ...]
"""The block pattern for each number of tokens; calls with other numbers stay dense."""


Watch = Callable[..., Tensor]
"""Sees every attention call of a site while its layouts are being learned, and computes it: gets the site's index, then
the arguments of ``scaled_dot_product_attention``."""


def unsuitable(query: Tensor, key: Tensor, dropout_p: float, is_causal: bool) -> str | None:
    """Why a call cannot be made sparse whatever its layout; None if it can."""
    if query.ndim != 4:
        return f"queries have {query.ndim} axes, not 4"
    if query.shape[-2] != key.shape[-2]:
        return "queries and keys differ in number (cross-attention)"
    if is_causal:
        return "causal"
    if dropout_p > 0:
        return "dropout"
    return None


def sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern | OnlinePattern, **options: Any
) -> Tensor:
    """One call by its pattern; ``options`` as of `block_sparse_attention`."""
    if isinstance(pattern, OnlinePattern):
        return online_sparse_attention(query, key, value, pattern, **options)
    return block_sparse_attention(query, key, value, pattern, **options)


class SparseCalls(TorchFunctionMode):
    """Replaces the dense calls for which there is a pattern."""

    def __init__(self, patterns: Patterns) -> None:
        super().__init__()
        self.patterns = patterns

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        return func(*args, **kwargs)

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
        if unsuitable(query, key, dropout_p, is_causal) is None:
            for tokens, pattern in self.patterns:
                if query.shape[-2] == tokens:
                    return sparse_attention(
                        query, key, value, pattern, attn_mask=attn_mask, scale=scale, enable_gqa=enable_gqa
                    )
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )


class WatchedCalls(TorchFunctionMode):
    """Hands every attention call of a site to a `Watch`."""

    def __init__(self, watch: Watch, site: int) -> None:
        super().__init__()
        self._watch = watch
        self._site = site

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._watch(self._site, *args, **kwargs)
        return func(*args, **kwargs)


class SiteHook(ModelHook):
    """On a site's module. ``patterns`` is set from outside the compiled region; empty leaves every call dense."""

    def __init__(self) -> None:
        super().__init__()
        self.patterns: Patterns = ()
        self.watcher: Callable[[], WatchedCalls] | None = None

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        mode = self.mode()
        if mode is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        with mode:
            return self.fn_ref.original_forward(*args, **kwargs)

    def mode(self) -> TorchFunctionMode | None:
        """A fresh mode for one forward; None while there is nothing to replace."""
        if self.watcher is not None:
            return self.watcher()
        return SparseCalls(self.patterns) if self.patterns else None


class NativeBackend:
    """Lets the attention processors inside ``module`` call PyTorch's attention, whatever backend the user sets.

    Attributes:
        overridden: names of the other backends that were set, before or since.
    """

    def __init__(self, module: nn.Module) -> None:
        self.overridden: set[str] = set()
        self._module = module
        self._holders = [m for m in module.modules() if hasattr(m, "processor")]
        self._processors = [holder.processor for holder in self._holders]
        self._owners: list[Any] = []
        self._before: list[Any] = []
        self._adopt()

    def hold(self) -> bool:
        """Override again where the user set another backend meanwhile; `restore` then leaves the user's.

        Returns:
            Whether the user also set other processors: what was learned about the old ones no longer holds.
        """
        for index, owner in enumerate(self._owners):
            if owner._attention_backend is not AttentionBackendName.NATIVE:
                self._before[index] = owner._attention_backend
                self._override(owner)
        processors = [holder.processor for holder in self._holders]
        if all(new is old for new, old in zip(processors, self._processors, strict=True)):
            return False
        self._processors = processors
        self._adopt()
        return True

    def restore(self) -> None:
        """Put the backends back."""
        self.hold()
        for owner, own in zip(self._owners, self._before, strict=True):
            if own is _ABSENT:
                owner.__dict__.pop("_attention_backend", None)
            else:
                owner.__dict__["_attention_backend"] = own

    def _adopt(self) -> None:
        """Take in owners not known yet. Old processors stay known: the user may put them back at any time."""
        for owner in _dispatching(self._module.modules()):
            if not any(owner is known for known in self._owners):
                self._owners.append(owner)
                self._before.append(owner.__dict__.get("_attention_backend", _ABSENT))
                self._override(owner)

    def _override(self, owner: Any) -> None:
        backend = owner._attention_backend
        if backend is not None and AttentionBackendName(backend) is not AttentionBackendName.NATIVE:
            self.overridden.add(AttentionBackendName(backend).value)
        owner.__dict__["_attention_backend"] = AttentionBackendName.NATIVE


_ABSENT = object()


def _dispatching(modules: Iterable[nn.Module]) -> Iterator[Any]:
    """The processors (or modules) that choose a backend for themselves."""
    for module in modules:
        for owner in (module, getattr(module, "processor", None)):
            if owner is not None and hasattr(owner, "_attention_backend"):
                yield owner


@contextmanager
def uncompiled(root: nn.Module) -> Iterator[bool]:
    """Every compiled part below ``root`` runs as plain Python; yields whether there is one. Touches instances only."""
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    for module in root.modules():
        if module.__dict__.get("_compiled_call_impl") is not None:  # module.compile()
            replaced.append((module.__dict__, "_compiled_call_impl", module.__dict__["_compiled_call_impl"]))
            module.__dict__["_compiled_call_impl"] = None
        elif (inner := module._modules.get("_orig_mod")) is not None and "forward" in module.__dict__:
            # torch.compile(module)
            replaced.append((module.__dict__, "forward", module.__dict__["forward"]))
            module.__dict__["forward"] = inner.__call__
    try:
        yield bool(replaced)
    finally:
        for attributes, name, value in replaced:
            attributes[name] = value

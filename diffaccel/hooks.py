"""Hooks on module instances, by diffusers' registry, that come off without a trace.

diffusers' own removal leaves the registry and an instance attribute ``forward`` behind, drops a wrapper that accelerate
put around it, and loses the hook above when a hook in the middle goes. `install` returns an undo that leaves none of
this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import CacheContext, StateManager
from torch import nn


def install(module: nn.Module, hook: ModelHook, name: str) -> Callable[[], None]:
    """Put ``hook`` around ``module.forward`` as ``diffaccel.<name>``; returns the function that takes it off again."""
    name = f"diffaccel.{name}"
    before = module.forward
    created = "_diffusers_hook" not in module.__dict__
    registry = HookRegistry.check_if_exists_or_initialize(module)
    if created:
        registry._created_by_diffaccel = True
    registry.register_hook(hook, name)
    registry.invalidate_child_registries_cache()
    ours = module.forward

    def remove() -> None:
        index = registry._hook_order.index(name)
        above = registry._fn_refs[index + 1] if index + 1 < len(registry._fn_refs) else None
        wrapper = module.forward if above is None and module.forward is not ours else None
        kept = above.forward if above is not None and above.original_forward is not None else None
        registry.remove_hook(name, recurse=False)
        if kept is not None and above is not None:  # remove_hook linked past the hook above
            above.original_forward, above.forward = above.forward, kept
        if wrapper is not None:  # accelerate wrapped our forward: keep its wrapper, give it what was below us
            module.__dict__["forward"] = wrapper
            if getattr(module, "_old_forward", None) is ours:
                module.__dict__["_old_forward"] = before
        elif getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
            del module.forward  # the class's own, which remove_hook left on the instance
        if not registry.hooks and hasattr(registry, "_created_by_diffaccel"):
            del module._diffusers_hook
        registry.invalidate_child_registries_cache()

    return remove


class ContextTap(StateManager):
    """Receives the cache context that a pipeline opens around a denoiser call; None where it opens none."""

    def __init__(self) -> None:
        super().__init__(dict)

    @property
    def context(self) -> CacheContext | None:
        return self._context

    def reset(self, *args: Any, **kwargs: Any) -> None:
        self._context = None

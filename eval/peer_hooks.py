"""Putting other people's accelerations on a pipeline and taking them off, whatever they leave behind."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from diffusers.hooks.hooks import CacheContext, StateManager
from torch import nn

from diffaccel.denoiser import Denoiser
from diffaccel.errors import InputError
from diffaccel.watch import watch_method


def restored(model: nn.Module) -> Callable[[], None]:
    """What brings attributes, weights and parts of all modules, hooks among them, back to what they are now."""
    before = {m: (dict(m.__dict__), dict(m._parameters), dict(m._modules)) for m in model.modules()}
    # A pipeline that opens cache contexts leaves registries behind, which hooks are then added to.
    registries = [m.__dict__["_diffusers_hook"] for m in before if "_diffusers_hook" in m.__dict__]
    hooks = [(r, dict(r.hooks), list(r._hook_order), list(r._fn_refs)) for r in registries]

    def restore() -> None:
        for module, (attributes, parameters, parts) in before.items():
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for now, then in ((module._parameters, parameters), (module._modules, parts)):
                now.clear()
                now.update(then)  # type: ignore[arg-type]
        for registry, named, order, references in hooks:
            registry.hooks, registry._hook_order, registry._fn_refs = named, order, references
            registry.invalidate_child_registries_cache()

    return restore


def attach_cache(pipe: Any, denoiser: Denoiser, apply: Callable[..., None], config: Any, undo: ExitStack) -> None:
    """Put a cache of diffusers on, starting afresh with every schedule and in a context where the pipeline sets none.

    Raises:
        InputError: it finds nothing to hook.
    """
    from diffusers.hooks import HookRegistry

    apply(denoiser.module, config)
    registry = HookRegistry.check_if_exists_or_initialize(denoiser.module)
    scheduler = pipe.scheduler
    undo.callback(watch_method(scheduler, "set_timesteps", lambda _: registry.reset_stateful_hooks(recurse=True)))
    if not any(hooks_of(part) for part in denoiser.module.modules()):
        raise InputError("it finds nothing to hook in this model")
    handle = denoiser.module.register_forward_pre_hook(_with_context)
    undo.callback(handle.remove)


def _with_context(module: nn.Module, arguments: Any) -> None:
    for manager in state_managers(module):
        if manager._context is None:
            manager.set_context(CacheContext(name="one"))


def state_managers(module: nn.Module) -> list[StateManager]:
    """Where the caches of diffusers in this module keep what they know, by context."""
    found = [s for part in module.modules() for hook in hooks_of(part) for s in vars(hook).values()]
    return list({id(s): s for s in found if isinstance(s, StateManager)}.values())


def hooks_of(module: nn.Module) -> list[Any]:
    """The hooks of diffusers on this module itself."""
    return list(getattr(module.__dict__.get("_diffusers_hook"), "hooks", {}).values())

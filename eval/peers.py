"""Other people's accelerations as rows of a comparison: put on a pipeline, run as they are, taken off again.

Each is used as its documentation says, with one help: a cache of diffusers that wants a cache context gets one where
the pipeline sets none, and starts afresh with every schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from diffusers.hooks.hooks import CacheContext, StateManager
from torch import nn

from diffaccel.denoiser import Denoiser, find_denoisers
from diffaccel.errors import InputError, MissingPackageError, did_you_mean
from diffaccel.watch import watch_method

Put = Callable[[Any, Denoiser, float, ExitStack], None]
"""Gets pipeline, denoiser, setting, and where to register what undoes it."""


@dataclass(frozen=True)
class Peer:
    """One acceleration of somebody else.

    Args:
        name: as users write it.
        put: puts it on one denoiser.
        settings: of its knob, from careful to fast, tried when none is asked for; empty where it has none.
        package: that it needs, by the name pip knows.
    """

    name: str
    put: Put
    settings: tuple[float, ...] = ()
    package: str = "diffusers"

    def on(self, setting: float | None) -> Callable[[Any], AbstractContextManager[None]]:
        """What `compare` takes as a plan."""
        return partial(_applied, self, setting)


@contextmanager
def _applied(peer: Peer, setting: float | None, pipe: Any) -> Iterator[None]:
    value = setting if setting is not None else (peer.settings or (0.0,))[0]
    with ExitStack() as undo:
        for denoiser in find_denoisers(pipe):
            undo.callback(_restored(denoiser.module))
            try:
                peer.put(pipe, denoiser, value, undo)
            except ModuleNotFoundError as error:
                raise MissingPackageError(
                    f"{peer.name} needs {peer.package}: pip install {peer.package} ({error})"
                ) from None
        yield


def _restored(model: nn.Module) -> Callable[[], None]:
    """What brings the attributes and weights of all modules, and so forwards and hooks, back to what they are now."""
    before = {module: (dict(module.__dict__), dict(module._parameters)) for module in model.modules()}
    # A pipeline that opens cache contexts leaves registries behind, which hooks are then added to.
    registries = [m.__dict__["_diffusers_hook"] for m in before if "_diffusers_hook" in m.__dict__]
    hooks = [(r, dict(r.hooks), list(r._hook_order), list(r._fn_refs)) for r in registries]

    def restore() -> None:
        for module, (attributes, parameters) in before.items():
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._parameters.clear()
            module._parameters.update(parameters)
        for registry, named, order, references in hooks:
            registry.hooks, registry._hook_order, registry._fn_refs = named, order, references
            registry.invalidate_child_registries_cache()

    return restore


def _diffusers(make: Callable[[Any, float], tuple[Callable[..., None], Any]]) -> Put:
    """A cache of diffusers; ``make`` gives its function and configuration."""

    def put(pipe: Any, denoiser: Denoiser, value: float, undo: ExitStack) -> None:
        from diffusers.hooks import HookRegistry

        apply, config = make(pipe, value)
        apply(denoiser.module, config)
        registry = HookRegistry.check_if_exists_or_initialize(denoiser.module)
        scheduler = pipe.scheduler
        undo.callback(watch_method(scheduler, "set_timesteps", lambda _: registry.reset_stateful_hooks(recurse=True)))
        if not any(_hooks(part) for part in denoiser.module.modules()):
            raise InputError("it finds nothing to hook in this model")
        handle = denoiser.module.register_forward_pre_hook(_with_context)
        undo.callback(handle.remove)

    return put


def _with_context(module: nn.Module, arguments: Any) -> None:
    for part in module.modules():
        for hook in _hooks(part):
            for state in vars(hook).values():
                if isinstance(state, StateManager) and state._context is None:
                    state.set_context(CacheContext(name="one"))


def _hooks(module: nn.Module) -> list[Any]:
    """The hooks of diffusers on this module itself."""
    return list(getattr(module.__dict__.get("_diffusers_hook"), "hooks", {}).values())


def _first_block_cache(pipe: Any, value: float) -> Any:
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    return apply_first_block_cache, FirstBlockCacheConfig(threshold=value)


def _pyramid_attention_broadcast(pipe: Any, value: float) -> Any:
    from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    every = int(value)
    return apply_pyramid_attention_broadcast, PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=every,
        cross_attention_block_skip_range=every + 1,
        current_timestep_callback=partial(_timestep, pipe),
    )


def _faster_cache(pipe: Any, value: float) -> Any:
    from diffusers.hooks import FasterCacheConfig, apply_faster_cache

    return apply_faster_cache, FasterCacheConfig(
        spatial_attention_block_skip_range=int(value), current_timestep_callback=partial(_timestep, pipe)
    )


def _taylorseer(pipe: Any, value: float) -> Any:
    from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

    return apply_taylorseer_cache, TaylorSeerCacheConfig(cache_interval=int(value), taylor_factors_dtype=torch.float32)


def _sea_cache(pipe: Any, value: float) -> Any:
    from diffusers.hooks import SeaCacheConfig, apply_sea_cache

    return apply_sea_cache, SeaCacheConfig(threshold=value)


def _timestep(pipe: Any) -> Any:
    """Where the pipeline says that it is; the scheduler's count where it does not."""
    told = getattr(pipe, "_current_timestep", None)
    if told is not None:
        return told
    index = getattr(pipe.scheduler, "step_index", None) or 0
    return pipe.scheduler.timesteps[min(index, len(pipe.scheduler.timesteps) - 1)]


def _cache_dit(pipe: Any, denoiser: Denoiser, value: float, undo: ExitStack) -> None:
    import cache_dit

    blocks = max((len(m) for m in denoiser.module.children() if isinstance(m, nn.ModuleList)), default=1)
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=min(1, blocks - 1), Bn_compute_blocks=0, residual_diff_threshold=value, max_warmup_steps=3
    )
    cache_dit.enable_cache(pipe, cache_config=config)
    undo.callback(cache_dit.disable_cache, pipe)


def _torchao_int8(pipe: Any, denoiser: Denoiser, value: float, undo: ExitStack) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    blocks = {name for name, m in denoiser.module.named_modules() if isinstance(m, nn.ModuleList)}
    quantize_(
        denoiser.module,
        Int8DynamicActivationInt8WeightConfig(),
        lambda module, name: isinstance(module, nn.Linear) and any(name.startswith(f"{b}.") for b in blocks),
    )


def _compile(pipe: Any, denoiser: Denoiser, value: float, undo: ExitStack) -> None:
    for parts in [m for m in denoiser.module.modules() if isinstance(m, nn.ModuleList)]:
        for part in parts:
            if next(part.parameters(), None) is not None:
                part.compile()


def _deepcache(pipe: Any, denoiser: Denoiser, value: float, undo: ExitStack) -> None:
    from DeepCache import DeepCacheSDHelper

    if denoiser.component != "unet":
        raise InputError("it works on UNets only")
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=int(value), cache_branch_id=0)
    helper.enable()
    undo.callback(helper.disable)


def _tomesd(pipe: Any, denoiser: Denoiser, value: float, undo: ExitStack) -> None:
    import tomesd

    if denoiser.component != "unet":
        raise InputError("it works on UNets only")
    tomesd.apply_patch(pipe, ratio=value)
    undo.callback(tomesd.remove_patch, pipe)


PEERS: Mapping[str, Peer] = MappingProxyType(
    {
        peer.name: peer
        for peer in (
            Peer("first-block-cache", _diffusers(_first_block_cache), (0.05, 0.08, 0.12, 0.2)),
            Peer("pyramid-attention-broadcast", _diffusers(_pyramid_attention_broadcast), (2, 4)),
            Peer("faster-cache", _diffusers(_faster_cache), (2,)),
            Peer("taylorseer", _diffusers(_taylorseer), (2, 3)),
            Peer("sea-cache", _diffusers(_sea_cache), (0.15, 0.25)),
            Peer("cache-dit", _cache_dit, (0.08, 0.12, 0.2), "cache-dit"),
            Peer("deepcache", _deepcache, (2, 3), "DeepCache"),
            Peer("tomesd", _tomesd, (0.5,), "tomesd"),
            Peer("torchao-int8", _torchao_int8, (), "torchao"),
            Peer("torch-compile", _compile, (), "torch"),
        )
    }
)


def peers_of(names: Sequence[str]) -> dict[str, Callable[[Any], AbstractContextManager[None]]]:
    """Rows by name: ``first-block-cache=0.08`` is one, a bare name one for each of its settings, ``all`` every one.

    Raises:
        InputError: an unknown name, or a setting that is no number.
    """
    rows: dict[str, Callable[[Any], AbstractContextManager[None]]] = {}
    for text in [name for given in names for name in (PEERS if given == "all" else [given])]:
        name, sign, value = text.partition("=")
        if name not in PEERS:
            raise InputError(f"no peer {name!r}{did_you_mean(name, [*PEERS, 'all'])}")
        try:
            settings = [float(value)] if sign else list(PEERS[name].settings)
        except ValueError:
            raise InputError(f"peer {name}: the setting must be a number, got {value!r}") from None
        chosen: Sequence[float | None] = settings or [None]
        for setting in chosen:
            rows[name if setting is None else f"{name} {setting:g}"] = PEERS[name].on(setting)
    return rows

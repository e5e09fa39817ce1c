"""Other people's accelerations as rows of a comparison: put on a pipeline, run as they are, taken off again.

Each is used as its documentation says, with one help: a cache of diffusers that wants a cache context gets one where
the pipeline sets none, and starts afresh with every schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from diffaccel.denoiser import Denoiser, find_denoisers
from diffaccel.errors import InputError, MissingPackageError, did_you_mean
from diffaccel.eval.peer_calibrated import mag_ratios, put_mag_cache, put_smooth_cache, smooth_errors
from diffaccel.eval.peer_command import COMMAND, Command
from diffaccel.eval.peer_hooks import attach_cache, restored

Put = Callable[[Any, Denoiser, float, ExitStack], None]
"""Gets pipeline, denoiser, setting, and where to register what undoes it."""


Calibrate = Callable[[Any, Denoiser, Callable[[], Any], int], Any]
"""Gets pipeline, denoiser, what runs the pipeline once as it is, and its number of steps."""


@dataclass(frozen=True)
class Peer:
    """One acceleration of somebody else.

    Args:
        name: as users write it.
        put: puts it on one denoiser.
        settings: of its knob, from careful to fast, tried when none is asked for; empty where it has none.
        package: that it needs, by the name pip knows.
        calibrate: measures the denoiser first, where it must; ``put`` gets the result as ``calibrated``.
    """

    name: str
    put: Callable[..., None]
    settings: tuple[float, ...] = ()
    package: str = "diffusers"
    calibrate: Calibrate | None = None


class PeerRow:
    """One peer at one setting, or several on top of each other: what `compare` takes as a plan.

    Args:
        parts: peers with their settings, in the order in which they are put on.
    """

    def __init__(self, parts: Sequence[tuple[Peer, float | None]]) -> None:
        self.parts = tuple(parts)
        self._calibrated: dict[tuple[str, str], Any] = {}

    def prepare(self, pipe: Any, run: Callable[[], Any], steps: int | None) -> None:
        """Calibrate what must be, once.

        Args:
            run: runs the pipeline once as it is.
            steps: of that run; None where the pipeline takes no count.

        Raises:
            InputError: it cannot be calibrated on this pipeline.
            MissingPackageError: its package is not installed.
        """
        for peer, _ in self.parts:
            if peer.calibrate is None or any(name == peer.name for name, _ in self._calibrated):
                continue
            if steps is None:
                raise InputError("it is calibrated for a number of steps, and these calls have none")
            for denoiser in find_denoisers(pipe):
                with _named(peer):
                    found = peer.calibrate(pipe, denoiser, run, steps)
                self._calibrated[peer.name, denoiser.component] = found

    @contextmanager
    def __call__(self, pipe: Any) -> Iterator[None]:
        with ExitStack() as undo:
            for peer, setting in self.parts:
                value = setting if setting is not None else (peer.settings or (0.0,))[0]
                for denoiser in find_denoisers(pipe):
                    undo.callback(restored(denoiser.module))
                    more = {}
                    if peer.calibrate is not None:
                        more["calibrated"] = self._calibrated[peer.name, denoiser.component]
                    with _named(peer):
                        peer.put(pipe, denoiser, value, undo, **more)
            yield


@contextmanager
def _named(peer: Peer) -> Iterator[None]:
    """A package that is missing inside the block is named as pip knows it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingPackageError(f"{peer.name} needs {peer.package}: pip install {peer.package} ({error})") from None


def _diffusers(make: Callable[[Any, float], tuple[Callable[..., None], Any]]) -> Put:
    """A cache of diffusers; ``make`` gives its function and configuration."""

    def put(pipe: Any, denoiser: Denoiser, value: float, undo: ExitStack) -> None:
        attach_cache(pipe, denoiser, *make(pipe, value), undo)

    return put


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


def _quanto_int8(pipe: Any, denoiser: Denoiser, value: float, undo: ExitStack) -> None:
    from optimum.quanto import freeze, qint8, quantize

    quantize(denoiser.module, weights=qint8)
    freeze(denoiser.module)


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
            Peer("mag-cache", put_mag_cache, (0.06, 0.12), calibrate=mag_ratios),
            Peer("smooth-cache", put_smooth_cache, (0.2, 0.35), "dit-smoothcache", smooth_errors),
            Peer("cache-dit", _cache_dit, (0.08, 0.12, 0.2), "cache-dit"),
            Peer("deepcache", _deepcache, (2, 3), "DeepCache"),
            Peer("tomesd", _tomesd, (0.5,), "tomesd"),
            Peer("torchao-int8", _torchao_int8, (), "torchao"),
            Peer("quanto-int8", _quanto_int8, (), "optimum-quanto"),
            Peer("torch-compile", _compile, (), "torch"),
        )
    }
)


STACKS = ("torchao-int8+first-block-cache=0.12", "torchao-int8+cache-dit=0.12")
"""What composes and is run with ``all``, beside each alone."""


def peers_of(names: Sequence[str]) -> dict[str, PeerRow | Command]:
    """Rows by name.

    Args:
        names: ``first-block-cache=0.08`` is one row, a bare name one for each of its settings, ``a+b=0.1`` both on top
            of each other in this order, ``all`` every one and `STACKS`, ``command:NAME=PROGRAM ARGUMENTS`` one that
            runs elsewhere, see `diffaccel.eval.peer_command`.

    Raises:
        InputError: an unknown name, or a setting that is no number.
    """
    rows: dict[str, PeerRow | Command] = {}
    for text in [name for given in names for name in ((*PEERS, *STACKS) if given == "all" else [given])]:
        if text.startswith(COMMAND):
            command = Command(text.removeprefix(COMMAND))
            rows[command.name] = command
            continue
        choices = [_settings(part) for part in text.split("+")]
        for parts in product(*choices):
            name = "+".join(p.name if setting is None else f"{p.name} {setting:g}" for p, setting in parts)
            rows[name] = PeerRow(parts)
    return rows


def _settings(text: str) -> list[tuple[Peer, float | None]]:
    """A peer with each setting that ``text`` asks for."""
    name, sign, value = text.partition("=")
    if name not in PEERS:
        raise InputError(f"no peer {name!r}{did_you_mean(name, [*PEERS, 'all', COMMAND])}")
    peer = PEERS[name]
    try:
        settings: list[float | None] = [float(value)] if sign else [*peer.settings] or [None]
    except ValueError:
        raise InputError(f"peer {name}: the setting must be a number, got {value!r}") from None
    return [(peer, setting) for setting in settings]

"""Where operations and time of a real call go: instance-local hooks on layers, a function mode on attention calls."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from diffaccel.attention.intercept import uncompiled
from diffaccel.denoiser import Denoiser
from diffaccel.inspection.structure import ATTENTION, REST

Key = tuple[str, str]
"""Component and role; the role is empty for components other than denoisers."""


@dataclass(frozen=True)
class Seen:
    """One kind of attention call: who made it, and its shape."""

    component: str
    site: str
    batch: int
    heads: int
    queries: int
    keys: int
    width: int
    masked: bool


class Ledger:
    """Books operations and seconds to whoever is at work. Innermost known module wins; seconds are self time.

    Args:
        denoisers: their layers are booked by role.
        components: the other networks of the pipeline, booked as a whole.
        device: where they run; each booking waits for it when ``timed``.
        timed: book seconds.
    """

    def __init__(
        self, denoisers: Sequence[Denoiser], components: Mapping[str, nn.Module], device: torch.device, timed: bool
    ) -> None:
        self.seconds: defaultdict[Key, float] = defaultdict(float)
        self.flops: Counter[Key] = Counter()
        self.attention: Counter[Seen] = Counter()
        self.calls: Counter[str] = Counter()
        self.entered: float | None = None
        self.left: float | None = None
        self.counting = True
        self._denoisers, self._components = denoisers, components
        self.denoisers = frozenset(d.component for d in denoisers)
        self._device, self._timed = device, timed
        self._stack: list[Key] = []
        self._sites: list[str] = []
        self._since = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks are on inside the block; compiled parts run as plain Python."""
        with ExitStack() as undo:
            for module in (*(d.module for d in self._denoisers), *self._components.values()):
                undo.enter_context(uncompiled(module))
            for denoiser in self._denoisers:
                name = denoiser.component
                for layer in denoiser.layers:
                    self._hook(undo, layer.module, (name, layer.role))
                for site in denoiser.attentions:
                    self._hook_site(undo, site.module, site.name)
                self._hook(undo, denoiser.module, (name, REST), root=True)
            for name, module in self._components.items():
                for part in (module, *module.children()):  # a VAE is entered by its parts, not by its forward
                    self._hook(undo, part, (name, ""))
            undo.enter_context(_Attention(self))
            if not self._timed:
                undo.enter_context(_Operations(self))
            self._since = self.now()
            yield

    def now(self) -> float:
        if self._timed and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def push(self, key: Key) -> None:
        """``key`` is at work from now on."""
        self._book()
        self._stack.append(key)

    def pop(self) -> None:
        self._book()
        if self._stack:
            self._stack.pop()

    def _book(self) -> None:
        now = self.now()
        if self._timed and self._stack:
            self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def add_flops(self, count: int) -> None:
        if self.counting:
            self.flops[self._stack[-1] if self._stack else ("", "")] += count

    def component(self) -> str:
        return self._stack[-1][0] if self._stack else ""

    def site(self) -> str:
        return self._sites[-1] if self._sites else ""

    def _hook(self, undo: ExitStack, module: nn.Module, key: Key, root: bool = False) -> None:
        def enter(*_: Any) -> None:
            self.push(key)
            if root:
                self.calls[key[0]] += 1
                self.entered = self._since if self.entered is None else self.entered

        def leave(*_: Any) -> None:
            self.pop()
            if root:
                self.left = self._since

        _install(undo, module, enter, leave)

    def _hook_site(self, undo: ExitStack, module: nn.Module, name: str) -> None:
        _install(undo, module, lambda *_: self._sites.append(name), lambda *_: self._sites and self._sites.pop())


def _install(undo: ExitStack, module: nn.Module, enter: Callable[..., Any], leave: Callable[..., Any]) -> None:
    # What a hook returns would replace the arguments or the output.
    undo.callback(module.register_forward_pre_hook(lambda *_: (enter(), None)[1]).remove)
    undo.callback(module.register_forward_hook(lambda *_: (leave(), None)[1], always_call=True).remove)


class _Attention(TorchFunctionMode):
    """Books every attention call under the denoiser's ``attention``, whatever kernel it becomes."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        ledger = self._ledger
        component = ledger.component()
        inside = component in ledger.denoisers
        query, key, value = (args[i] if len(args) > i else kwargs[n] for i, n in enumerate(("query", "key", "value")))
        booked = (component, ATTENTION if inside else "")
        ledger.push(booked)
        ledger.counting = False  # counted below, the same for every kernel that the call may become
        try:
            return func(*args, **kwargs)
        finally:
            ledger.counting = True
            ledger.pop()
            products = query.shape[:-1].numel() * key.shape[-2]  # each for QK' and for the sum of values
            ledger.flops[booked] += 2 * products * (query.shape[-1] + value.shape[-1])
            if inside:
                mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
                causal = args[5] if len(args) > 5 else kwargs.get("is_causal", False)
                heads = query.shape[-3] if query.ndim > 3 else 1
                batch = query.shape[:-2].numel() // heads
                shape = (batch, heads, query.shape[-2], key.shape[-2], query.shape[-1])
                ledger.attention[Seen(component, ledger.site(), *shape, mask is not None or bool(causal))] += 1


class _Operations(TorchDispatchMode):
    """Counts with torch's own formulas; unlike FlopCounterMode it puts no hook on all modules of the process."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet not in flop_registry:
            with self:  # inference mode hands composite operators here whole
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        output = func(*args, **kwargs)
        if packet in flop_registry:
            self._ledger.add_flops(int(flop_registry[packet](*args, **kwargs, out_val=output)))
        return output

"""Peak memory of a denoiser on a GPU that need not be there: one forward on fake CUDA tensors.

Nothing is computed or allocated: PyTorch's FakeTensorMode carries shapes, dtypes and devices through the model, and a
dispatch mode follows the birth and death of every storage. What the caching allocator adds (rounding to 512 bytes,
fragments, workspaces of matrix libraries) is not in the figure.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from diffaccel.denoiser import find_denoisers
from diffaccel.errors import ModelError
from diffaccel.inspection.inspect import short_call
from diffaccel.inspection.quiet import quiet

_SCHEDULE = 50


@dataclass(frozen=True)
class MemoryPrediction:
    """Memory and host syncs of the calls of one denoiser.

    Attributes:
        weights_bytes: parameters, buffers and tables on the GPU, in the form the plan gives them.
        peak_bytes: most bytes alive at once during the calls: weights, inputs, outputs and everything between.
        syncs: reason -> how often the host had to wait for the GPU, over all calls.
        calls: number of calls.
        output: shape, dtype and device of each output tensor of the last call, in words.
    """

    weights_bytes: int
    peak_bytes: int
    syncs: Mapping[str, int]
    calls: int
    output: tuple[str, ...]

    @property
    def activation_bytes(self) -> int:
        return self.peak_bytes - self.weights_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "activation_bytes": self.activation_bytes}


def predict_memory(
    build: nn.Module | Callable[[], nn.Module],
    inputs: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
    plan: Any = None,
    *,
    steps: int = 1,
    dtype: torch.dtype | None = None,
) -> MemoryPrediction:
    """Run a denoiser's forward on fake CUDA tensors and account for its memory.

    Attention calls count as a fused kernel: an output and one number per query, as PyTorch's CUDA backends do for every
    dtype. Scalars that a model or technique reads from the device are counted as syncs, and read as 0.5.

    Args:
        build: a denoiser on any device (it is not touched: a fake copy is made, without copying data), one on fake CUDA
            tensors, or a function that builds one, such as ``lambda: FluxTransformer2DModel()``.
        inputs: arguments of the forward, or a function that makes them; moved to the fake GPU.
        plan: what `diffaccel.accelerate` takes; None for the plain denoiser.
        steps: number of calls, successive steps from the middle of a schedule of 50, where a plan is at work; a cache
            can skip the third at the earliest.
        dtype: of floating weights and inputs; None keeps theirs.

    Raises:
        PlanError: the plan does not fit.
        ModelError: the module cannot run on fake tensors, for example because it calls numpy on a tensor.
    """
    module, mode = _fake_module(build, dtype)
    with ExitStack() as stack:
        stack.enter_context(mode)
        stack.enter_context(torch.no_grad())
        with torch.device("cuda"):
            arguments = inputs() if callable(inputs) else inputs
        arguments = tree_map(lambda x: _to_fake(x, mode, dtype) if isinstance(x, Tensor) else x, dict(arguments))
        live = stack.enter_context(_Live())
        accelerated = None
        if plan is not None:
            from diffaccel.attach import accelerate

            accelerated = stack.enter_context(accelerate(module, plan))
            accelerated.clock.start(max(_SCHEDULE, 2 * steps), begin=max(_SCHEDULE, 2 * steps) // 2)
        live.start([*module.parameters(), *module.buffers(), *_plain_attributes(module)], arguments)
        stack.enter_context(_FusedAttention())
        try:
            for _ in range(steps):
                output = module(**arguments)
                if accelerated is not None:
                    accelerated.clock.advance()
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise ModelError(f"{type(module).__name__} cannot run on fake tensors: {error}") from error
        described = tuple(f"{list(t.shape)} {t.dtype} {t.device}" for t in tree_iter(output) if isinstance(t, Tensor))
        return MemoryPrediction(live.weights, live.peak, dict(live.syncs), steps, described)


def predict_pipeline_memory(
    model: Any, call: Mapping[str, Any] | None = None, plan: Any = None, *, dtype: torch.dtype | None = None
) -> dict[str, MemoryPrediction]:
    """`predict_memory` of each denoiser of a pipeline at the sizes of a call, which is run up to the denoising loop.

    Args:
        model: a diffusers pipeline, or what `diffaccel.pipelines.load` returns (its default arguments then apply).
        call: further arguments of the call, such as ``height`` and ``width``.
        plan: what `diffaccel.accelerate` takes.
        dtype: of the denoiser's weights and inputs on the GPU; None keeps theirs.

    Returns:
        Component -> prediction.

    Raises:
        PlanError: the plan does not fit.
        ModelError: no denoiser, or one that cannot run on fake tensors.
    """
    pipe = getattr(model, "pipe", model)
    arguments = short_call(pipe, {**getattr(model, "defaults", {}), **(call or {})})
    with quiet(pipe):
        captured = capture_inputs(pipe, arguments)
    return {
        denoiser.component: predict_memory(denoiser.module, captured[denoiser.component], plan, dtype=dtype)
        for denoiser in find_denoisers(pipe)
        if denoiser.component in captured
    }


def capture_inputs(pipe: Any, call: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The arguments of each denoiser's first call in ``pipe(**call)``: component -> arguments by name.

    The denoising stops there, so this is quick at any number of steps; with several denoisers, when all were called or
    the call is at its end.
    """
    denoisers = find_denoisers(pipe)
    captured: dict[str, dict[str, Any]] = {}
    with ExitStack() as undo:
        for denoiser in denoisers:
            signature = inspect.signature(denoiser.module.forward)

            def note(_: Any, args: Any, kwargs: Any, name: str = denoiser.component, s: Any = signature) -> None:
                captured.setdefault(name, dict(s.bind(*args, **kwargs).arguments))
                if len(captured) == len(denoisers):
                    raise _Enough

            undo.callback(denoiser.module.register_forward_pre_hook(note, with_kwargs=True).remove)
        try:
            with torch.no_grad():
                pipe(**call)
        except _Enough:
            pass
    return captured


class _Enough(BaseException):
    """Ends a pipeline's call early; not an Exception, so that nothing on the way swallows it."""


def _fake_module(
    build: nn.Module | Callable[[], nn.Module], dtype: torch.dtype | None
) -> tuple[nn.Module, FakeTensorMode]:
    """The denoiser with fake weights on the fake GPU, and the mode that they belong to."""
    if not isinstance(build, nn.Module):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode, torch.device("cuda"):
            build = build()
    first = next(build.parameters(), None)
    if first is None:
        raise ModelError(f"{type(build).__name__} has no parameters")
    if isinstance(first.data, FakeTensor) or isinstance(first, FakeTensor):
        mode = first.fake_mode  # type: ignore[attr-defined]
        module = build
    else:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with FakeCopyMode(mode):
            module = copy.deepcopy(build)
    with mode:
        # Module.to cannot swap fake parameters for those of another device or dtype: one by one.
        for part in module.modules():
            for name, old in [*part.named_parameters(recurse=False)]:
                new = _to_fake(old.detach(), mode, dtype)
                if new.device != old.device or new.dtype != old.dtype:
                    part._parameters[name] = nn.Parameter(new, requires_grad=False)
            for name, buffer in [*part.named_buffers(recurse=False)]:
                part._buffers[name] = _to_fake(buffer, mode, None)
    return module.eval(), mode


def _to_fake(tensor: Tensor, mode: FakeTensorMode, dtype: torch.dtype | None) -> Tensor:
    fake = tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor)
    with mode:
        return fake.to("cuda", dtype if fake.is_floating_point() else None)


def _plain_attributes(module: nn.Module) -> list[Tensor]:
    """Tensors that modules hold as plain attributes, such as tables of rotations."""
    values = (value for part in module.modules() for value in part.__dict__.values())
    return [value for value in values if isinstance(value, Tensor)]


class _Live(TorchDispatchMode):
    """Follows CUDA storages from birth to death, and counts what makes the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = self.now = self.peak = 0
        self.syncs: Counter[str] = Counter()
        self._known: dict[int, int] = {}
        self._counting = False

    def start(self, weights: list[Tensor], inputs: Any) -> None:
        """From here on: these are alive already, and syncs count."""
        self._known.clear()
        self.now = self.peak = 0
        for tensor in weights:
            self._born(tensor)
        self.weights = self.now
        for tensor in tree_iter(inputs):
            if isinstance(tensor, Tensor):
                self._born(tensor)
        self.syncs.clear()
        self._counting = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            self._sync("a scalar was read", args)
            tensor = args[0]
            return 0.5 if tensor.is_floating_point() else True if tensor.dtype is torch.bool else 1
        output = func(*args, **kwargs)
        for tensor in tree_iter(output):
            if isinstance(tensor, Tensor):
                if tensor.device.type == "cuda":
                    self._born(tensor)
                elif tensor.device.type == "cpu":
                    self._sync("a tensor was copied to the host", (args, kwargs))
        return output

    def _sync(self, reason: str, args: Any) -> None:
        if self._counting and any(isinstance(t, Tensor) and t.device.type == "cuda" for t in tree_iter(args)):
            self.syncs[reason] += 1

    def _born(self, tensor: Tensor) -> None:
        if tensor.device.type != "cuda":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        # PyTorch keeps a storage's Python object as long as the storage itself lives.
        weakref.finalize(storage, self._died, key, size)

    def _died(self, key: int, size: int) -> None:
        if self._known.pop(key, None) is not None:
            self.now -= size


class _FusedAttention(TorchFunctionMode):
    """Fake devices have no attention kernel of their own: without this PyTorch lays out the full matrix of scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, value = args[0] if args else kwargs["query"], args[2] if len(args) > 2 else kwargs["value"]
        if query.ndim != 4 or query.device.type != "cuda":
            return func(*args, **kwargs)
        batch, heads, tokens, _ = query.shape
        query.new_empty(batch, heads, tokens, dtype=torch.float32)  # the log of each row's sum
        # Laid out as the kernels do, so that joining the heads afterwards copies nothing.
        return query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)

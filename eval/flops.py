"""Operations that a call really executes: what a cache skips or a mask leaves out is not counted, by itself.

Every operator that reaches PyTorch's dispatcher is counted by its formula; a product of k terms counts 2 k, in whatever
number format. Formulas are those of `torch.utils.flop_counter` and, here, of diffaccel's operators and of a
few that torch has none for. Element-wise work is not counted, as in published numbers. An operator of another library
that has no formula is named, so that no total claims more than it knows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from diffaccel.eval.stages import watch_loop


class FlopCounter(TorchDispatchMode):
    """Counts inside the block. What `entered` and `left` enclose, such as a denoiser's calls, is counted apart too.

    Attributes:
        by_operator: operations by the operator's name.
        within: those between `entered` and `left`.
        uncounted: names of operators of other libraries that have no formula.
    """

    supports_higher_order_operators = True  # flex_attention is one

    def __init__(self) -> None:
        super().__init__()
        self.by_operator: Counter[str] = Counter()
        self.within = 0
        self.uncounted: set[str] = set()
        self._depth = 0

    @property
    def total(self) -> int:
        return self.by_operator.total()

    def entered(self) -> None:
        """A region begins."""
        self._depth += 1

    def left(self) -> None:
        """It ends."""
        self._depth -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = getattr(func, "_overloadpacket", func)
        formula = _formula(packet)
        if formula is not None:
            count = int(formula(*args, **(kwargs or {}), out_val=out))
            self.by_operator[str(packet)] += count
            self.within += count if self._depth else 0
        elif _namespace(func) not in ("aten", "prim", "prims") and str(packet) not in _ELEMENT_WISE:
            self.uncounted.add(str(packet))
        return out


def count_flops(pipe: Any, call: Callable[[], Any]) -> FlopCounter:
    """Count the operations of ``call``, which calls ``pipe`` once; those of its denoisers are ``within``.

    Compiled parts run uncompiled meanwhile, where their operators can be seen. This is slower than the call itself, so
    time another one.
    """
    counter = FlopCounter()
    undo = watch_loop(pipe, counter)
    try:
        with torch.compiler.set_stance("force_eager"), counter:
            call()
    finally:
        undo()
    return counter


def _namespace(func: Any) -> str:
    return str(getattr(func, "namespace", getattr(func, "_name", "")))


def _formula(packet: Any) -> Callable[..., int] | None:
    """Of an operator: ours, torch's, or None."""
    name = str(packet)
    if name in _FORMULAS:
        return _FORMULAS[name]
    if name.startswith("diffaccel.") and name.endswith(("_linear", "_gemm")):
        return _linear
    return flop_registry.get(packet)


def _linear(x: Tensor, *args: Any, out_val: Tensor, **kwargs: Any) -> int:
    """``x`` [..., K] and a weight -> [..., N]: each element of the output sums K products."""
    return 2 * x.shape[-1] * out_val.numel()


def _packed_linear(x: Tensor, *args: Any, out_val: Tensor, **kwargs: Any) -> int:
    """Likewise, and its low-rank branch ``down`` [R, K], ``up`` [N, R], where there is one."""
    down = args[5]
    branch = 0 if down is None else 2 * down.shape[0] * (x.numel() + out_val.numel())
    return _linear(x, out_val=out_val) + branch


def _conv(x: Tensor, weight: Tensor, *args: Any, out_val: Tensor, **kwargs: Any) -> int:
    """``weight`` [N, C / groups, h, w]: each element of the output sums as many products as a filter has weights."""
    return 2 * out_val.numel() * (weight.numel() // weight.shape[0])


def _hadamard(x: Tensor, before: Tensor | None, after: Tensor | None, block: int, *args: Any, out_val: Any) -> int:
    """The product with a matrix; on the CPU that of the block's last halves, since sums of halves are element-wise."""
    from diffaccel.kernels.hadamard import SMALL

    return 2 * x.numel() * (min(block, SMALL) if x.device.type == "cpu" else block)


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, out_val: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention(q: Tensor, v: Tensor, pairs: int) -> int:
    """``pairs`` of a query and a key, over all samples and heads."""
    return 2 * pairs * (q.shape[-1] + v.shape[-1])


def _sizes(length: int, block_size: int, blocks: int, device: torch.device) -> Tensor:
    """How many tokens each block holds; the last may be partial."""
    starts = torch.arange(blocks, device=device) * block_size
    return (length - starts).clamp(0, block_size)


def _block_sparse(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, *rest: Any, out_val: Tensor, **kwargs: Any) -> int:
    """The blocks that are kept, or all where dense attention was the fastest way."""
    from diffaccel.kernels.block_choice import choose_path
    from diffaccel.kernels.block_pattern import BlockPattern

    *lists, attn_mask, block_size, scale, path = rest
    pattern = BlockPattern(keep, block_size, *lists)
    if choose_path(q, k, v, pattern, attn_mask, scale, path).name == "dense":
        return sdpa_flop_count(q.shape, k.shape, v.shape)
    rows = _sizes(q.shape[2], block_size, keep.shape[1], keep.device)
    columns = _sizes(k.shape[2], block_size, keep.shape[2], keep.device)
    pairs = (keep * rows[:, None] * columns).sum() * (q.shape[1] // keep.shape[0]) * q.shape[0]
    return _attention(q, v, int(pairs))


def _listed_blocks(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, indices: Tensor, block_size: int, *rest: Any, out_val: Any
) -> int:
    """As `_block_sparse`, the blocks kept given as lists."""
    rows = _sizes(q.shape[2], block_size, indices.shape[2], indices.device)
    columns = _sizes(k.shape[2], block_size, indices.shape[3], indices.device)
    listed = torch.arange(indices.shape[3], device=indices.device) < counts[..., None]
    pairs = (listed * rows[:, None] * columns[indices.long()]).sum()
    each = (q.shape[0] // indices.shape[0]) * (q.shape[1] // indices.shape[1])
    return _attention(q, v, int(pairs) * each)


def _online_blocks(
    q: Tensor, k: Tensor, order: Tensor, image: int, keep: int, block_size: int, *, out_val: Any, **kwargs: Any
) -> int:
    """The product of the means of blocks."""
    return 2 * q.shape[0] * q.shape[1] * image * image * q.shape[3]


_FORMULAS: dict[str, Callable[..., int]] = {
    "aten._scaled_dot_product_flash_attention_for_cpu": _fused_attention,
    "aten._scaled_dot_product_fused_attention_overrideable": _fused_attention,
    "aten._int_mm": _linear,
    "aten._weight_int8pack_mm": _linear,
    "aten._weight_int4pack_mm": _linear,
    "onednn.qlinear_pointwise": _linear,
    "diffaccel.int4_linear": _packed_linear,
    "diffaccel.int8_conv": _conv,
    "diffaccel.hadamard": _hadamard,
    "diffaccel.hadamard_quantize": _hadamard,
    "diffaccel.block_sparse_attention": _block_sparse,
    "diffaccel.sparse_attention": _listed_blocks,
    "diffaccel.online_blocks": _online_blocks,
}
_ELEMENT_WISE = {
    *("diffaccel.token_quantize", "diffaccel.static_quantize"),
    *("diffaccel.permute_tokens", "diffaccel.dequantize_weight"),
}

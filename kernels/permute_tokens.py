"""Reordering of the tokens of each head, y[b, h, i] = x[b, h, order[h, i]].

With an order per head in which its attention map becomes block-shaped, few blocks need to be kept (PAROAttention,
arXiv:2506.16054, sec. 3.2): q, k and v are reordered by ``order``, the output by ``inverse_order(order)`` (of
`block_pattern`). Both read rows from anywhere and write them in sequence: D values of a row lie side by side, so that
reading wastes nothing.
"""

# Arguments of Triton functions have no Python types.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffaccel.kernels._launch import Config, Specimen, device_of, runs_triton


def permute_tokens_ref(x: Tensor, order: Tensor) -> Tensor:
    """The definition. Arguments: ``permute_tokens``."""
    B, H, N, D = x.shape
    return x.gather(2, order.long()[None, :, :, None].expand(B, H, N, D))


@triton.jit
def _permute_tokens_kernel(
    x_ptr, order_ptr, y_ptr, stride_xb, stride_xh, stride_xn, stride_oh, H, N,
    stride_xd: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # grid: (ceil(N / BLOCK_N), H, B)  # fmt: skip
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    inside = (token < N)[:, None] & (d < D)[None, :]
    source = tl.load(order_ptr + h * stride_oh + token, mask=token < N, other=0).to(tl.int64)
    x_ptr += b * stride_xb + h * stride_xh
    x = tl.load(x_ptr + source[:, None] * stride_xn + d[None, :] * stride_xd, mask=inside)
    tl.store(y_ptr + ((b * N + token[:, None]) * H + h) * D + d[None, :], x, mask=inside)


def config_for(D: int, dtype: torch.dtype) -> Config:
    """How to launch: 16 KiB a program, that is 8 loads of 16 bytes in flight for each of 128 lanes."""
    rows = 2**14 // (triton.next_power_of_2(D) * dtype.itemsize)
    return Config({"BLOCK_N": max(rows, 1)}, warps=4, stages=1)


def permute_tokens(x: Tensor, order: Tensor) -> Tensor:
    """Tokens of each head in another order. Forward only.

    Args:
        x: [B, H, N, D], any strides.
        order: int32 or int64 [H or 1, N], a permutation of 0..N-1 in each row. Not checked: that would wait for the
            GPU.

    Returns:
        [B, H, N, D], stored as [B, N, H, D].
    """
    if x.ndim != 4 or order.ndim != 2 or order.shape[0] not in (1, x.shape[1]) or order.shape[1] != x.shape[2]:
        raise ValueError(f"x [B, H, N, D] and order [H or 1, N] do not fit: {tuple(x.shape)}, {tuple(order.shape)}")
    if order.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"order must be int32 or int64, got {order.dtype}")
    return _op(x, order)


@torch.library.custom_op("diffaccel::permute_tokens", mutates_args=())
def _op(x: Tensor, order: Tensor) -> Tensor:
    y = _output(x)
    if not runs_triton(x):
        return y.copy_(permute_tokens_ref(x, order))
    (B, H, N, D), order, config = x.shape, order.contiguous(), config_for(x.shape[3], x.dtype)
    with device_of(x):
        _permute_tokens_kernel[(triton.cdiv(N, config.tiles["BLOCK_N"]), H, B)](
            x, order, y, *x.stride()[:3], 0 if len(order) == 1 else N, H, N,
            stride_xd=x.stride(3), D=D, **config.tiles, BLOCK_D=triton.next_power_of_2(D), num_warps=config.warps,
        )  # fmt: skip
    return y


@_op.register_fake
def _output(x: Tensor, order: Tensor | None = None) -> Tensor:
    B, H, N, D = x.shape
    return x.new_empty(B, N, H, D).transpose(1, 2)


SPECIMENS = tuple(
    Specimen(
        f"permute_tokens {kind} D={D}",
        _permute_tokens_kernel,
        {"x_ptr": f"*{kind}", "order_ptr": "*i32", "y_ptr": f"*{kind}"}
        | dict.fromkeys(("stride_xb", "stride_xh", "stride_xn", "stride_oh", "H", "N"), "i32"),
        {"stride_xd": 1, "D": D, "BLOCK_D": triton.next_power_of_2(D)},
        config_for(D, dtype),
        aligned=("stride_xb", "stride_xh", "stride_xn"),
    )
    for kind, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32))
    for D in (64, 96, 128, 256)
)

"""Block-sparse attention forward over lists of kept key blocks, in Triton.

O_i = sum_j p_ij v_j with p_ij = exp(s_ij - L_i), s_ij = scale * q_i k_j + mask_ij and L_i = log sum_j exp(s_ij), where
j runs over the keys in the blocks listed for the query block of i. A query without a key has O_i = 0 and L_i = -inf.
One pass with a running maximum and sum (arXiv:2205.14135, algorithm 1), to base 2 because that is what the hardware
computes. Which blocks to keep is decided elsewhere (`block_pattern.BlockPattern`); text tokens are blocks like others.
"""

# Arguments of Triton functions have no Python types.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffaccel.kernels._launch import Config, Specimen, device_of, dot, runs_triton

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def sparse_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_size: int,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, with all N x M scores in float32 (float64 for float64) -> output and log-sum-exp."""
    N, M, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = (x.to(dtype).repeat_interleave(group, dim=1) for x in (k, v))
    scores = q.to(dtype) @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    listed = torch.arange(kv_indices.shape[-1], device=q.device) < kv_num_blocks[..., None]
    keep = torch.zeros_like(listed).scatter(-1, kv_indices.long(), listed)  # [B or 1, H or 1, n, m]
    keep = keep.repeat_interleave(block_size, 2)[:, :, :N].repeat_interleave(block_size, 3)[..., :M]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        keep = keep & attn_mask
    elif attn_mask is not None:
        scores = scores + attn_mask
    lse = scores.masked_fill(~keep, float("-inf")).logsumexp(-1)
    weights = torch.exp(scores - lse[..., None]).where(keep & (lse > float("-inf"))[..., None], 0)
    return (weights @ v).to(q.dtype), lse.float()


@triton.jit
def _load(pointers, row, column, rows, columns, CHECK_ROWS: tl.constexpr, CHECK_COLUMNS: tl.constexpr):
    """Zeros outside ``rows`` x ``columns``; checks only what can lie outside."""
    if CHECK_ROWS and CHECK_COLUMNS:
        return tl.load(pointers, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)
    if CHECK_ROWS:
        return tl.load(pointers, mask=(row < rows)[:, None], other=0.0)
    if CHECK_COLUMNS:
        return tl.load(pointers, mask=(column < columns)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def _product(a, b, acc):
    """acc + a @ b; float32 in three TF32 products, because one is only good to 1e-3."""
    if a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="tf32x3")
    return dot(a, b, acc)


@triton.jit
def _sparse_attention_kernel(
    q_ptr, k_ptr, v_ptr, num_ptr, indices_ptr, mask_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_mb, stride_mh, stride_mn, lists_b, lists_h, H, N, M, m, group, scale,
    stride_qd: tl.constexpr, stride_kd: tl.constexpr, stride_vd: tl.constexpr, stride_mm: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_SIZE: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr,
    CHECK_KEYS: tl.constexpr, LSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # grid: (ceil(N / BLOCK_M), H, B)  # fmt: skip
    """Strides in elements, ``scale`` to base 2, ``group`` query heads a key head; lists [B or 1, H or 1, n]."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    query = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    key = tl.arange(0, BLOCK_N).to(tl.int64)  # [BLOCK_N]
    d, dv = tl.arange(0, BLOCK_D).to(tl.int64), tl.arange(0, BLOCK_DV).to(tl.int64)
    rows = q_ptr + b * stride_qb + h * stride_qh + query[:, None] * stride_qn + d[None, :] * stride_qd
    q = _load(rows, query, d, N, D, True, D < BLOCK_D)  # [BLOCK_M, BLOCK_D]
    kv_head = h // group
    keys = k_ptr + b * stride_kb + kv_head * stride_kh + key[:, None] * stride_kn + d[None, :] * stride_kd
    values = v_ptr + b * stride_vb + kv_head * stride_vh + key[:, None] * stride_vn + dv[None, :] * stride_vd
    # A mask that is the same for all queries (key padding) is read once, not BLOCK_M times.
    mask_row = query if MASK_ROWS else tl.zeros([1], tl.int64)
    mask_tile = mask_ptr + b * stride_mb + h * stride_mh + mask_row[:, None] * stride_mn + key[None, :] * stride_mm
    factor = scale if MASK != "additive" else 1.0  # what is left to multiply the scores by once the mask is added

    line = b * lists_b + h * lists_h + start // BLOCK_SIZE
    blocks = indices_ptr + line * m
    TILES: tl.constexpr = BLOCK_SIZE // BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    block = tl.load(blocks)
    for i in range(0, tl.load(num_ptr + line) * TILES):
        first = block.to(tl.int64) * BLOCK_SIZE + i % TILES * BLOCK_N
        left = M - first
        # Read one tile ahead: a load that the next ones wait for would cost the pipeline one of its stages.
        block = tl.load(blocks + tl.minimum((i + 1) // TILES, m - 1))
        k = _load(keys + first * stride_kn, key, d, left, D, CHECK_KEYS, D < BLOCK_D)  # [BLOCK_N, BLOCK_D]
        scores = _product(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        if MASK != "none":
            inside = (mask_row < N)[:, None] & (key < left)[None, :]
            bias = tl.load(mask_tile + first * stride_mm, mask=inside, other=0)
            if MASK == "bool":
                scores = tl.where(bias, scores, float("-inf"))
            else:
                scores = scores * scale + bias.to(tl.float32) * LOG2E
        if CHECK_KEYS:
            scores = tl.where((key < left)[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * factor)
        shift = new_peak
        if MASK != "none":
            # While a query has only masked keys its maximum is -inf, and -inf - -inf is not a number.
            shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = tl.exp2(scores * factor - shift[:, None])  # [BLOCK_M, BLOCK_N]
        alpha = tl.exp2(peak - shift)
        v = _load(values + first * stride_vn, key, dv, left, DV, CHECK_KEYS, DV < BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        acc = _product(p.to(v.dtype), v, acc * alpha[:, None])
        total = total * alpha + tl.sum(p, 1)
        peak = new_peak

    some = total > 0
    out = acc / tl.where(some, total, 1.0)[:, None]
    stored = out_ptr + ((b * N + query[:, None]) * H + h) * DV + dv[None, :]  # [B, N, H, DV]
    tl.store(stored, out.to(out_ptr.dtype.element_ty), mask=(query < N)[:, None] & (dv < DV)[None, :])
    if LSE:
        lse = tl.where(some, (peak + tl.log2(tl.where(some, total, 1.0))) * LN2, float("-inf"))
        tl.store(lse_ptr + (b * H + h) * N + query, lse, mask=query < N)


def config_for(
    D: int, dtype: torch.dtype, block_size: int, capability: int, masked: bool = False, mask_rows: bool = False
) -> Config:
    """How to launch: the largest tiles for which the compiler keeps everything in registers on every chip.

    Args:
        D: head size, the larger of the two.
        capability: compute capability, 90 for 9.0.
        masked: there is a mask.
        mask_rows: it differs between queries.
    """
    tile = block_size & -block_size  # the largest power of two that divides it
    if dtype == torch.float32:  # each product is three, and operands take twice the registers
        queries, keys, stages = (32, 32, 2) if D <= 64 else (32, 16, 2) if D <= 128 else (16, 16, 2)
        warps = 4 if D <= 64 else 8
    else:
        # The more queries share a tile of keys, the less the caches have to deliver: 128, at head size 128 in 64
        # registers of each lane of 8 warps. 64 keys keep the tensor cores of sm_90 and sm_100 busy; the others have
        # registers for 32, and 99 KiB of shared memory on sm_89 and sm_120. Masks need registers too, and at head size
        # 32 the compiler aims at so many programs at once on sm_100 that it spills 64 keys.
        many = (D > 32 if capability // 10 in (9, 10) else D <= 64) and not masked
        queries, keys, stages = (128, 64 if many else 32, 3)
        if mask_rows or D > 128:
            queries, keys, stages = (64, 16 if mask_rows and D > 128 else 32, 2)
        # 16 rows a warp, the height of its product; of long rows, or beside a tile of mask, two warps take half each.
        warps = min(queries, tile) // 16 * (2 if mask_rows or D > 128 else 1)
    return Config({"BLOCK_M": min(queries, tile), "BLOCK_N": min(keys, tile)}, warps, stages)


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_size: int,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention over the listed key blocks. Forward only.

    Args:
        q: [B, H, N, D], any strides; float16, bfloat16 or float32 with D and Dv from 1 to 256.
        k: [B, H or Hkv, M, D], Hkv a divisor of H.
        v: [B, H or Hkv, M, Dv].
        kv_num_blocks: int32 [B or 1, H or 1, ceil(N / block_size)], how many entries of ``kv_indices`` count.
        kv_indices: int32 [B or 1, H or 1, ceil(N / block_size), m] with m = ceil(M / block_size), every block at most
            once. Not checked: that would wait for the GPU.
        block_size: tokens in a block, a multiple of 16.
        attn_mask: bool (True = attend) or additive, broadcastable to [B, H, N, M]. Keys it excludes are read.
        scale: factor on the scores, at least 0; D ** -0.5 unless given.
        return_lse: also return the log-sum-exp of the scores, natural logarithm.

    Returns:
        [B, H, N, Dv] in the dtype of ``q``, stored as [B, N, H, Dv]; float32 [B, H, N] or None.
    """
    (B, H, N, D), (Hkv, M) = q.shape, k.shape[1:3]
    lists = (-(-N // block_size), -(-M // block_size))
    if k.shape != (B, Hkv, M, D) or v.shape[:3] != k.shape[:3] or H % Hkv:
        raise ValueError(f"q, k, v do not fit: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if max(D, v.shape[3]) > 256 or block_size < 16 or block_size % 16:
        raise ValueError(f"head sizes go to 256, blocks are multiples of 16; got {D}, {v.shape[3]} and {block_size}")
    samples, heads = kv_num_blocks.shape[:2]
    fits = samples in (1, B) and heads in (1, H) and kv_num_blocks.shape == kv_indices.shape[:3]
    if not fits or kv_indices.shape[2:] != lists:
        got = tuple(kv_num_blocks.shape), tuple(kv_indices.shape)
        raise ValueError(f"lists must be [B or 1, H or 1, {lists[0]}] and [.., {lists[1]}], got {got[0]} and {got[1]}")
    scale = D**-0.5 if scale is None else scale
    if scale < 0:
        raise ValueError(f"scale must not be negative, got {scale}")
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
    out, lse = _op(q, k, v, kv_num_blocks, kv_indices, block_size, attn_mask, scale, return_lse)
    return out, lse if return_lse else None


@torch.library.custom_op("diffaccel::sparse_attention", mutates_args=())
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_size: int,
    attn_mask: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    if not runs_triton(q):
        out, lse = sparse_attention_ref(q, k, v, kv_num_blocks, kv_indices, block_size, attn_mask, scale)
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
        return out, lse if return_lse else lse.new_empty(0)
    (B, H, N, D), (Hkv, M), DV = q.shape, k.shape[1:3], v.shape[3]
    out, lse = _outputs(q, v, return_lse)
    n, m = kv_indices.shape[2:]
    samples, heads = kv_num_blocks.shape[:2]
    lists = (0 if samples == 1 else heads * n, 0 if heads == 1 else n)
    mask = q if attn_mask is None else attn_mask.expand(B, H, N, M)
    kind = "none" if attn_mask is None else "bool" if attn_mask.dtype == torch.bool else "additive"
    major, minor = torch.cuda.get_device_capability(q.device) if q.is_cuda else (8, 0)
    mask_rows = kind != "none" and mask.stride(2) != 0
    config = config_for(max(D, DV), q.dtype, block_size, 10 * major + minor, kind != "none", mask_rows)
    with device_of(q):
        _sparse_attention_kernel[(triton.cdiv(N, config.tiles["BLOCK_M"]), H, B)](
            q, k, v, kv_num_blocks.contiguous(), kv_indices.contiguous(), mask, out, lse,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *mask.stride()[:3], *lists, H, N, M, m, H // Hkv,
            max(scale * LOG2E.value, 1e-30),  # a masked -inf times 0 would not be a number
            q.stride(3), k.stride(3), v.stride(3), mask.stride(3), D, DV, block_size, kind, mask_rows,
            M % block_size != 0, return_lse,
            **config.tiles, BLOCK_D=_padded(D), BLOCK_DV=_padded(DV), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return out, lse


@_op.register_fake
def _fake(q: Tensor, k: Tensor, v: Tensor, kv_num_blocks: Tensor, kv_indices: Tensor, block_size: int,
          attn_mask: Tensor | None, scale: float, return_lse: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _outputs(q, v, return_lse)


def _outputs(q: Tensor, v: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
    B, H, N, _ = q.shape
    out = q.new_empty(B, N, H, v.shape[3]).transpose(1, 2)
    return out, q.new_empty((B, H, N) if return_lse else (0,), dtype=torch.float32)


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _specimens() -> Iterator[Specimen]:
    """Every configuration that `config_for` gives, with whole and partial last blocks; one for chips that share it."""
    bf16, fp16, fp32 = (torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")
    sizes = (32, 64, 128, 256)
    cases = [(bf16, D, block, "none", True) for D, block in product(sizes, (16, 32, 64, 128))]
    cases += [(bf16, D, 128, "none", False) for D in (32, 64, 72, 128, 160, 256)]
    cases += [(bf16, D, 128, mask, False) for D, mask in product(sizes[1:], ("bool", "additive", "key padding"))]
    cases += [(fp16, D, 128, "none", True) for D in sizes]
    cases += [(fp32, D, 128, mask, False) for D, mask in product(sizes, ("none", "additive"))]
    for (dtype, kind), D, block, mask, whole in cases:
        rows = mask in ("bool", "additive")
        configs = {
            target: config_for(D, dtype, block, target, mask != "none", rows) for target in (80, 89, 90, 100, 120)
        }
        strides = [f"stride_{x}{axis}" for x in "qkv" for axis in "bhn"]
        integers = [*strides, *(f"stride_m{axis}" for axis in "bhn"), *"HNMm", "lists_b", "lists_h", "group"]
        types = dict.fromkeys(integers, "i32") | {f"{name}_ptr": f"*{kind}" for name in ("q", "k", "v", "out")}
        types |= {"num_ptr": "*i32", "indices_ptr": "*i32", "lse_ptr": "*fp32", "scale": "fp32"}
        types |= {"mask_ptr": "*i1" if mask in ("bool", "key padding") else f"*{kind}"}
        constants = dict.fromkeys(("stride_qd", "stride_kd", "stride_vd", "stride_mm"), 1) | {
            "D": D, "DV": D, "BLOCK_SIZE": block, "MASK": "bool" if mask == "key padding" else mask, "MASK_ROWS": rows,
            "CHECK_KEYS": not whole, "LSE": not whole, "BLOCK_D": _padded(D), "BLOCK_DV": _padded(D),
        }  # fmt: skip
        for config in {str(config): config for config in configs.values()}.values():
            targets = tuple(target for target, other in configs.items() if other == config)
            yield Specimen(
                f"sparse_attention {kind} D={D} block={block} mask={mask}{'' if whole else ' partial'}"
                + (f" sm_{targets[0]}" if len(targets) < len(configs) else ""),
                _sparse_attention_kernel, types, constants, config,
                aligned=tuple(strides),
                tensor_cores=None if dtype == torch.float32 else "16-bit", targets=targets,
            )  # fmt: skip


SPECIMENS = tuple(_specimens())

"""Writes 4-bit weights with a low-rank branch in the layout that diffusers' quantizer ``nunchaku_lite`` loads.

Per linear [N, K], in the loader's names: ``qweight`` int8 [N, K / 2], ``wscales`` [K / 64, N], ``smooth_factor`` [K] by
which the input of the 4-bit product is divided, ``proj_down`` [K, R] and ``proj_up`` [N, R] of the branch, which reads
the input as it comes, and ``bias`` [N] (SVDQuant, arXiv:2411.05007; the order in memory is that of nunchaku's kernels,
in which 32 lanes read what they multiply: the shapes say only how much there is). Those kernels also round activations
to 4 bits in groups of 64, whatever the plan said.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from safetensors.torch import save_file
from torch import Tensor, nn

from diffaccel.errors import InputError, PlanError
from diffaccel.kernels.packed_weight import unpack_nibbles
from diffaccel.quantization.layer import QuantizedLayer
from diffaccel.quantization.linear import QuantizedLinear

_GROUP = 64
_TILE = 128  # of both sides of a weight, which the kernels multiply at a time
_RANK_STEP = 16
_WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


def export_nunchaku(model: nn.Module, folder: str | os.PathLike[str], *, dtype: str = "bfloat16") -> Path:
    """Write a quantized denoiser as ``from_pretrained`` loads it with nunchaku's kernels, on CUDA.

    >>> diffaccel.quantize(pipe, weights="int4", group=64, low_rank=32, balance=0.5, prompts=prompts)  # doctest: +SKIP
    >>> export_nunchaku(pipe.transformer, "out/transformer")                                   # doctest: +SKIP

    Args:
        model: a diffusers model whose linears are quantized, baked or not.
        folder: gets ``config.json`` and the weights.
        dtype: ``bfloat16`` or ``float16``, of everything that has no 4 bits.

    Returns:
        The folder.

    Raises:
        PlanError: what the layout cannot hold: other weights than int4 per channel or in groups of 64 or 128, a
            rotation, protected tokens, other forms at other steps, convolutions, widths that are no multiples of 128.
        InputError: the folder cannot be made.
    """
    if dtype not in ("bfloat16", "float16"):
        raise PlanError(f"export_nunchaku writes bfloat16 or float16, got dtype={dtype!r}")
    if not isinstance(model, ConfigMixin):
        raise PlanError(f"export_nunchaku needs a diffusers model such as pipe.transformer, got {type(model).__name__}")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLayer)}
    if not layers:
        raise PlanError(
            "no layer of this model is quantized; call diffaccel.quantize(model, weights='int4', low_rank=32) first"
        )
    refused = {name: reason for name, layer in layers.items() if (reason := _why_not(layer))}
    if refused:
        names = "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:3])
        more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise PlanError(
            f"nunchaku's layout cannot hold {names}{more}; leave them out by sites='... !*.{next(iter(refused))}'"
        )
    target = getattr(torch, dtype)
    rank = max(_rank_of(layer) for layer in layers.values())
    tensors = {}
    for name, value in model.state_dict().items():
        if name.rpartition(".")[0] not in layers:
            tensors[name] = value.to(target) if value.is_floating_point() else value
    with torch.no_grad():
        for name, layer in layers.items():
            assert isinstance(layer, QuantizedLinear)
            for own, tensor in nunchaku_tensors(layer, rank, target).items():
                if not (tensor.dtype == torch.int8 or tensor.isfinite().all()):
                    raise PlanError(f"{name}.{own} leaves the range of {dtype}; use dtype='bfloat16'")
                tensors[f"{name}.{own}"] = tensor
    body = json.loads(model.to_json_string())
    section = {"precision": "int4", "group_size": _GROUP, "rank": rank, "targets": list(layers)}
    body["quantization_config"] = {"quant_method": "nunchaku_lite", "compute_dtype": dtype, "svdq_w4a4": section}
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, folder / _WEIGHTS_NAME, {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(body, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror or error}); give another folder") from None
    return folder


def _why_not(layer: QuantizedLayer) -> str | None:
    runs = {(run.kind, run.group, run.suffix, run.rotated) for run in layer.runs}
    if not isinstance(layer, QuantizedLinear):
        return "a convolution"
    if len(runs) > 1 or "original" in layer._buffers:
        return "it runs other weights at other steps"
    ((kind, group, _, rotated),) = runs
    if kind != "int4":
        return f"weights={kind}, not int4"
    if group not in (None, _GROUP, 2 * _GROUP):
        return f"groups of {group}, not 64 or 128"
    if rotated:
        return "it is rotated"
    if "kept_rows" in layer._buffers:
        return "it has protected tokens"
    if any(size % _TILE for size in layer.weight_shape):
        return f"a weight {list(layer.weight_shape)}, whose sides are not multiples of {_TILE}"
    return None


def _rank_of(layer: QuantizedLayer) -> int:
    """Rounded up to what the kernels multiply at a time."""
    down = layer.tensors(layer.runs[0]).get("down")
    return 0 if down is None else -(-down.shape[0] // _RANK_STEP) * _RANK_STEP


def nunchaku_tensors(layer: QuantizedLinear, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the loader's ``SVDQW4A4Linear`` holds of ``layer``; a smaller branch is filled with zeros up to ``rank``."""
    run = layer.runs[0]
    N, K = layer.weight_shape
    tensors = layer.tensors(run)
    codes = unpack_nibbles(tensors["nibbles"], K)
    scales = tensors["scale"][:, None].expand(N, K // _GROUP)
    if run.group is not None:
        scales = scales * tensors["multiplier"].float().repeat_interleave(run.group // _GROUP, 1)
    before = tensors["before"].float() if "before" in tensors else torch.ones(K, device=codes.device)
    down, up = before.new_zeros(rank, K), before.new_zeros(N, rank)
    if "down" in tensors:
        branch = tensors["down"].shape[0]
        down[:branch] = tensors["down"].float() * before  # ours reads the input times `before`, theirs the input
        up[:, :branch] = tensors["up"].float()
    packed: dict[str, Any] = {
        "qweight": _pack_weight(codes),
        "wscales": _pack_rows(scales.to(dtype)).view(K // _GROUP, N),
        "smooth_factor": _pack_rows((1 / before).to(dtype)[:, None]).view(K),
        "proj_down": _pack_blocks(down.to(dtype), transposed=True).view(K, rank),
        "proj_up": _pack_blocks(up.to(dtype), transposed=False).view(N, rank),
    }
    if layer.bias is not None:
        packed["bias"] = _pack_rows(layer.bias.detach().to(dtype)[:, None]).view(N)
    return packed


def _pack_weight(codes: Tensor) -> Tensor:
    """int8 codes [N, K], -8..7 -> bytes [N, K / 2] in the order of the fragments of mma.m16n8k64.

    A tile of 128 rows and 64 columns after the other; in it 8 packs of 16 rows, in those 8 x 4 lanes, each with 2 x 2
    words of 8 codes along K, the first in the lowest bits.
    """
    N, K = codes.shape
    words = codes.int().view(N // _TILE, 8, 2, 8, K // 64, 2, 4, 8)  # tile, pack, half, lane | tile, half, lane, code
    words = words.permute(0, 4, 1, 3, 6, 2, 5, 7) & 0xF
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=codes.device)
    return (words << shifts).sum(-1, dtype=torch.int32).view(torch.int8).view(N, K // 2)


def _pack_rows(values: Tensor) -> Tensor:
    """[N, G] of one value for a row (and group) -> flat: tiles of 128 rows, in those the groups, in those the lanes.

    A lane has the rows 2 c, 2 c + 1, 2 c + 8 and 2 c + 9 of 16.
    """
    N, G = values.shape
    return values.reshape(N // _TILE, 8, 2, 4, 2, G).permute(0, 5, 1, 3, 2, 4).reshape(-1)


def _pack_blocks(matrix: Tensor, *, transposed: bool) -> Tensor:
    """Blocks of 16 x 16 of [A, B], flat; ``transposed`` goes down the columns of blocks first.

    In a block 8 x 4 lanes, each with 2 x 2 pairs of neighbours along B.
    """
    A, B = matrix.shape
    blocks = matrix.reshape(A // 16, 2, 8, B // 16, 2, 4, 2)  # block, half, lane | block, half, lane, pair
    order = (3, 0, 2, 5, 1, 4, 6) if transposed else (0, 3, 2, 5, 1, 4, 6)
    return blocks.permute(order).reshape(-1)

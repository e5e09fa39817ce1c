"""Block-sparse attention on the CPU by `block_sparse.cpp`, compiled for this machine on first use.

That takes seconds once; the library stays in the cache folder. Work is shared by as many threads as PyTorch uses.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from diffaccel.kernels import _store
from diffaccel.kernels._candidates import device_name
from diffaccel.kernels.block_pattern import BlockPattern

_SOURCE = Path(__file__).with_name("block_sparse.cpp")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread")
_LANES = 16
_LOG2E = 1.4426950408889634
_POINTERS = ("q", "k", "v", "bias", "out", "num", "indices", "order", "keys", "values")
_INTEGERS = (
    *("qb", "qh", "qn", "kb", "kh", "kn", "vb", "vh", "vn", "ob", "oh", "on", "bias_b", "bias_h", "lists_h", "order_h"),
    *("B", "H", "Hkv", "N", "M", "D", "Dv", "bs", "n", "m", "P"),
)


class _Call(ctypes.Structure):
    """``struct Call`` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _INTEGERS),
        ("scale", ctypes.c_float),
        ("next", ctypes.c_void_p),
    )


def cpp_refused(q: Tensor, attn_mask: Tensor | None) -> str | None:
    """Why this path cannot take the call, None if it can. Compiles nothing."""
    if q.device.type != "cpu":
        return f"no C++ kernel on {q.device.type}"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"no C++ kernel for {q.dtype}"
    if attn_mask is not None and attn_mask.shape[2] != 1:
        return "no C++ kernel for a mask that differs between queries"
    return None if compiler() else "no C++ compiler"


def compiler() -> str | None:
    """Path of the compiler, ``$CXX`` first."""
    return next((p for name in (os.environ.get("CXX") or "g++", "clang++") if (p := shutil.which(name))), None)


def cpp(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, attn_mask: Tensor | None, scale: float | None
) -> Tensor:
    """`block_sparse.block_sparse_attention` by the compiled loop, in float32 for any dtype; takes the order as it is.

    Raises:
        RuntimeError: the source does not compile here.
    """
    library, dtype = _library(), q.dtype
    q, k, v = (x.float() if x.float().stride(-1) == 1 else x.float().contiguous() for x in (q, k, v))
    (B, H, N, D), (Hkv, M), Dv, bs = q.shape, k.shape[1:3], v.shape[3], pattern.block_size
    n, m = pattern.keep.shape[1:]
    order = pattern.order
    packed_heads = H if order is not None and len(order) > 1 else Hkv
    keys = q.new_empty(B * packed_heads * m * D * _padded(bs))
    values = q.new_empty(B * packed_heads * m * bs * _padded(Dv))
    out = q.new_empty(B, N, H, Dv).transpose(1, 2)
    bias = None
    if attn_mask is not None:
        bias = attn_mask.expand(*attn_mask.shape[:3], M)[:, :, 0]
        bias = torch.where(bias, 0.0, -torch.inf) if bias.dtype == torch.bool else bias.float() * _LOG2E
        bias = bias.contiguous().expand(B, H, M)
    num, indices = pattern.kv_num_blocks.contiguous(), pattern.kv_indices.contiguous()
    tensors = (q, k, v, bias, out, num, indices, order, keys, values)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3])
    counter = ctypes.c_int64(0)
    call = _Call(
        *(None if x is None else x.data_ptr() for x in tensors),
        *strides,
        *(bias.stride()[:2] if bias is not None else (0, 0)),
        n if len(pattern.keep) > 1 else 0,
        N if order is not None and len(order) > 1 else 0,
        *(B, H, Hkv, N, M, D, Dv, bs, n, m, packed_heads),
        (D**-0.5 if scale is None else scale) * _LOG2E,
        ctypes.addressof(counter),
    )
    for stage in (library.pack_all, library.attend_all):
        counter.value = 0
        _in_threads(stage, call)
    return out if dtype == torch.float32 else out.to(dtype)


def _in_threads(stage: Callable[[object], object], call: _Call) -> None:
    """Run ``stage`` once a thread; each takes pieces of work until none is left. ctypes lets other threads run."""
    threads = torch.get_num_threads()
    others = [_pool().submit(stage, ctypes.byref(call)) for _ in range(threads - 1)]
    stage(ctypes.byref(call))
    for other in others:
        other.result()


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="diffaccel")


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    program = compiler()
    if program is None:
        raise RuntimeError("no C++ compiler")
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    parts = (_SOURCE.read_text(), *_FLAGS, device_name(torch.device("cpu")).rpartition(",")[0], version)
    name = f"block_sparse-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}.so"
    try:
        folder = _store.folder() / "cpp"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / name
        return ctypes.CDLL(str(file)) if file.exists() else _compiled(program, file)
    except (OSError, RuntimeError):  # no home directory, not writable, or a damaged file
        with tempfile.TemporaryDirectory() as elsewhere:
            return _compiled(program, Path(elsewhere) / name)


def _compiled(program: str, file: Path) -> ctypes.CDLL:
    """Compile, and put the file in its place as a whole, so that another process never loads half of it."""
    with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".so") as made:
        done = subprocess.run(
            [program, *_FLAGS, "-o", made.name, str(_SOURCE)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{program} cannot compile {_SOURCE.name}: {done.stderr[-400:]}")
        shutil.copy2(made.name, f"{made.name}.ready")
    os.replace(f"{made.name}.ready", file)
    return ctypes.CDLL(str(file))


def _padded(size: int) -> int:
    """As the source pads blocks and heads; it needs less where vectors are shorter."""
    return -(-size // _LANES) * _LANES

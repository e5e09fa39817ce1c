"""Facts about this machine that decide what diffaccel can do here, as data."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

OPTIONAL = {
    "triton": "GPU kernels (comes with torch for CUDA)",
    "peft": "LoRA adapters: pip install 'diffaccel[lora]'",
    "torchao": "pipelines whose weights torchao has quantized: pip install torchao",
    "gguf": "GGUF checkpoints: pip install gguf",
    "sentencepiece": "tokenizers of T5-like text encoders: pip install sentencepiece",
    "ftfy": "text cleaning in some video pipelines: pip install ftfy",
}
_REQUIRED = (
    "diffaccel",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "imageio",
    "imageio-ffmpeg",
)


def describe_machine() -> dict[str, dict[str, Any]]:
    """JSON-ready, by section."""
    return {
        "versions": {"python": platform.python_version(), "system": platform.platform()}
        | {name: _version(name) or "missing" for name in _REQUIRED},
        "processor": _processor(),
        "gpu": _gpu(),
        "compiler": _compiler(),
        "optional packages": {name: _version(name) or f"not installed; for {use}" for name, use in OPTIONAL.items()},
        "folders": _folders(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> dict[str, Any]:
    import psutil
    import torch

    flags = _cpu_flags()
    vnni = "avx512_vnni" in flags or "avx_vnni" in flags
    return {
        "name": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads of torch": torch.get_num_threads(),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "capability of torch": torch.backends.cpu.get_cpu_capability(),
        "AVX2": "avx2" in flags,
        "AVX512": "avx512f" in flags,
        "VNNI": vnni,
        "AMX int8": "amx_int8" in flags,
        "int8 linears": "8-bit activations" if vnni else "7-bit activations (without VNNI, 8 bits saturate)",
        "quantized engines": list(torch.backends.quantized.supported_engines),
    }


def _cpu_flags() -> set[str]:
    """The processor's flags as Linux names them; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), []))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpu() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {"CUDA": False, "torch built for CUDA": torch.version.cuda or False}
    facts: dict[str, Any] = {"CUDA": torch.version.cuda}
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        facts[f"cuda:{i}"] = f"{p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}"
    return facts


def _compiler() -> dict[str, Any]:
    found = next((p for name in (os.environ.get("CXX"), "g++", "clang++") if name and (p := shutil.which(name))), None)
    use = "compiled attention on the CPU (torch.compile)"
    return {"C++": found or f"none: {use} falls back to a plain form; install g++ or clang"}


def _folders() -> dict[str, Any]:
    import torch
    from huggingface_hub.constants import HF_HUB_CACHE

    from diffaccel.assets import path

    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if inductor is None:
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        inductor = default_cache_dir()
    state = "filled" if Path(inductor).exists() else "empty: the first compilation takes longer"
    return {
        "assets": str(path("shapes-image").parent),
        "models of the hub": str(HF_HUB_CACHE),
        "torch hub": torch.hub.get_dir(),
        "inductor": f"{inductor} ({state})",
    }

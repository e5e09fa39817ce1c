"""Energy of NVIDIA GPUs, as NVML counts it since the driver was loaded.

The counter is the GPU's own (Volta and later), moves about every 20 to 100 ms and knows nothing of processes: what else
runs on the GPU counts too, and a call should take seconds for the number to mean something.
"""

from __future__ import annotations

from typing import Any

import torch


class EnergyCounter:
    """The counter of one GPU.

    Args:
        nvml: the module ``pynvml``, initialised.
        handle: of the GPU.
    """

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    def joules(self) -> float:
        """Since the driver was loaded."""
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3


def energy_counter(device: torch.device) -> EnergyCounter | None:
    """The counter of ``device``; None where it is no NVIDIA GPU, ``pynvml`` is not installed, or it counts nothing."""
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"  # NVML numbers GPUs otherwise than CUDA
        counter = EnergyCounter(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid))
        counter.joules()
    except (pynvml.NVMLError, AttributeError):  # ROCm's properties have no such identity
        return None
    return counter

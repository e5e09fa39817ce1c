"""One call of a pipeline for one prompt and one seed, and its output as an array."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from diffaccel.errors import InputError
from diffaccel.eval.metrics.samples import as_samples
from diffaccel.pipelines.tasks import call_parameters

_OUTPUTS = ("images", "frames", "videos")


@dataclass(frozen=True)
class Job:
    """One item of a comparison: the prompt (or arguments of the call by name) and the seed."""

    index: int
    prompt: str | Mapping[str, Any]
    seed: int

    @property
    def label(self) -> str:
        """For captions."""
        return self.prompt if isinstance(self.prompt, str) else str(self.prompt.get("prompt", f"item {self.index}"))


def generate(pipe: Any, job: Job, calls: Mapping[str, Any]) -> np.ndarray:
    """Call the pipeline; returns its one sample as float32 ``[F, H, W, C]`` in [0, 1] (F = 1 for an image).

    Raises:
        InputError: the pipeline gives neither images nor frames, or several.
    """
    arguments = {**calls, **({"prompt": job.prompt} if isinstance(job.prompt, str) else job.prompt)}
    arguments["generator"] = torch.Generator().manual_seed(job.seed)
    if "output_type" in call_parameters(pipe):
        arguments["output_type"] = "np"
    with torch.no_grad():
        output = pipe(**arguments)
    # Modular pipelines return their state, which has `get` instead of attributes.
    found = (getattr(output, n, None) if hasattr(output, n) else _get(output, n) for n in _OUTPUTS)
    samples = next((s for s in found if s is not None), None)
    if samples is None:
        raise InputError(f"{type(pipe).__name__} returned {type(output).__name__} with none of {', '.join(_OUTPUTS)}")
    if len(samples) != 1:
        raise InputError(f"one prompt gave {len(samples)} samples; drop num_images_per_prompt and use more seeds")
    tensor = as_samples([samples[0]])[0]  # [F, C, H, W]
    return np.ascontiguousarray(tensor.movedim(1, -1).numpy())


def _get(output: Any, name: str) -> Any:
    return output.get(name) if hasattr(output, "get") else None


def steps_of(pipe: Any, calls: Mapping[str, Any]) -> int | None:
    """How many steps a call asks for; None where the pipeline takes no count or ``calls`` fixes the schedule itself."""
    if calls.get("timesteps") is not None or calls.get("sigmas") is not None:
        return None
    parameter = call_parameters(pipe).get("num_inference_steps")
    steps = calls.get("num_inference_steps", getattr(parameter, "default", None))
    return steps if isinstance(steps, int) else None

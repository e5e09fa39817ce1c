"""Static activations over the steps: which range of values a layer rounds to follows the denoiser's calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffaccel.clock import Call
from diffaccel.denoiser import Site
from diffaccel.quantization.channels import RANGES
from diffaccel.quantization.layer import QuantizedLayer
from diffaccel.root import Compute, Listener
from diffaccel.technique import Context


def follow_limits(layers: Mapping[Site, QuantizedLayer], context: Context) -> None:
    """From now on, those of ``layers`` with static activations take the range of the part of the schedule."""
    static = {s: x for s, x in layers.items() if any(run.scheme.activations == "static" for run in x.runs)}
    for denoiser in context.denoisers:
        own = [layer for site, layer in static.items() if site.component == denoiser.component]
        if own:
            context.root(denoiser).listeners.append(_follower(own))


def _follower(layers: Sequence[QuantizedLayer]) -> Listener:
    last: int | None = None

    def follow(call: Call, arguments: Mapping[str, Any], compute: Compute) -> None:
        nonlocal last
        part = min(int(call.progress * RANGES), RANGES - 1)
        if part != last:
            last = part
            for layer in layers:
                if isinstance(layer, QuantizedLayer):  # not turned back since
                    layer.use_limits(part)

    return follow

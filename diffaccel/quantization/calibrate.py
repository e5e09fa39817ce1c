"""What calibration does for quantization: which linears it looks at, and how a run that was cut off goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffaccel.denoiser import Denoiser, Site, select
from diffaccel.errors import PlanError
from diffaccel.quantization.channels import ChannelRecorder
from diffaccel.quantization.eligible import parameter_users, why_not
from diffaccel.quantization.section import Quantize

_TEXT_ROLES = ("cross.k", "cross.v")


def recorders_of(
    sections: Sequence[Quantize], denoisers: Sequence[Denoiser], encoders: Sequence[Denoiser] = ()
) -> dict[str, ChannelRecorder]:
    """By component, a recorder of what ``sections`` need to know; empty where they need nothing.

    Raises:
        PlanError: a pattern matches no layer.
    """
    users = parameter_users((*denoisers, *encoders))
    sites: dict[Site, None] = {}
    rotated: set[Site] = set()
    text: set[Site] = set()
    limited: set[Site] = set()
    for section in sections:
        if not section.needs_calibration:
            continue
        for site in select(denoisers, section.sites, "layers", encoders):
            of_convolutions = section.activations == "static"  # nothing else is measured of them
            kinds = (nn.Linear, nn.Conv2d) if of_convolutions else nn.Linear
            if not isinstance(site.module, kinds) or why_not(site.module, users) is not None:
                continue
            sites[site] = None
            if section.balance is not None and section.rotate and section.first == "rotate":
                rotated.add(site)
            if section.protect and site.role in _TEXT_ROLES:
                text.add(site)
            if section.activations == "static":
                limited.add(site)
    recorders = {}
    for network in (*denoisers, *encoders):
        own = [site for site in sites if site.component == network.component]
        if own:
            mine = set(own)
            recorders[network.component] = ChannelRecorder(own, rotated & mine, text & mine, limited & mine)
    return recorders


class Checkpoint:
    """The state of a calibration in a folder, so that one that was cut off goes on where it was.

    Args:
        folder: made if missing.
        settings: whatever decides what is measured; what JSON cannot hold counts by its type, tensors and generators by
            their contents.

    Raises:
        PlanError: the folder cannot be used, or holds another calibration.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: Any) -> None:
        self._file = Path(folder) / "calibration.safetensors"
        self._digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=_plain).encode()).hexdigest()
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PlanError(f"no folder can be made at {str(folder)!r} ({error.strerror}); choose another") from None

    def load(self) -> tuple[int, dict[str, Tensor]]:
        """How many calls are done, and what they measured."""
        if not self._file.exists():
            return 0, {}
        try:
            with safe_open(self._file, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        except (SafetensorError, OSError) as error:
            raise PlanError(f"{self._file} is damaged ({error}); remove it to begin anew") from None
        if metadata.get("digest") != self._digest:
            raise PlanError(
                f"{self._file} is of a calibration of another model, plan, prompts or arguments; give another folder, "
                "or remove it to begin anew"
            )
        return int(metadata["done"]), tensors

    def save(self, done: int, state: Mapping[str, Tensor]) -> None:
        """Replace what is there."""
        partial = self._file.with_suffix(".partial")
        save_file({n: t.contiguous() for n, t in state.items()}, partial, {"digest": self._digest, "done": str(done)})
        os.replace(partial, self._file)


def _plain(value: Any) -> list[Any]:
    """What stands for a value that JSON cannot hold, the same in another process."""
    if isinstance(value, torch.Generator):
        value = value.get_state()
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return [str(value.dtype), list(value.shape), hashlib.sha256(data).hexdigest()]
    return [type(value).__name__]

"""What ``config.json`` says of quantized layers, ``quantization_config.saved``: written from a model, read for one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.errors import ModelError
from diffaccel.quantization.layer import SAVED, QuantizedLayer
from diffaccel.quantization.schedule import Steps
from diffaccel.quantization.scheme import Scheme
from diffaccel.quantization.stored import KINDS, Run


@dataclass(frozen=True)
class SavedLayer:
    """How a layer runs, and what a file has of it.

    Args:
        run: the widest form.
        tensors: names with their dtypes, such as ``uint8``.
        steps: what it runs in ranges of progress, where that changes.
    """

    run: Run
    tensors: tuple[tuple[str, str], ...]
    steps: tuple[tuple[Steps, Scheme], ...] = ()

    @property
    def runs(self) -> tuple[Run, ...]:
        """All that it runs, in the order of the steps."""
        return tuple(replace(self.run, scheme=s) for s in dict.fromkeys(s for _, s in self.steps)) or (self.run,)

    @property
    def pieces(self) -> tuple[tuple[Steps, int], ...]:
        """For a `Phase`; empty where nothing changes."""
        schemes = [run.scheme for run in self.runs]
        return tuple((steps, schemes.index(scheme)) for steps, scheme in self.steps)

    def empty(self) -> dict[str, Tensor]:
        """Tensors without elements, on the meta device, for what is still to be read.

        Of the dtypes of the file, since diffusers casts what it reads to the dtype of what stands there.
        """
        return {name: torch.empty(0, dtype=getattr(torch, dtype), device="meta") for name, dtype in self.tensors}


def describe(model: nn.Module, *, native: bool = False) -> list[dict[str, Any]]:
    """JSON-ready, for `saved_layers`: the baked layers of ``model`` by what they are.

    Args:
        native: of a layer that rounds its activations at some steps only, say that it does; a policy says the rest.
    """
    layers: defaultdict[SavedLayer, list[str]] = defaultdict(list)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLayer) and layer.parked is None:
            run = layer.saved_run
            rounding = [r for r in layer.runs if r.suffix == run.suffix and r.scheme.activations != "float"]
            run = rounding[0] if native and rounding else run
            steps = () if native else saved_steps(layer)
            tensors = ((n, str(tensor.dtype).removeprefix("torch.")) for n, tensor in layer.saved().items())
            layers[SavedLayer(replace(run, suffix=""), tuple(tensors), steps)].append(name)
    entries = []
    for layer, names in layers.items():
        run = layer.run
        words = {"kind": run.kind, **asdict(run.scheme), "stored_group": run.group, "rotated": run.rotated}
        said = {name: value for name, value in words.items() if value not in (None, False)}
        changes = {"steps": [[*steps, asdict(scheme)] for steps, scheme in layer.steps]} if layer.steps else {}
        entries.append({**said, **changes, "tensors": dict(layer.tensors), "layers": names})
    return entries


def saved_steps(layer: QuantizedLayer) -> tuple[tuple[Steps, Scheme], ...]:
    """What it runs when, where that changes and all of it reads one stored weight; else nothing."""
    pieces = () if layer.phase is None else layer.phase.pieces
    runs = [layer.runs[index] for _, index in pieces if index >= 0]
    if len(pieces) < 2 or len(runs) < len(pieces) or len({run.suffix for run in runs}) > 1:
        return ()
    return tuple((steps, run.scheme) for (steps, _), run in zip(pieces, runs, strict=True))


def saved_layers(entries: Iterable[Mapping[str, Any]]) -> dict[str, SavedLayer]:
    """By name. Raises ModelError where they say what this version does not know."""
    layers: dict[str, SavedLayer] = {}
    for entry in entries:
        try:
            scheme = Scheme(entry["weights"], entry["activations"], entry.get("group"), entry.get("split", 0))
            run = Run(entry["kind"], scheme, entry.get("stored_group"), entry.get("rotated", False))
            if run.kind not in KINDS:
                raise KeyError(run.kind)
            if unknown := set(entry["tensors"]) - set(SAVED):
                raise KeyError(*sorted(unknown))
            for dtype in entry["tensors"].values():
                if not isinstance(getattr(torch, dtype, None), torch.dtype):
                    raise KeyError(dtype)
            steps = tuple(((float(a), float(b)), Scheme(**words)) for a, b, words in entry.get("steps", ()))
            if steps and [*(a for (a, _), _ in steps), 1.0] != [0.0, *(b for (_, b), _ in steps)]:
                raise ValueError(f"steps {[s for s, _ in steps]} do not lead from 0 to 1")
            saved = SavedLayer(run, tuple(entry["tensors"].items()), steps)
            layers |= dict.fromkeys(entry["layers"], saved)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ModelError(
                f"config.json's quantization_config has an entry that this diffaccel does not know ({error}): save the "
                "model again with this version, or install the one that wrote it"
            ) from None
    return layers

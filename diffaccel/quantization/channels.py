"""What calibration measures at every linear: the mean square of each input channel, by part of the schedule.

It decides the balance of channels (see `conditioning`) and how much an error in a column of the weight matters; rows of
the text that never change can be protected (see `protection`). Where activations are static, also the least and largest
value of each channel. Everything is streamed: nothing grows with the number of prompts or tokens, and measurements of
several runs merge in any order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.clock import Call
from diffaccel.denoiser import Site
from diffaccel.kernels.hadamard import hadamard
from diffaccel.plan import Artefacts
from diffaccel.quantization.protection import LEADING, ConstantRows
from diffaccel.quantization.rotation import block_size, random_signs
from diffaccel.quantization.schedule import Steps

PREFIX = "quantization"
RANGES = 8
"""Parts of equal progress that the schedule is cut into."""


class Channels:
    """What a plan's artefacts hold of one site.

    Attributes:
        constant: leading rows of the text that never change and outlie the others, [P, K]; None where there are none.
    """

    def __init__(self, artefacts: Artefacts, site: Site) -> None:
        self._artefacts, self._name = artefacts, f"{PREFIX}.{site.full_name}"
        self.constant = artefacts.get(f"{self._name}.constant")

    def squares(self, ranges: Sequence[Steps], *, rotated: bool = False) -> Tensor:
        """Mean square of each input channel over ranges of progress, [K]; over all where nothing was measured there.

        Args:
            rotated: of the rotated input.
        """
        table = self._artefacts[f"{self._name}.{'rotated' if rotated else 'squares'}"]
        seen = self._artefacts[f"{self._name}.seen"]
        rows = [i for i in range(RANGES) if any(i < b * RANGES and (i + 1) > a * RANGES for a, b in ranges)]
        chosen = [i for i in rows if seen[i]] or [i for i in range(RANGES) if seen[i]]
        return table[chosen].mean(0)

    def limits(self, before: Tensor | None, split: int = 0) -> Tensor:
        """Least and largest value of the input times ``before`` [K], for each part of the schedule, [RANGES, 2].

        Where nothing was measured, those of all the others. With ``split``, [RANGES, 4]: of so many leading channels
        first, then of the others.
        """
        table = self._artefacts[f"{self._name}.limits"]
        table = table if before is None else table * before.to(table)
        seen = self._artefacts[f"{self._name}.seen"]
        pairs = []
        for part in (table[..., :split], table[..., split:]) if split else (table,):
            low, high = part[:, 0].amin(-1), part[:, 1].amax(-1)
            pairs += [torch.where(seen, low, low[seen].amin()), torch.where(seen, high, high[seen].amax())]
        return torch.stack(pairs, 1)

    def learnt(self, key: str) -> dict[str, Tensor]:
        """The tensors of a weight whose rounding was learnt, by name; none where it was not; see `learnt_key`."""
        prefix = f"{self._name}.learnt.{key}."
        return {name.removeprefix(prefix): t for name, t in self._artefacts.items() if name.startswith(prefix)}

    @property
    def measured(self) -> bool:
        """Whether the squares were measured."""
        return f"{self._name}.squares" in self._artefacts

    @property
    def limited(self) -> bool:
        """Whether least and largest values were measured."""
        return f"{self._name}.limits" in self._artefacts

    @property
    def rotated(self) -> bool:
        """Whether the rotated input was measured too."""
        return f"{self._name}.rotated" in self._artefacts


def channels_of(artefacts: Artefacts, site: Site) -> Channels | None:
    """What was measured at ``site``, or None."""
    name = f"{PREFIX}.{site.full_name}."
    return Channels(artefacts, site) if any(known.startswith(name) for known in artefacts) else None


class ChannelRecorder:
    """Measures the inputs of some layers of one denoiser. Its `follow` listens at the denoiser's root.

    Args:
        sites: the linears, and convolutions whose activations will be static.
        rotated: those whose rotated input is measured too.
        text: those that may have protected rows.
        limited: those whose least and largest values are measured.
    """

    def __init__(
        self, sites: Sequence[Site], rotated: set[Site], text: set[Site], limited: set[Site] | None = None
    ) -> None:
        self._names = [site.full_name for site in sites]
        self._row = 0
        self._run = -1
        self._sums: dict[str, Tensor] = {}  # float64 [RANGES, K], by site and kind
        self._counts: dict[str, Tensor] = {}  # int64 [RANGES]
        self._rows = {site.full_name: ConstantRows() for site in text}
        self._limited = {site.full_name for site in limited or ()}
        self._limits: dict[str, Tensor] = {}  # float32 [RANGES, 2, 1 + P, K]: of most rows, then of each leading one
        self._rotated = {s.full_name for s in rotated if block_size(int(s.module.in_features)) is not None}  # type: ignore[arg-type]
        self._handles = [site.module.register_forward_pre_hook(self._hook(site.full_name)) for site in sites]

    def follow(self, call: Call, arguments: Mapping[str, Any], compute: Any) -> None:
        """Note where the loop stands."""
        self._row = min(int(call.progress * RANGES), RANGES - 1)
        if call.run != self._run:
            self._run = call.run
            for rows in self._rows.values():
                rows.begin()

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def state(self) -> dict[str, Tensor]:
        """Everything measured so far, by name; what `merge` takes."""
        state = {f"{PREFIX}.{name}": tensor.cpu() for name, tensor in self._sums.items()}
        state |= {f"{PREFIX}.{name}.counts": counts for name, counts in self._counts.items()}
        state |= {f"{PREFIX}.{name}.limits": table.cpu() for name, table in self._limits.items()}
        for name, rows in self._rows.items():
            state |= {f"{PREFIX}.{name}.{key}": value for key, value in rows.state().items()}
        return state

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Take in what another recorder of the same sites measured."""
        for site in self._names:
            name = f"{PREFIX}.{site}."
            own = {key.removeprefix(name): value for key, value in state.items() if key.startswith(name)}
            for kind in ("squares", "rotated"):
                if kind in own:
                    self._add(f"{site}.{kind}", own[kind])
            if "limits" in own:
                self._widen(site, own["limits"])
            if "counts" in own:
                self._counts[site] = self._counts.get(site, 0) + own["counts"]
            if site in self._rows:
                self._rows[site].merge(own)

    def artefacts(self) -> Iterator[tuple[str, Tensor]]:
        """Named tensors for the plan, see `Channels`."""
        for name, sums in self._sums.items():
            counts = self._counts[name.rpartition(".")[0]]
            yield f"{PREFIX}.{name}", (sums.cpu() / counts.clamp(min=1)[:, None]).float()
        for name, counts in self._counts.items():
            yield f"{PREFIX}.{name}.seen", counts > 0
        for name, table in self._limits.items():
            constant = self._rows[name].found() if name in self._rows else None
            rest = table[:, :, [0, *range(1 if constant is None else 1 + len(constant), table.shape[2])]].cpu()
            yield f"{PREFIX}.{name}.limits", torch.stack([rest[:, 0].amin(1), rest[:, 1].amax(1)], 1)
        for name, rows in self._rows.items():
            constant = rows.found()
            if constant is not None:
                yield f"{PREFIX}.{name}.constant", constant.cpu()

    def _hook(self, name: str) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach() if args else None
            if x is None or not x.numel():
                return
            if isinstance(module, nn.Conv2d):
                x = x.movedim(-3, -1)  # channels last, as the inputs of linears are
            if name in self._rows:
                self._rows[name].see(x)
            values = x.reshape(-1, x.shape[-1]).float()
            self._note(f"{name}.squares", values)
            if name in self._limited:
                self._note_limits(name, x)
            if name in self._rotated:
                turned = hadamard(values, random_signs(values.shape[-1], values.device))
                self._note(f"{name}.rotated", turned)
            counts = torch.zeros(RANGES, dtype=torch.int64)
            counts[self._row] = len(values)
            self._counts[name] = self._counts.get(name, 0) + counts

        return look

    def _note(self, name: str, values: Tensor) -> None:
        table = values.new_zeros(RANGES, values.shape[1], dtype=torch.float64)
        table[self._row] = values.square().sum(0)
        self._add(name, table)

    def _note_limits(self, name: str, x: Tensor) -> None:
        """Leading rows of a text apart: those that turn out to be protected do not count."""
        table = x.new_empty(RANGES, 2, 1 + (LEADING if name in self._rows else 0), x.shape[-1], dtype=torch.float32)
        table[:, 0], table[:, 1] = torch.inf, -torch.inf
        leading = LEADING if name in self._rows and x.ndim == 3 and x.shape[1] > LEADING else 0
        x = x.float().nan_to_num(0.0, 0.0, 0.0)  # one broken value must not decide the range
        rest = x[:, leading:] if leading else x
        table[self._row, :, 0] = torch.stack(rest.reshape(-1, x.shape[-1]).aminmax(dim=0))
        for i in range(leading):
            table[self._row, :, 1 + i] = torch.stack(x[:, i].aminmax(dim=0))
        self._widen(name, table)

    def _widen(self, name: str, table: Tensor) -> None:
        known = self._limits.get(name)
        if known is not None:
            table = table.to(known)
            table = torch.stack([torch.minimum(known[:, 0], table[:, 0]), torch.maximum(known[:, 1], table[:, 1])], 1)
        self._limits[name] = table

    def _add(self, name: str, table: Tensor) -> None:
        known = self._sums.get(name)
        self._sums[name] = table if known is None else known + table.to(known)

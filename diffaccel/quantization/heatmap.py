"""An allocation for people: a heat map of sites and steps, as text or as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from diffaccel.errors import MissingPackageError

if TYPE_CHECKING:
    from diffaccel.quantization.allocation import Allocation

_SHADES = " .:-=+*#%@"


def as_text(allocation: Allocation) -> str:
    """One line a site: the scheme in each range of steps, and how sensitive it is there (@ most, blank least)."""
    s = allocation.sensitivities
    labels = _labels(allocation)
    width = max(len(label) for label in labels)
    shades = _shades(allocation)
    name_width = max(len(name) for name in s.sites)
    head = " ".join(f"{a:g}-{b:g}".ljust(width + 2) for a, b in s.ranges)
    lines = [f"{'site'.ljust(name_width)}  {head}"]
    for name, row, shade in zip(s.sites, allocation.choice.tolist(), shades, strict=True):
        cells = " ".join(f"{labels[c].ljust(width)} {dark}" for c, dark in zip(row, shade, strict=True))
        lines.append(f"{name.ljust(name_width)}  {cells}")
    share = allocation.cost("bytes")
    lines.append(
        f"{share:.3f} of the bytes, {allocation.cost('bits'):.2f} bits on average, predicted error "
        f"{10 * torch.tensor(max(allocation.error, 1e-30)).log10():.1f} dB"
    )
    return "\n".join(lines)


def draw(allocation: Allocation, file: str | os.PathLike[str]) -> None:
    """The same as a picture: sensitivity as colour, schemes as words.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError("a heat map as a picture needs matplotlib: pip install matplotlib") from None
    s, labels = allocation.sensitivities, _labels(allocation)
    figure = Figure(figsize=(3 + 1.2 * len(s.ranges), 1.5 + 0.18 * len(s.sites)), layout="constrained")
    axes = figure.subplots()
    values = _decibels(allocation)
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(s.ranges)), [f"{a:g} to {b:g}" for a, b in s.ranges])
    axes.set_yticks(range(len(s.sites)), s.sites, fontsize=6)
    axes.set_xlabel("progress")
    for y, row in enumerate(allocation.choice.tolist()):
        for x, c in enumerate(row):
            axes.text(x, y, labels[c], ha="center", va="center", fontsize=5, color="white")
    figure.colorbar(image, label=f"error in dB if {labels[0]}")
    figure.savefig(file, dpi=150)


def _labels(allocation: Allocation) -> list[str]:
    return [c.form().label for c in allocation.sensitivities.candidates]


def _decibels(allocation: Allocation) -> torch.Tensor:
    """Error of the coarsest candidate as it shows in the end, [sites, ranges]."""
    s = allocation.sensitivities
    return 10 * (s.error[:, 0] * s.shows).clamp(min=1e-30).log10()


def _shades(allocation: Allocation) -> Sequence[str]:
    values = _decibels(allocation).nan_to_num()
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / max(high - low, 1e-9) * (len(_SHADES) - 1)
    return ["".join(_SHADES[int(v)] for v in row) for row in scaled.tolist()]

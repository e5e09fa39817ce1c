"""Settings of pruning. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffaccel.errors import PlanError, did_you_mean
from diffaccel.plan import Section, section_type

UNITS = ("heads", "neurons", "sublayer", "resnet", "block")
METHODS = ("ecodiff", "magnitude", "activation", "taylor", "random", "hierarchy", "evolution")
BUDGETS = ("parameters", "flops", "latency")
SCOPES = ("global", "layer")
PREFIX = "pruning."
"""Of the artefacts' names; then come the component, a dot, and the group: the indices of the units that stay."""


@section_type
@dataclass(frozen=True, kw_only=True)
class Pruning(Section):
    """Remove heads, neurons, sub-layers or blocks of the denoisers, really: fewer bytes, operations and seconds.

    What goes is decided by `diffaccel.prune`, which gives a plan with the indices of what stays; `diffaccel.accelerate`
    only applies such a plan. Removal costs quality: heal the result with `diffaccel.distill`.

    Args:
        ratio: share of the ``budget`` of each denoiser that is to go.
        units: what may be cut, a text of ``heads``, ``neurons`` (of feed-forwards), ``sublayer`` (whole attentions and
            feed-forwards), ``resnet`` (branches of a UNet) and ``block``.
        method: how it is decided. ``ecodiff`` learns masks through the whole sampling trajectory (arXiv:2412.02852);
            ``hierarchy`` replaces each unit in turn and measures (HierarchicalPrune), for whole sub-layers and blocks;
            ``evolution`` searches sets of units without gradients (EEP); ``magnitude``, ``activation``, ``taylor`` and
            ``random`` compare.
        budget: what ``ratio`` is a share of: ``parameters``, ``flops`` of a call, or its measured ``latency``.
        scope: ``global`` compares units of all layers; ``layer`` takes the same share of each.
        multiple: kept neurons are multiples of this, which kernels and quantization like.
        protect: share of the blocks, from the first, that is not touched: they decide what the picture becomes.
        seed: of ``random`` and ``evolution``.
        flows: filled by `diffaccel.prune`: how the outputs of blocks and attentions go on.
        depth: likewise: what a config says of a model with fewer blocks, where that is all that changes. Such a model,
            baked and saved, loads without diffaccel.
    """

    technique: ClassVar[str] = "pruning"

    ratio: float = 0.2
    units: str = "heads neurons"
    method: str = "ecodiff"
    budget: str = "parameters"
    scope: str = "global"
    multiple: int = 8
    protect: float = 0.0
    seed: int = 0
    flows: tuple[str, ...] = ()
    depth: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_number("ratio", 0, 0.95, open_low=True)
        if not isinstance(self.units, str) or not self.units.split():
            raise PlanError(f"Pruning.units must be a text such as 'heads neurons', got {self.units!r}")
        for word in self.units.split():
            if word not in UNITS:
                raise PlanError(f"Pruning.units names {word!r}{did_you_mean(word, UNITS)}")
        self._check_choice("method", METHODS)
        self._check_choice("budget", BUDGETS)
        self._check_choice("scope", SCOPES)
        self._check_number("multiple", 1, 1024, whole=True)
        self._check_number("protect", 0, 0.95)
        self._check_number("seed", 0, 2**31, whole=True)
        whole = set(self.units.split()) - {"heads", "neurons"}
        if self.method == "hierarchy" and len(whole) < len(self.units.split()):
            raise PlanError(
                "Pruning(method='hierarchy') replaces whole units one by one, so units must be among sublayer, resnet "
                f"and block; got {self.units!r}"
            )
        if self.scope == "layer" and whole:
            raise PlanError(
                f"Pruning(scope='layer') takes a share of each layer, and {', '.join(sorted(whole))} are cut whole; "
                "use scope='global'"
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The words of ``units``."""
        return tuple(dict.fromkeys(self.units.split()))


@section_type
@dataclass(frozen=True, kw_only=True)
class LowRank(Section):
    """Replace linears by two of lower rank (SVD, as Greenformers and FlashSVD do), where that saves weights.

    Args:
        sites: which linears, see `diffaccel.sites`.
        energy: share of the squared singular values that a site keeps: each gets the rank it needs.
        ratio: instead, the rank of every site as a share of the rank at which its weights would not shrink.
        multiple: ranks are multiples of this.
    """

    technique: ClassVar[str] = "pruning"

    sites: str = "ff.* fused.*"
    energy: float | None = None
    ratio: float | None = None
    multiple: int = 8

    def __post_init__(self) -> None:
        self._check_sites(self.sites)
        if (self.energy is None) == (self.ratio is None):
            raise PlanError("LowRank needs either energy=0.95 or ratio=0.5, not both or none")
        for name in ("energy", "ratio"):
            if getattr(self, name) is not None:
                self._check_number(name, 0, 1, open_low=True)
        self._check_number("multiple", 1, 1024, whole=True)

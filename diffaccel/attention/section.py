"""Settings of sparse attention. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffaccel.errors import PlanError, did_you_mean
from diffaccel.plan import Section, section_type

POLICIES = ("auto", "window", "arrow", "influence", "mass", "spatial-temporal", "online")
MEASURED = ("mass", "influence")
CALIBRATED = (*MEASURED, "spatial-temporal")
ALLOCATIONS = ("even", "share", "error")
OTHER_GRIDS = ("dense", "resample")
ORDERS = (
    *("n", "hw", "wh", "morton", "hilbert", "fhw", "fwh", "hfw", "hwf", "wfh", "whf"),
    *("f-morton", "f-hilbert", "morton-f", "hilbert-f"),
)
"""Orders of the tokens of a grid by name (`orders`). Artefacts hold places in this list: names are only added at its
end."""


@section_type
@dataclass(frozen=True, kw_only=True)
class BlockSparse(Section):
    """Compute only some blocks of self-attention; text is always dense.

    Policies: ``window``, the blocks that are nearest on the token grid; ``arrow``, a band along the sequence and the
    first block (DiTFastAttn V2, arXiv:2503.22796); ``mass``, the blocks of each query block that hold most attention in
    a calibration, by head and range of steps (PAROAttention, arXiv:2506.16054, sec. 3.3, with as many blocks for each
    query block); ``influence``, those whose loss would change the output most, which looks at the values too
    (`kernels.block_mass`); ``spatial-temporal``, for each head a band along the frames or along time, whichever holds
    more (Sparse VideoGen, arXiv:2502.01776, sec. 4; chosen in a calibration); ``online``, chosen in every call from
    the means of blocks (SpargeAttn, arXiv:2502.18137, sec. 3.3, with a fixed share). ``mass``, ``influence`` and
    ``spatial-temporal`` need `diffaccel.calibrate`.

    Args:
        density: kept share of attention blocks among the image tokens, in (0, 1]; lower = faster, further from the
            original.
        sites: which attention calls, by role (``attn``) or name; cross-attention is never made sparse.
        steps: range of progress in which the mask holds; outside it attention is dense. The noisy start needs
            all tokens.
        block_size: tokens per block, a multiple of 16.
        policy: see above; ``auto`` is ``mass`` where tokens are reordered, else ``window``.
        reorder: reads the tokens in another order (PAROAttention, sec. 3.2): True for each head its own, calibrated;
            ``"fixed"`` for one that suits all heads best; or the name of an order, such as ``"hwf"``. For policies
            ``mass``, ``influence`` and, with a name, ``online``.
        masks: sets of masks along ``steps``: all but one share the first half of it, one serves the rest.
        allocate: how a measured policy spends the density: ``even``, the same on all heads and steps; ``share``, where
            most of what is measured would be left out; ``error``, where that moves the denoiser's output most.
        other_grid: on tokens of another grid than the calibration's, stay ``dense`` or ``resample`` the masks.
    """

    technique: ClassVar[str] = "attention"

    density: float = 0.5
    sites: str = "attn"
    steps: tuple[float, float] = (0.2, 1.0)
    block_size: int = 64
    policy: str = "auto"
    reorder: bool | str = False
    masks: int = 4
    allocate: str = "even"
    other_grid: str = "dense"

    def __post_init__(self) -> None:
        self._check_number("density", 0, 1, open_low=True)
        self._check_sites(self.sites)
        self._check_steps(self.steps)
        self._check_number("block_size", 16, 1024, whole=True)
        if self.block_size % 16:
            raise PlanError(f"BlockSparse.block_size must be a multiple of 16, got {self.block_size}")
        self._check_choice("policy", POLICIES)
        self._check_choice("allocate", ALLOCATIONS)
        self._check_choice("other_grid", OTHER_GRIDS)
        self._check_number("masks", 1, 100, whole=True)
        self._check_reorder()
        if self.allocate != "even" and self.kind not in MEASURED:
            raise PlanError(
                f"BlockSparse.allocate={self.allocate!r} needs a measured policy; set policy='mass', or leave "
                "allocate at 'even'"
            )

    def _check_reorder(self) -> None:
        names = ("fixed", *ORDERS)
        if not isinstance(self.reorder, bool) and self.reorder not in names:
            raise PlanError(
                f"BlockSparse.reorder must be True, False or a name, got {self.reorder!r}"
                f"{did_you_mean(str(self.reorder), names)}"
            )
        chosen = self.reorder is True or self.reorder == "fixed"
        if (self.reorder and self.kind not in (*MEASURED, "online")) or (chosen and self.kind == "online"):
            raise PlanError(
                f"BlockSparse.reorder={self.reorder!r} does not go with policy={self.policy!r}; reorder is for "
                "policy='mass' or 'influence', and for 'online' by name, such as reorder='hwf'"
            )

    @property
    def kind(self) -> str:
        """The policy, with ``auto`` decided."""
        return self.policy if self.policy != "auto" else "mass" if self.reorder else "window"

    @property
    def needs_calibration(self) -> bool:
        return self.kind in CALIBRATED

    @property
    def edges(self) -> tuple[float, ...]:
        """Where in progress the sets of masks begin, and at the end where the last one ends."""
        begin, end = self.steps
        if self.masks == 1:
            return begin, end
        half = (end - begin) / 2
        # Rounded, so that a step that stands on an edge falls to the same side on every machine.
        return (*(round(begin + half * i / (self.masks - 1), 6) for i in range(self.masks)), end)

    def mask_at(self, progress: float) -> int:
        """Which set of masks holds at ``progress``; the nearest one outside ``steps``."""
        return min(max(sum(round(progress, 6) >= edge for edge in self.edges) - 1, 0), self.masks - 1)

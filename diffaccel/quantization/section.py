"""Settings of quantization. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffaccel.plan import Section, section_type


@section_type
@dataclass(frozen=True, kw_only=True)
class Quantize(Section):
    """Run linears with integer weights and activations (W8A8, as in ViDiT-Q, arXiv:2406.02540, without its balancing).

    Args:
        sites: which linears, see `diffaccel.sites`. The default leaves embeddings, modulation and the final projection
            in 16 or 32 bits, as the papers do.
        weights: ``int8``, symmetric, one scale per output channel.
        activations: ``int8``, symmetric, one scale per token, found at run time.
        float_activations: among ``sites``, those whose activations stay in 16 or 32 bits, so that only their weights
            shrink (W8A16); "" for none. By default what reads the text, whose tokens have outliers: ViDiT-Q and MixDQ
            keep these layers out too. They see few tokens, so int8 would hardly make them faster.
        steps: range of progress in which the quantized form runs; the full schedule by default.
    """

    technique: ClassVar[str] = "quantization"

    sites: str = "attn.* cross.* ff.* fused.*"
    weights: str = "int8"
    activations: str = "int8"
    float_activations: str = "cross.k cross.v"
    steps: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        self._check_sites(self.sites)
        self._check_choice("weights", ("int8",))
        self._check_choice("activations", ("int8",))
        if self.float_activations != "":
            self._check_sites(self.float_activations)
        self._check_steps(self.steps)

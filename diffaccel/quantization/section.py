"""Settings of quantization. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from diffaccel.errors import PlanError
from diffaccel.plan import Section, section_type
from diffaccel.quantization.scheme import ACTIVATIONS, ORDERS, ROUNDINGS, WEIGHTS, Conditioning, Form, Scheme

GROUPS = (32, 64, 128)


@section_type
@dataclass(frozen=True, kw_only=True)
class Quantize(Section):
    """Run linears with small weights and activations; where several sections match a site at a step, the last one wins.

    The default is W8A8, as ViDiT-Q's kernels run it (arXiv:2406.02540). Other schemes: ``weights="int4"`` (W4A8),
    ``activations="float"`` (W8A16, W4A16), ``weights="fp8", activations="fp8"``. A site whose sections say int8 at some
    steps and int4 in groups at others keeps one stored weight that gives both; a model that is baked and saved runs the
    same at each step where that reads one stored weight, else the form with the most bits at all steps.
    2D convolutions (``sites="conv skip"``) take int8 weights, not conditioned.

    Args:
        sites: which linears, see `diffaccel.sites`. The default leaves embeddings, modulation and the final projection
            in 16 or 32 bits, as the papers do.
        weights: ``int8``, ``int4`` or ``fp8`` (e4m3), symmetric, one scale per output channel.
        activations: ``int8`` or ``fp8``, symmetric, one scale per token, found at run time; ``float`` leaves them in 16
            or 32 bits. Integer weights go with int8 activations, fp8 with fp8; either with float ones. ``static``, with
            int8 weights: int8 with one range for all tokens, by part of the schedule, which `diffaccel.calibrate`
            measures (MixDQ, arXiv:2405.17873; DGQ's groups of steps, arXiv:2501.04304), for few-step models.
        group: for int4, input channels (32, 64 or 128) that share a multiplier beneath the channel's scale: finer, for
            8 bits per group. None: none.
        float_activations: among ``sites``, those whose activations stay in 16 or 32 bits, so that only their weights
            shrink (W8A16); "" for none. By default what reads the text, whose tokens have outliers: ViDiT-Q and MixDQ
            keep these layers out too. They see few tokens, so int8 would hardly make them faster.
        balance: share of an input channel's size that moves from the activations into the weight (SmoothQuant's alpha,
            arXiv:2211.10438, sec. 4): 0 evens out the weight only, 1 the activations only. Each section of a range of
            steps is balanced for those. Needs `diffaccel.calibrate`. None: not at all.
        rotate: turn inputs and weights by a randomised Hadamard matrix, which spreads outliers over the channels
            (ViDiT-Q's dynamic channel balance; QuaRot, arXiv:2404.00456).
        first: ``balance`` (ViDiT-Q) or ``rotate`` (QuantVGGT, arXiv:2509.21302), where both are asked for.
        low_rank: rank of a part of the weight that stays in 16 bits, so that only the rest is rounded (SVDQuant,
            arXiv:2411.05007, sec. 4.2); 0 for none.
        refine: how often the low-rank part is fitted again to what rounding left (SVDQuant's code); the best is kept.
        protect: compute constant outlying tokens of the text, such as CLIP's first, once in full precision (MixDQ's
            BOS-aware quantization, arXiv:2405.17873). Needs `diffaccel.calibrate`, which finds them.
        split: whether 2D convolutions that read a skip connection beside their input round the two apart, weights too
            (MixDQ); costs the addition of two results.
        rounding: ``nearest``, or ``learnt`` block by block so that the blocks' outputs stay (AdaRound,
            arXiv:2004.10568; QuantVGGT, arXiv:2509.21302): int8 and int4, needs `diffaccel.learn_rounding`.
        steps: range of progress in which the quantized form runs; the full schedule by default.
    """

    technique: ClassVar[str] = "quantization"

    sites: str = "attn.* cross.* ff.* fused.*"
    weights: str = "int8"
    activations: str = "int8"
    group: int | None = None
    float_activations: str = "cross.k cross.v"
    balance: float | None = None
    rotate: bool = False
    first: str = "balance"
    low_rank: int = 0
    refine: int = 0
    protect: bool = False
    split: bool = False
    rounding: str = "nearest"
    steps: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        self._check_sites(self.sites)
        self._check_choice("weights", WEIGHTS)
        self._check_choice("activations", ACTIVATIONS)
        if self.activations == "static" and self.weights != "int8":
            raise PlanError(
                f"Quantize: static activations go with int8 weights, got {self.weights!r}; use 'int8' for both"
            )
        if self.activations != "float" and (self.weights == "fp8") != (self.activations == "fp8"):
            fitting = "fp8" if self.weights == "fp8" else "int8"
            raise PlanError(
                f"Quantize: {self.weights} weights do not multiply with {self.activations} activations; "
                f"use activations={fitting!r} or 'float'"
            )
        if self.group is not None and (self.group not in GROUPS or self.weights != "int4"):
            raise PlanError(
                f"Quantize.group is {self.group!r} with {self.weights} weights: int4 takes None or one of "
                f"{', '.join(map(str, GROUPS))}, the others have one scale per output channel"
            )
        if self.float_activations != "":
            self._check_sites(self.float_activations)
        if self.balance is not None:
            self._check_number("balance", 0, 1)
        for name in ("rotate", "protect", "split"):
            if not isinstance(getattr(self, name), bool):
                raise PlanError(f"Quantize.{name} must be True or False, got {getattr(self, name)!r}")
        self._check_choice("first", ORDERS)
        if self.activations == "static" and self.rotate:
            raise PlanError(
                "Quantize: static activations save looking at each row, which a rotation has to do anyway; use "
                "activations='int8' with rotate=True, or rotate=False"
            )
        self._check_number("low_rank", 0, 4096, whole=True)
        self._check_number("refine", 0, 100, whole=True)
        self._check_choice("rounding", ROUNDINGS)
        if self.rounding == "learnt" and self.weights == "fp8":
            raise PlanError("Quantize: rounding is learnt for int8 and int4 weights, got fp8; use rounding='nearest'")
        self._check_steps(self.steps)

    @property
    def needs_calibration(self) -> bool:
        """Whether it needs what `diffaccel.calibrate` measures."""
        return self.balance is not None or self.protect or self.activations == "static"

    def form(self, *, float_activations: bool = False) -> Form:
        """What a site gets; ``float_activations`` for one whose activations stay as they come."""
        scheme = Scheme(self.weights, self.activations, self.group)
        if float_activations:
            scheme = replace(scheme, activations="float")
        both = self.balance is not None and self.rotate
        return Form(
            scheme,
            Conditioning(
                self.balance,
                self.rotate,
                self.first if both else "balance",
                self.low_rank,
                self.refine if self.low_rank else 0,
                self.protect,
                self.rounding == "learnt",
            ),
        )

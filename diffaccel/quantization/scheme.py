"""What a quantized linear is made of, in words only. No torch.

A *scheme* says how weights and activations are rounded, a *conditioning* what is done to both beforehand so that less
is lost. Together they are a *form*; a site runs one form at each step, or stays as it was.
"""

from __future__ import annotations

from dataclasses import dataclass

WEIGHTS = ("int8", "int4", "fp8")
ACTIVATIONS = ("int8", "static", "fp8", "float")
ORDERS = ("balance", "rotate")
ROUNDINGS = ("nearest", "learnt")

_BITS = {"int8": 8, "int4": 4, "fp8": 8}


@dataclass(frozen=True)
class Scheme:
    """How weights and activations are rounded.

    Args:
        weights: ``int8``, ``int4`` or ``fp8`` (e4m3), symmetric, one scale per output channel.
        activations: ``int8`` or ``fp8``, one scale per token, found at run time; ``static``, int8 with one range for
            all tokens, found by calibration; ``float`` leaves them as they come.
        group: with ``int4``, input channels that share a multiplier of their own beneath the channel's scale.
        split: of a convolution, the leading input channels that are rounded apart from the others; 0: all together.
    """

    weights: str = "int8"
    activations: str = "int8"
    group: int | None = None
    split: int = 0

    @property
    def bits(self) -> int:
        """Of a weight."""
        return _BITS[self.weights]

    @property
    def label(self) -> str:
        """As people write it: W8A8, W4A16 g64, FP8."""
        if self.weights == "fp8":
            return "FP8" if self.activations == "fp8" else "WFP8A16"
        group = f" g{self.group}" if self.group else ""
        activations = {"int8": "A8", "static": "A8 static"}.get(self.activations, "A16")
        return f"W{self.bits}{activations}{group}{' split' if self.split else ''}"

    @property
    def integer_activations(self) -> bool:
        """Whether they are rounded to int8."""
        return self.activations in ("int8", "static")


@dataclass(frozen=True)
class Conditioning:
    """What is done to input and weight before they are rounded; without rounding, nothing changes the product.

    Args:
        balance: alpha of `diffaccel.quantization.balance`, or None.
        rotate: whether both are turned by a randomised Hadamard matrix.
        first: which of the two is done first, ``balance`` or ``rotate``.
        low_rank: rank of the part of the weight that stays in 16 bits.
        refine: how often the low-rank part is fitted again to what rounding left.
        protect: whether constant outlying tokens of the text are computed once in full precision.
        learnt: whether the weight's rounding is learnt, see `diffaccel.quantization.rounding`.
    """

    balance: float | None = None
    rotate: bool = False
    first: str = "balance"
    low_rank: int = 0
    refine: int = 0
    protect: bool = False
    learnt: bool = False

    @property
    def label(self) -> str:
        """Such as ``balance 0.5, rotation, rank 32``; empty for none."""
        parts = [f"balance {self.balance:g}"] if self.balance is not None else []
        parts = [*parts, "rotation"] if self.rotate else parts
        if self.first == "rotate":
            parts.reverse()
        if self.low_rank:
            parts.append(f"rank {self.low_rank}")
        parts = [*parts, "protected tokens"] if self.protect else parts
        return ", ".join([*parts, "learnt rounding"] if self.learnt else parts)


@dataclass(frozen=True)
class Form:
    """A scheme with its conditioning: all that decides what is stored for a weight and how it runs."""

    scheme: Scheme = Scheme()
    conditioning: Conditioning = Conditioning()

    @property
    def label(self) -> str:
        """Of the scheme, with the conditioning where there is any."""
        return " + ".join(part for part in (self.scheme.label, self.conditioning.label) if part)

"""Weights of 4 bits, or of 8 that contain a usable 4: they unpack exactly to int8 codes with one scale per channel,

    weight[n, k] ~ codes[n, k] * scale[n],        codes[n, k] = nibble[n, k] * multiplier[n, k // group]

so that one int8 product serves every width (progressive quantisation, QServe, arXiv:2405.04532, sec. 4). A nibble is
-8..7 and a multiplier -15..15: its sign puts the extra level -8 where the largest magnitude of the group lies. Without
groups the codes are the nibbles, and it is the scale that may be negative. `kernels.fit_int4` makes such weights.

Two nibbles share a byte, stored as nibble + 8: the low half is column j, the high half column j + ceil(K / 2). Halves
instead of neighbours: unpacking them never shuffles, neither on the CPU nor in the registers of a GPU.

A nested weight has a second plane of nibbles, codes8 = nibble * multiplier + low. Both planes give 8-bit codes to the
bit, the first alone is an `Int4Weight`, so a plan that changes the bit-width over the steps keeps one copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# A group is a whole number of these columns, so that a tile of a kernel meets few multipliers.
GROUP_STEP = 32


@dataclass(frozen=True, eq=False)
class Int4Weight:
    """A weight [N, K] in 4 bits.

    Attributes:
        nibbles: uint8 [N, ceil(K / 2)].
        multiplier: int8 [N, ceil(K / group)], 1..15 in magnitude (16 in the high plane of a nested weight); None per
            channel.
        scale: float32 [N]; negative in channels of a weight without groups whose largest magnitude is positive, NaN in
            channels that held NaN or infinity.
        columns: K, which the bytes do not tell where it is odd.
        group: columns that share a multiplier; None per channel.
    """

    nibbles: Tensor
    multiplier: Tensor | None
    scale: Tensor
    columns: int
    group: int | None

    def __post_init__(self) -> None:
        N = self.scale.shape[0]
        fits = self.nibbles.shape == (N, half(self.columns)) and self.nibbles.dtype == torch.uint8
        if self.group is None:
            fits &= self.multiplier is None
        else:
            G = -(-self.columns // self.group)
            fits &= self.multiplier is not None and self.multiplier.shape == (N, G)
        if not fits or self.scale.dtype != torch.float32:
            got = {name: (t.dtype, tuple(t.shape)) for name, t in self.tensors().items()}
            raise ValueError(
                "expected nibbles uint8 [N, ceil(K / 2)], multiplier int8 [N, ceil(K / group)] (None without groups) "
                f"and scale float32 [N] for K = {self.columns} and group {self.group}, got {got}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) = (out_features, in_features)."""
        return self.scale.shape[0], self.columns

    @property
    def nbytes(self) -> int:
        """Bytes held, multipliers and scales included."""
        return sum(t.nbytes for t in self.tensors().values())

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.nibbles.device

    def tensors(self) -> dict[str, Tensor]:
        """The plain tensors, by field, as a file holds them."""
        named = {"nibbles": self.nibbles, "multiplier": self.multiplier, "scale": self.scale}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def codes(self) -> Tensor:
        """int8 [N, K]."""
        return unpack(self.nibbles, self.multiplier, self.columns, self.group)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """codes * scale, [N, K] in ``dtype``."""
        return (self.codes() * self.scale[:, None]).to(dtype)

    def to(self, device: torch.device | str) -> Int4Weight:
        """The same on ``device``."""
        return int4_from({name: tensor.to(device) for name, tensor in self.tensors().items()}, self.columns, self.group)


@dataclass(frozen=True, eq=False)
class NestedWeight:
    """A weight [N, K] in 8 bits, whose high plane is a 4-bit weight of its own.

    Attributes:
        high: the 4-bit weight, with groups; its scale is fitted to it.
        low: uint8 [N, ceil(K / 2)]: what the 4-bit codes lack of the 8-bit ones, -8..7, packed like nibbles.
        scale: float32 [N], of the 8-bit codes.
    """

    high: Int4Weight
    low: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        if self.low.shape != self.high.nibbles.shape or self.low.dtype != torch.uint8 or self.high.group is None:
            got = f"{self.low.dtype} {tuple(self.low.shape)} for groups of {self.high.group}"
            raise ValueError(
                f"expected low uint8 {tuple(self.high.nibbles.shape)} beside a weight in groups, got {got}"
            )
        if self.scale.shape != self.high.scale.shape or self.scale.dtype != torch.float32:
            got = f"{self.scale.dtype} {tuple(self.scale.shape)}"
            raise ValueError(f"expected scale float32 {tuple(self.high.scale.shape)}, got {got}")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) = (out_features, in_features)."""
        return self.high.shape

    @property
    def nbytes(self) -> int:
        """Bytes held, both planes included."""
        return self.high.nbytes + self.low.nbytes + self.scale.nbytes

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.low.device

    def tensors(self) -> dict[str, Tensor]:
        """The plain tensors, by field, as a file holds them; those of the high plane begin with ``high_``."""
        return {"low": self.low, "scale": self.scale} | {f"high_{n}": t for n, t in self.high.tensors().items()}

    def codes(self) -> Tensor:
        """The 8-bit codes, int8 [N, K]."""
        return unpack(self.high.nibbles, self.high.multiplier, self.high.columns, self.high.group, self.low)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """codes * scale, [N, K] in ``dtype``."""
        return (self.codes() * self.scale[:, None]).to(dtype)

    def to(self, device: torch.device | str) -> NestedWeight:
        """The same on ``device``."""
        return NestedWeight(self.high.to(device), self.low.to(device), self.scale.to(device))


def int4_from(tensors: Mapping[str, Tensor], columns: int, group: int | None) -> Int4Weight:
    """The inverse of `Int4Weight.tensors`. Raises ``ValueError`` where the tensors do not go together."""
    return Int4Weight(tensors["nibbles"], tensors.get("multiplier"), tensors["scale"], columns, group)


def nested_from(tensors: Mapping[str, Tensor], columns: int, group: int | None) -> NestedWeight:
    """The inverse of `NestedWeight.tensors`. Raises ``ValueError`` where the tensors do not go together."""
    high = {name.removeprefix("high_"): tensor for name, tensor in tensors.items() if name.startswith("high_")}
    return NestedWeight(int4_from(high, columns, group), tensors["low"], tensors["scale"])


def half(columns: int) -> int:
    """Bytes of a row, and the distance between the columns that share a byte."""
    return (columns + 1) // 2


def pack_nibbles(values: Tensor) -> Tensor:
    """Integers -8..7, [N, K] of any dtype -> uint8 [N, ceil(K / 2)]; where K is odd the last column shares with 0."""
    stored = (values + 8).to(torch.uint8)
    first, second = stored[:, : half(stored.shape[1])], stored[:, half(stored.shape[1]) :]
    packed = first + 0x80  # 0 in the high half
    packed[:, : second.shape[1]] = first[:, : second.shape[1]] | (second << 4)
    return packed


def unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    """uint8 [N, ceil(K / 2)] -> int8 [N, K] in -8..7."""
    values = packed.new_empty((packed.shape[0], columns))
    middle = half(columns)
    torch.bitwise_and(packed, 15, out=values[:, :middle])
    torch.bitwise_right_shift(packed[:, : columns - middle], 4, out=values[:, middle:])
    return values.view(torch.int8).sub_(8)


def unpack(
    nibbles: Tensor, multiplier: Tensor | None, columns: int, group: int | None, low: Tensor | None = None
) -> Tensor:
    """The int8 codes [N, K] of the rows given: nibbles and multiplier as in `Int4Weight`, low as in `NestedWeight`."""
    codes = unpack_nibbles(nibbles, columns)
    if multiplier is not None and group is not None:
        whole = columns // group
        codes[:, : whole * group].unflatten(1, (whole, group)).mul_(multiplier[:, :whole, None])
        codes[:, whole * group :].mul_(multiplier[:, whole:])
    return codes if low is None else codes.add_(unpack_nibbles(low, columns))

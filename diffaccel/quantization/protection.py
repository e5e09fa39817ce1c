"""Constant outlying tokens of the text, computed once in full precision (BOS-aware quantization of MixDQ, 2405.17873).

CLIP's first token is the same for every prompt and some 80 times larger than the others. What a projection of
cross-attention makes of it is therefore a constant, which need not be rounded. Which tokens are so is measured.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

LEADING = 4
"""Tokens at the beginning of the text that are looked at."""
# A text encoder rounds differently at another batch size; beyond that, a token is not the one that was measured.
_TOLERANCE = 1e-2
# A token is protected if its largest value is this many times that of the median token.
_OUTLYING = 4.0


def protect_rows(y: Tensor, x: Tensor, rows: Tensor, outputs: Tensor) -> Tensor:
    """``y`` with the leading tokens put in whose input is what was measured; another text encoder's stay as they are.

    Args:
        y: [batch, tokens, N], computed from ``x`` [batch, tokens, K]. With other dimensions it is left as it is.
        rows: [P, K], the constant tokens. outputs: [P, N], what the layer makes of them.
    """
    if x.ndim != 3:
        return y
    P = min(rows.shape[0], x.shape[1])
    rows, outputs = rows[:P].to(x.dtype), outputs[:P].to(y.dtype)
    return torch.cat([outputs.where(_near(x[:, :P], rows), y[:, :P]), y[:, P:]], 1)


class ConstantRows:
    """Finds the leading tokens that are the same in every text and outlie the others."""

    def __init__(self) -> None:
        self._rows: Tensor | None = None  # [P, K], of the first text
        self._constant: Tensor | None = None  # bool [P]
        self._varies = False  # whether any two texts differed
        self._first: Tensor | None = None  # [tokens, K], of the first text
        self._ratio: Tensor | None = None  # [P], the smallest seen
        self._looking = True

    def begin(self) -> None:
        """A new run: its text is looked at once."""
        self._looking = True

    def see(self, x: Tensor) -> None:
        """``x`` [batch, tokens, K], what a projection of the text gets; other shapes tell nothing."""
        if x.ndim != 3 or x.shape[1] < 2 or not self._looking:
            return
        self._looking = False
        x = x.float()
        P = min(LEADING, x.shape[1] - 1)
        sizes = x.abs().amax(-1)  # [batch, tokens]
        ratio = (sizes[:, :P] / sizes.median(1, keepdim=True).values.clamp(min=1e-30)).amin(0)
        first = x[0] if self._first is None else self._first
        varies = x.shape[1] != len(first) or not bool(_near(x, first).all())
        self._merge(x[0], first[:P].clone(), _near(x[:, :P], first[:P]).all(0).squeeze(-1), varies, ratio)

    def found(self) -> Tensor | None:
        """The rows to protect, [P, K]: up to the last one that is constant and outlying, as long as all are constant.

        None where there are none, or where every text was the same, which would make all rows constant.
        """
        if self._rows is None or self._constant is None or self._ratio is None or not self._varies:
            return None
        protected = 0
        for count, (constant, ratio) in enumerate(zip(self._constant.tolist(), self._ratio.tolist(), strict=True), 1):
            if not constant:
                break
            protected = count if ratio >= _OUTLYING else protected
        return self._rows[:protected] if protected else None

    def state(self) -> dict[str, Tensor]:
        """For `merge`."""
        if self._rows is None or self._constant is None or self._ratio is None or self._first is None:
            return {}
        return {
            "rows": self._rows.cpu(),
            "constant_rows": self._constant.cpu(),
            "ratio": self._ratio.cpu(),
            "varies": torch.tensor(self._varies),
            "first": self._first.cpu(),
        }

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Take in what another one saw."""
        if "first" not in state:
            return
        first = state["first"]
        varies = bool(state["varies"])
        constant = state["constant_rows"].bool()
        if self._first is not None:
            mine = self._first.to(first)
            varies |= mine.shape != first.shape or not bool(_near(mine, first).all())
            P = min(len(constant), len(mine))
            constant = constant[:P] & _near(mine[:P], first[:P]).squeeze(-1)
        self._merge(first, state["rows"], constant, varies, state["ratio"])

    def _merge(self, first: Tensor, rows: Tensor, constant: Tensor, varies: bool, ratio: Tensor) -> None:
        if self._rows is None or self._constant is None or self._ratio is None:
            self._first, self._rows, self._constant, self._ratio = first.clone(), rows, constant, ratio
        else:
            P = min(len(self._rows), len(constant))
            self._rows = self._rows[:P]
            self._constant = self._constant[:P] & constant[:P].to(self._constant.device)
            self._ratio = torch.minimum(self._ratio[:P], ratio[:P].to(self._ratio))
        self._varies |= varies


def _near(x: Tensor, rows: Tensor) -> Tensor:
    """Whether each row of ``x`` [..., P, K] is that of ``rows`` [P, K]; [..., P, 1]."""
    if x.shape[-2] != rows.shape[-2]:
        return torch.zeros(*x.shape[:-1], 1, dtype=torch.bool, device=x.device)
    return (x - rows).abs().amax(-1, keepdim=True) <= _TOLERANCE * rows.abs().amax(-1, keepdim=True)

"""How the streams of tokens run through a denoiser's blocks, learnt from one computed call.

A block's output is followed by identity: the next block of the same list receives the very tensor as one of its
arguments. No names of arguments and no list of classes are needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from diffaccel.latents import skeleton

Flow = Mapping[str, str]
"""Where in a block's output a stream of tokens lies (``"[1]"``) -> the argument by which the next block receives it."""


def streams_of(output: Any) -> dict[str, Tensor]:
    """The floating tensors of a block's output by where they lie in it; a last block may leave some out."""
    leaves, _ = pytree.tree_flatten_with_path(output)
    return {pytree.keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()}


@dataclass(frozen=True)
class Span:
    """Consecutive blocks of one list that are skipped together: their first and last position, and their streams."""

    first: int
    last: int
    flow: Flow


@dataclass(frozen=True)
class StackLayout:
    """What a call looks like.

    Attributes:
        order: indices of the blocks as they run.
        spans: what can be skipped.
        templates: by block index, the structure of its output without values.
        front_begin: position at which the list of the last front block begins.
        signal: what the front adds is seen in this stream, image tokens: where it lies in outputs, and its argument.
    """

    order: tuple[int, ...]
    spans: tuple[Span, ...]
    templates: Mapping[int, Any]
    front_begin: int
    signal: tuple[str, str]

    def span_at(self, position: int) -> Span | None:
        """The span in which the block at ``position`` lies."""
        return next((span for span in self.spans if span.first <= position <= span.last), None)


class StackObserver:
    """Watches one call. It holds one block's outputs at a time.

    Args:
        names: dotted names of the blocks; those that differ in the last part only belong to one list.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._lists = [name.rpartition(".")[0] for name in names]
        self._order: list[int] = []
        self._templates: dict[int, Any] = {}
        self._flows: dict[int, Flow] = {}  # by the block that passes on
        self._shaped: dict[int, Flow] = {}  # by shape alone, where no other argument has it
        self._last: dict[str, Tensor] = {}

    def saw(self, index: int, arguments: Mapping[str, Any], output: Any) -> Any:
        """Take in a block's call; returns its output."""
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        outputs = streams_of(output)
        if self._order and self._lists[self._order[-1]] == self._lists[index]:
            found = {key: n for key, v in self._last.items() for n, x in tensors.items() if x is v}
            if found and len(found) == len(self._last):
                self._flows[self._order[-1]] = found
        alike = {k: [n for n, x in tensors.items() if x.shape == v.shape] for k, v in outputs.items()}
        if alike and all(len(names) == 1 for names in alike.values()):
            self._shaped[index] = {key: names[0] for key, names in alike.items()}
        self._order.append(index)
        self._templates[index] = skeleton(output)
        self._last = outputs
        return output

    def layout(self, front: int, back: int) -> StackLayout | str:
        """What can be skipped when the first ``front`` and the last ``back`` blocks always run, or why nothing can."""
        self._last = {}
        order = self._order
        if len(set(order)) != len(order):
            return "a block runs more than once in a call"
        flows: dict[int, Flow | None] = {}  # by position
        spans = []
        for _, group in groupby(range(len(order)), key=lambda position: self._lists[order[position]]):
            positions = list(group)
            flow = self._flow_of([order[p] for p in positions])
            flows |= dict.fromkeys(positions, flow)
            cached = [p for p in positions if front <= p < len(order) - back]
            if cached and flow is not None:
                spans.append(Span(cached[0], cached[-1], flow))
        if not spans:
            return f"none of its {len(order)} blocks passes on what it gets in a way that can be followed"
        begin = max(front - 1, 0)
        while begin and self._lists[order[begin - 1]] == self._lists[order[begin]]:
            begin -= 1
        flow = flows[begin]
        if front and flow is None:
            return "what its first blocks add cannot be followed"
        streams = list((flow or spans[0].flow).items())
        main = next((stream for stream in streams if stream[1] == "hidden_states"), streams[0])
        return StackLayout(tuple(order), tuple(spans), self._templates, begin, main)

    def _flow_of(self, blocks: Sequence[int]) -> Flow | None:
        """The streams of a list, None where its blocks do not all pass them on alike."""
        if len(blocks) == 1:
            return self._shaped.get(blocks[0])
        first, *others = (self._flows.get(before) for before in blocks[:-1])
        return first if all(flow == first for flow in others) else None

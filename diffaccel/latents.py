"""What goes into a denoiser and comes out of it, as flat lists of tensors, found by structure.

Outputs are tensors, tuples, lists or diffusers' output classes (which are pytree nodes); latents are one tensor, a list
of them, or several arguments (video beside audio).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_LATENTS = ("hidden_states", "sample", "x", "latents")
_CONDITIONS = ("encoder", "text", "prompt", "ids", "mask", "emb", "cond", "time", "rope", "image", "residual", "pooled")


def output_tensors(output: Any) -> list[Tensor]:
    """The floating tensors of a forward's result, in order."""
    return [leaf for leaf in pytree.tree_leaves(output) if _is_data(leaf)]


def output_like(template: Any, tensors: list[Tensor]) -> Any:
    """The structure of ``template`` with its floating tensors replaced, in order."""
    replacements = iter(tensors)
    return pytree.tree_map(lambda leaf: next(replacements) if _is_data(leaf) else leaf, template)


def skeleton(output: Any) -> Any:
    """``output`` with empty tensors in place of the floating ones: what `output_like` needs, without their memory."""
    return pytree.tree_map(lambda leaf: leaf.new_empty(0) if _is_data(leaf) else leaf, output)


def latent_tensors(arguments: Mapping[str, Any]) -> list[Tensor]:
    """The floating tensors that carry latents, those under the usual names first; text, ids and the like never."""
    named = [n for n in _LATENTS if n in arguments]
    rest = [n for n in arguments if n not in named and not any(word in n for word in _CONDITIONS)]
    usual = [leaf for n in named for leaf in _leaves(arguments[n]) if _is_data(leaf) and leaf.ndim >= 2]
    return usual + [leaf for n in rest for leaf in _leaves(arguments[n]) if _is_data(leaf) and leaf.ndim >= 3]


def partners(outputs: list[Tensor], inputs: list[Tensor]) -> list[int | None]:
    """For each output the index of the input it belongs to.

    That is the first unused one of its shape, else the first that differs from it in one dimension other than the batch
    (learned variances, latents with conditioning channels behind), else None.
    """
    free = dict(enumerate(inputs))
    found: list[int | None] = []
    for output in outputs:
        same = (i for i, x in free.items() if x.shape == output.shape)
        close = (i for i, x in free.items() if differing_dimension(x, output) is not None)
        index = next(same, None)
        index = next(close, None) if index is None else index
        free.pop(index, None)  # type: ignore[arg-type]
        found.append(index)
    return found


def differing_dimension(x: Tensor, v: Tensor) -> int | None:
    """The one dimension, not the first, in which the shapes differ; None where none or several do."""
    if x.ndim != v.ndim:
        return None
    differing = [d for d in range(x.ndim) if x.shape[d] != v.shape[d]]
    return differing[0] if len(differing) == 1 and differing[0] > 0 else None


def add_leading(v: Tensor, x: Tensor, sign: int) -> Tensor:
    """``v + sign * x`` in float32, on the leading part that both have where their shapes differ in one dimension."""
    result = v.to(torch.float32, copy=True)
    if x.shape == v.shape:
        return result.add_(x, alpha=sign)
    d = differing_dimension(x, v)
    assert d is not None
    width = min(x.shape[d], v.shape[d])
    result.narrow(d, 0, width).add_(x.narrow(d, 0, width), alpha=sign)
    return result


def alike(new: list[Tensor], old: list[Tensor]) -> bool:
    """Whether two lists hold tensors of the same shapes, dtypes and devices."""
    return len(new) == len(old) and all(
        a.shape == b.shape and a.dtype == b.dtype and a.device == b.device for a, b in zip(new, old, strict=True)
    )


def _leaves(value: Any) -> list[Any]:
    return pytree.tree_leaves(value) if isinstance(value, Tensor | list | tuple) else []


def _is_data(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()

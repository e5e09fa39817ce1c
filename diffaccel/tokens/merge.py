"""Merging of keys and values: which go together, and their means. Nothing here is read on the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """Which keys are merged into which.

    Attributes:
        kept: [B, K], places of the keys that are left, as they are or to take others in.
        sources: [B, R], places of the keys that are merged away. targets: [B, R], where in ``kept`` each goes.
    """

    kept: Tensor
    sources: Tensor
    targets: Tensor


def neighbours_in_space(keys: Tensor, ratio: float, window: int) -> Groups:
    """Each key's most similar destination in its window; the most similar pairs are merged (arXiv:2303.17604, sec. 3).

    Destinations are every second key, with a ratio above one half every fourth.

    Args:
        keys: [B, N, C], N at least 4.
    """
    batch, n, _ = keys.shape
    stride = 2 if ratio <= 0.5 else 4
    window = min(window, n - n % stride)
    windows = n // window  # keys behind the last whole window stay as they are
    place = torch.arange(windows * window, device=keys.device).view(windows, window // stride, stride)
    destinations = place[:, :, 0]  # [W, D]
    sources = place[:, :, 1:].flatten(1)  # [W, S]
    unit = torch.nn.functional.normalize(keys.float(), dim=-1)
    alike = unit[:, sources] @ unit[:, destinations].transpose(-1, -2)  # [B, W, S, D]
    best, index = alike.max(-1)
    into = destinations.expand(batch, -1, -1).gather(2, index)
    return _most_alike(best.flatten(1), sources.flatten().expand(batch, -1), into.flatten(1), n, ratio)


def neighbours_in_time(keys: Tensor, ratio: float, frames: int) -> Groups:
    """Of every second frame, the keys that are most like those at the same place of the frame before.

    Args:
        keys: [B, N, C] with N = frames * tokens of a frame; at least two frames.
    """
    batch, n, _ = keys.shape
    per_frame = n // frames
    pairs = frames // 2
    place = torch.arange(pairs * 2 * per_frame, device=keys.device).view(pairs, 2, per_frame)
    into, sources = place[:, 0].flatten(), place[:, 1].flatten()
    unit = torch.nn.functional.normalize(keys.float(), dim=-1)
    alike = (unit[:, sources] * unit[:, into]).sum(-1)
    return _most_alike(alike, sources.expand(batch, -1), into.expand(batch, -1), n, ratio)


def _most_alike(alike: Tensor, sources: Tensor, into: Tensor, n: int, ratio: float) -> Groups:
    """The groups that come of merging the most similar sources [B, S] into keys [B, S]."""
    batch, count = alike.shape
    merged = min(int(n * ratio), count)
    chosen = alike.topk(merged, dim=1).indices
    sources, into = sources.gather(1, chosen), into.gather(1, chosen)
    left = torch.ones(batch, n, dtype=torch.bool, device=alike.device).scatter(1, sources, False)
    # Stable: the keys that are left, in order, before those that go.
    kept = left.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : n - merged]
    rank = left.cumsum(1) - 1
    return Groups(kept, sources, rank.gather(1, into))


def merge(keys: Tensor, values: Tensor, groups: Groups, begin: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means of the merged keys and values, and the logarithm of how many each stands for.

    Args:
        keys, values: [B, H, N, D]. groups: of the keys from ``begin`` on; those before and behind stay.

    Returns:
        [B, H, M, D] twice, [B, 1, 1, M]. Order: what was before, the groups, what was behind.
    """
    batch = keys.shape[0]
    span = groups.kept.shape[1] + groups.sources.shape[1]
    end = begin + span
    sizes = torch.ones(batch, groups.kept.shape[1], dtype=torch.float32, device=keys.device)
    sizes = sizes.scatter_add(1, groups.targets, torch.ones_like(groups.targets, dtype=torch.float32))
    results = []
    for x in (keys, values):
        inner = x[:, :, begin:end]
        kept = _rows(inner, groups.kept).float()
        index = groups.targets[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        total = kept.scatter_add(2, index, _rows(inner, groups.sources).float())
        mean = (total / sizes[:, None, :, None]).to(x.dtype)
        results.append(torch.cat([x[:, :, :begin], mean, x[:, :, end:]], 2))
    logs = torch.zeros(batch, 1, 1, results[0].shape[2], dtype=torch.float32, device=keys.device)
    logs[:, 0, 0, begin : begin + sizes.shape[1]] = sizes.log()
    return results[0], results[1], logs.to(keys.dtype)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows [B, H, K, D] of ``x`` [B, H, N, D] at the places [B, K]."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def features(keys: Tensor) -> Tensor:
    """What keys [B, H, N, D] are compared by: all heads together, [B, N, H * D]."""
    return keys.transpose(1, 2).flatten(2)

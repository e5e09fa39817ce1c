"""Convolutions of a UNet that read a skip connection beside what comes from below, and where the one ends.

What comes through the skip has another range than the rest, so that one scale for both is coarse for one of them:
MixDQ (arXiv:2405.17873), after Q-Diffusion (arXiv:2302.04304), rounds the two parts of input and weight apart. The
convolution is then a sum of two, each in int8, over as many products in all.
"""

from __future__ import annotations

from torch import nn


def skip_boundaries(network: nn.Module) -> dict[str, int]:
    """Names of convolutions whose input is concatenated -> channels before the skip's.

    By structure: residual blocks, modules with two convolutions of their own one after the other, pass on as many
    channels as the second gives; where the next one's first reads more, and more than that block gives, the rest came
    through a skip. A boundary elsewhere would cost accuracy, but change nothing else: the sum of the two parts is the
    convolution.
    """
    found: dict[str, int] = {}
    passed: int | None = None
    for name, module in network.named_modules():
        convolutions = {n: c for n, c in module.named_children() if isinstance(c, nn.Conv2d)}
        if not name or len(convolutions) < 2:  # the network's own are the first and the last
            continue
        first, second = list(convolutions.values())[:2]
        if second.in_channels != first.out_channels or (1, 1) in (first.kernel_size, second.kernel_size):
            continue  # such as the projections around a transformer
        if passed is not None and first.in_channels > max(passed, second.out_channels):
            reading = [n for n, c in convolutions.items() if c.in_channels == first.in_channels and c.groups == 1]
            found |= {f"{name}.{n}": passed for n in reading}
        passed = second.out_channels
    return found

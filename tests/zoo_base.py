"""What a specimen of the model zoo is, and the seeded tensors its inputs are made of."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor, nn


class Grid(NamedTuple):
    """The token grid of one call. Image models use one frame; latents are as many patches."""

    batch: int
    frames: int
    height: int
    width: int


IMAGE_SIZES = {"even": (1, 8, 8), "odd": (1, 9, 7)}
VIDEO_SIZES = {"even": (4, 4, 6), "odd": (3, 5, 7)}


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Standard normals that depend on the shape and the seed only, never on the global generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def initialise(model: nn.Module, seed: int) -> None:
    """Give every parameter a value that makes it matter.

    Diffusers starts many gates and last projections at zero, and some tables in uninitialised memory: such a model returns
    zeros or changes from run to run. Matrices become normals of variance 1 / fan-in, gains stay near one, the rest is small.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fresh = torch.randn(parameter.shape, generator=generator)
            gain = parameter.ndim == 1 and name.endswith(("weight", "gamma", "alpha", "scale"))
            if gain:
                parameter.copy_(1 + 0.1 * fresh)
            elif parameter.ndim < 2:
                parameter.copy_(0.1 * fresh)
            else:
                parameter.copy_(fresh / math.sqrt(parameter[0].numel()))


def tensors_of(value: Any) -> list[Tensor]:
    """Every floating tensor in a forward's result, in order; the result may be a tensor, a list, a tuple or a ModelOutput."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = value.values()
    if isinstance(value, list | tuple) or hasattr(value, "__iter__"):
        return [tensor for item in value for tensor in tensors_of(item)]
    return []


@dataclass(frozen=True)
class Specimen:
    """A denoiser class in miniature.

    feed: the keyword arguments of one forward for a token grid, without the timestep.
    latents: the arguments that the scheduler changes from step to step.
    time, time_max: the argument that carries the timestep, and its value at the noisiest step (1000 or 1).
    time_rises: the model counts from 0 (noise) to time_max (data) instead of down.
    text: where text tokens stand in the joint sequence, ``before`` or ``after`` the image tokens; ``cross``: only read by
        cross-attention; ``none``: the model has no text tokens; ``apart``: other (see the comment of the entry).
    video: the grid has several frames.
    square: the model takes square grids only.
    """

    name: str
    model: str | Callable[..., nn.Module]
    config: Mapping[str, Any]
    feed: Callable[[Grid], dict[str, Any]]
    text: str
    latents: tuple[str, ...] = ("hidden_states",)
    time: str = "timestep"
    time_max: float = 1000.0
    time_rises: bool = False
    time_shape: Callable[[Tensor, Grid], Tensor] | None = None
    video: bool = False
    square: bool = False

    def build(self) -> nn.Module:
        """A new instance, float32, in eval mode, with the same weights each time."""
        cls = getattr(diffusers, self.model) if isinstance(self.model, str) else self.model
        # Some constructors draw random numbers for buffers too, hence the seed before and the fork around it.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = cls(**self.config)
        initialise(model, seed=1)
        return model.float().eval().requires_grad_(False)

    def grid(self, batch: int = 1, size: str = "even") -> Grid:
        """The token grid behind ``inputs(batch, size)``; ``size`` is ``even`` or ``odd``."""
        frames, height, width = (VIDEO_SIZES if self.video else IMAGE_SIZES)[size]
        return Grid(batch, frames, height, height if self.square else width)

    def inputs(self, batch: int = 1, size: str = "even", progress: float = 0.3) -> dict[str, Any]:
        """Keyword arguments of a forward; ``progress`` in [0, 1] is the share of the schedule already done."""
        grid = self.grid(batch, size)
        kwargs = self.feed(grid)
        level = 1 - progress
        kwargs |= {name: _noised(kwargs[name], level, seed=97) for name in self.latents}
        value = self.time_max * (progress if self.time_rises else level)
        timestep = torch.full((batch,), value if self.time_max == 1 else float(round(value)))
        kwargs[self.time] = self.time_shape(timestep, grid) if self.time_shape else timestep
        return kwargs

    def outputs(self, output: Any) -> list[Tensor]:
        """The tensors of a forward's result."""
        return tensors_of(output)


def _noised(data: Any, level: float, seed: int) -> Any:
    """``data`` (a tensor or a list of them) with noise mixed in on the straight path of flow matching."""
    if isinstance(data, list):
        return [_noised(item, level, seed + index) for index, item in enumerate(data)]
    if not data.is_floating_point():
        return data
    return (1 - level) * data + level * noise(*data.shape, seed=seed)


def trajectory(specimen: Specimen, steps: int = 8, batch: int = 1, size: str = "even") -> Iterator[dict[str, Any]]:
    """The inputs of successive denoising steps: same conditioning, noise going down, latents moving on a straight path."""
    for step in range(steps):
        yield specimen.inputs(batch, size, progress=step / steps)

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


TEXT = 12
IMAGE_SIZES = {"even": (1, 8, 8), "odd": (1, 9, 7)}
VIDEO_SIZES = {"even": (4, 4, 6), "odd": (3, 5, 7)}


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Standard normals that depend on the shape and the seed only, never on the global generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(grid: Grid, width: int = 32, length: int = TEXT, seed: int = 1) -> Tensor:
    """Embeddings of a prompt, [B, length, width]."""
    return noise(grid.batch, length, width, seed=seed)


def text_mask(grid: Grid, length: int = TEXT, dtype: torch.dtype = torch.bool) -> Tensor:
    """[B, length]: every token of the first sample counts, the last three of the others are padding."""
    mask = torch.ones(grid.batch, length, dtype=dtype)
    mask[1:, -3:] = 0
    return mask


def pooled(grid: Grid, width: int = 24) -> Tensor:
    """One vector per prompt, [B, width]."""
    return noise(grid.batch, width, seed=2)


def tokens(grid: Grid, channels: int = 16) -> Tensor:
    """Latents already packed into tokens, [B, frames * height * width, channels]."""
    return noise(grid.batch, grid.frames * grid.height * grid.width, channels)


def planes(grid: Grid, channels: int = 4, patch: int = 2) -> Tensor:
    """Image latents, [B, channels, height * patch, width * patch]."""
    return noise(grid.batch, channels, grid.height * patch, grid.width * patch)


def volume(grid: Grid, channels: int = 4, patch: int = 2) -> Tensor:
    """Video latents, [B, channels, frames, height * patch, width * patch]."""
    return noise(grid.batch, channels, grid.frames, grid.height * patch, grid.width * patch)


def positions(*lengths: int) -> Tensor:
    """The coordinates of the points of a grid, [product of lengths, axes], the last axis fastest."""
    return torch.cartesian_prod(*(torch.arange(length) for length in lengths)).float()


def initialise(model: nn.Module, seed: int) -> None:
    """Give every parameter a value that makes it matter.

    Diffusers starts many gates and last projections at zero, and some tables in uninitialised memory: such a model
    returns zeros or changes from run to run. Matrices become normals of variance 1 / fan-in, gains stay near one, all
    other vectors are small.
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
    """Every floating tensor in a forward's result, in order: a tensor, a list, a tuple or a ModelOutput."""
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
    time, time_max: the argument that carries the timestep (empty if there is none), and its largest value (1000 or 1),
        which is the noisiest step.
    time_rises: the model counts from 0 (noise) to time_max (data) instead of down.
    time_shape: turns the timesteps [B] into what the model takes, where that is not [B].
    text: where text tokens stand in the joint sequence, ``before`` or ``after`` the image tokens; ``cross``: text is
        read by cross-attention only; ``none``: no text tokens; ``keys-before``, ``keys-after``: text joins
        the keys and values of self-attention, but has no queries.
    video: the grid has several frames.
    odd: the grid of size ``odd``, where the model cannot take the usual one.
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
    odd: tuple[int, int, int] | None = None

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
        if size == "odd" and self.odd:
            return Grid(batch, *self.odd)
        return Grid(batch, *(VIDEO_SIZES if self.video else IMAGE_SIZES)[size])

    def inputs(self, batch: int = 1, size: str = "even", progress: float = 0.3) -> dict[str, Any]:
        """Keyword arguments of a forward; ``progress`` in [0, 1] is the share of the schedule already done."""
        grid = self.grid(batch, size)
        kwargs = self.feed(grid)
        level = 1 - progress
        kwargs |= {name: _noised(kwargs[name], level, seed=97) for name in self.latents}
        value = self.time_max * (progress if self.time_rises else level)
        if self.time:
            timestep = torch.full((batch,), value if self.time_max == 1 else float(round(value)))
            kwargs[self.time] = self.time_shape(timestep, grid) if self.time_shape else timestep
        return kwargs

    def outputs(self, output: Any) -> list[Tensor]:
        """The tensors of a forward's result."""
        return tensors_of(output)


def _noised(data: Any, level: float, seed: int) -> Any:
    """``data`` (a tensor or a list of them) with noise mixed in on the straight path of flow matching.

    Token ids have no path: the share ``level`` of them becomes the id after the largest, which stands for a mask.
    """
    if isinstance(data, list):
        return [_noised(item, level, seed + index) for index, item in enumerate(data)]
    if not data.is_floating_point():
        order = noise(*data.shape, seed=seed).flatten(1).argsort(1).argsort(1).view(data.shape)
        return torch.where(order < level * data[0].numel(), data.max() + 1, data)
    return (1 - level) * data + level * noise(*data.shape, seed=seed)


def trajectory(specimen: Specimen, steps: int = 8, batch: int = 1, size: str = "even") -> Iterator[dict[str, Any]]:
    """The inputs of successive denoising steps: same conditioning, less noise each time, latents on a straight path."""
    for step in range(steps):
        yield specimen.inputs(batch, size, progress=step / steps)

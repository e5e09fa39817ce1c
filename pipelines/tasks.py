"""What a pipeline can do, told from the signature of its call."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from diffaccel.errors import InputError

_IMAGE = ("image", "images", "init_image")


def call_parameters(pipe: Any) -> dict[str, inspect.Parameter]:
    """The named parameters of the pipeline's call."""
    parameters = inspect.signature(type(pipe).__call__).parameters.values()
    return {p.name: p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name != "self"}


def makes_video(pipe: Any) -> bool:
    """Whether the call is asked for a number of frames, or takes a video."""
    return any(n in call_parameters(pipe) for n in ("num_frames", "frames", "video_length", "video"))


def image_parameter(pipe: Any) -> str | None:
    """Name of the parameter that takes a start image, or None."""
    return next((n for n in _IMAGE if n in call_parameters(pipe)), None)


def needs_image(pipe: Any) -> bool:
    """Whether nothing can be made without an image: it has no default, or a strength says how much of it to keep."""
    name = image_parameter(pipe)
    if name is None:
        return False
    parameters = call_parameters(pipe)
    return parameters[name].default is inspect.Parameter.empty or "strength" in parameters


def takes_prompt(pipe: Any) -> bool:
    """Whether the call takes a text."""
    return "prompt" in call_parameters(pipe)


def describe(pipe: Any) -> str:
    """For error messages: ``StableDiffusionPipeline does text-to-image``."""
    target = "video" if makes_video(pipe) else "image"
    sources = [] if needs_image(pipe) else ["text"]
    sources += ["image"] if image_parameter(pipe) else []
    return f"{type(pipe).__name__} does {' and '.join(f'{source}-to-{target}' for source in sources)}"


def check_arguments(pipe: Any, arguments: Iterable[str]) -> None:
    """Refuse arguments, by name, that the call does not take.

    Raises:
        InputError: names the argument and those the call takes.
    """
    known = call_parameters(pipe)
    for name in arguments:
        if name not in known:
            raise InputError(f"{type(pipe).__name__} takes no {name!r}; its call takes: {', '.join(known)}")

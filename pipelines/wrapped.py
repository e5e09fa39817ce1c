"""A loaded pipeline with its defaults and its acceleration: one way to call every pipeline."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from diffaccel.errors import DiffAccelError, InputError
from diffaccel.pipelines import tasks
from diffaccel.pipelines.media import save_image, save_video
from diffaccel.pipelines.start_image import can_start_from_image, start_image

if TYPE_CHECKING:
    from diffaccel.attach import Accelerated
    from diffaccel.plan import Plan

Prompts = str | Sequence[str]
Images = Image.Image | Sequence[Image.Image]


class Wrapped:
    """What `diffaccel.pipelines.load` returns; also takes a pipeline of your own.

    Attributes:
        pipe: the diffusers pipeline.
        accel: the acceleration, or None.
        name: what it was loaded from.
        defaults: arguments of each call unless given.
    """

    def __init__(self, pipe: Any, *, name: str = "", defaults: dict[str, Any] | None = None) -> None:
        self.pipe = pipe
        self.accel: Accelerated | None = None
        self.name = name or type(pipe).__name__
        self.defaults = dict(defaults or {})
        self._from_image: Any = None

    @property
    def makes_video(self) -> bool:
        return tasks.makes_video(self.pipe)

    def accelerate(self, plan: str | os.PathLike[str] | Plan = "balanced", *, originals: str = "cpu") -> Accelerated:
        """Put a plan on the pipeline, see `diffaccel.accelerate`."""
        from diffaccel.attach import accelerate

        self.accel = accelerate(self.pipe, plan, originals=originals)
        return self.accel

    def remove(self) -> None:
        """Take the plan off again; nothing happens without one."""
        if self.accel is not None:
            self.accel.remove()
            self.accel = None

    def generate_image(
        self,
        prompt: Prompts | None = None,
        *,
        image: Images | None = None,
        strength: float | None = None,
        negative_prompt: Prompts | None = None,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance: float | None = None,
        size: tuple[int, int] | int | None = None,
        out: str | os.PathLike[str] | None = None,
        **call: Any,
    ) -> list[Image.Image]:
        """One image per prompt.

        Args:
            prompt: a text, or one per image.
            image: start image for image-to-image; one for all prompts, or one each.
            strength: with a start image, the share of the schedule that runs, in (0, 1]; higher = further from it.
            negative_prompt: what to stay away from.
            seed: of each image, or of the first; the next ones count up. The same seed gives the same image in a batch
                and alone, up to rounding.
            steps: denoising steps.
            guidance: guidance scale.
            size: ``(width, height)`` or one side, in pixels.
            out: where to write the image; with several, ``-0``, ``-1``, ... is put before the suffix.
            call: further arguments of the pipeline's own call.

        Raises:
            InputError: something the pipeline cannot take. Nothing was generated.
        """
        if self.makes_video:
            raise InputError(f"{tasks.describe(self.pipe)}, no images; use generate_video")
        prompts = self._prompts(prompt, image, call)
        arguments = self._arguments(prompts, negative_prompt, steps, guidance, size, call)
        images = self._call(arguments, prompts, _seeds(seed, len(prompts)), image, strength).images
        for one, target in zip(images, _targets(out, len(images)), strict=True):
            if target is not None:
                save_image(one, target)
        return list(images)

    def generate_video(
        self,
        prompt: Prompts | None = None,
        *,
        image: Images | None = None,
        negative_prompt: Prompts | None = None,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance: float | None = None,
        size: tuple[int, int] | int | None = None,
        frames: int | None = None,
        fps: float = 8,
        out: str | os.PathLike[str] | None = None,
        **call: Any,
    ) -> list[list[Image.Image]]:
        """One video, a list of frames, per prompt. Arguments as in `generate_image`, and:

        Args:
            frames: number of frames; most models want 4 n + 1.
            fps: frames per second of the file.
            out: where to write it, an mp4 or gif.

        Raises:
            InputError: something the pipeline cannot take. Nothing was generated.
        """
        if not self.makes_video:
            raise InputError(f"{tasks.describe(self.pipe)}, no video; use generate_image")
        prompts = self._prompts(prompt, image, call)
        if frames is not None:
            call["num_frames"] = _whole("frames", frames)
        arguments = self._arguments(prompts, negative_prompt, steps, guidance, size, call)
        videos = [list(v) for v in self._call(arguments, prompts, _seeds(seed, len(prompts)), image, None).frames]
        for one, target in zip(videos, _targets(out, len(videos)), strict=True):
            if target is not None:
                save_video(one, target, fps)
        return videos

    # --- arguments ---

    def _prompts(self, prompt: Prompts | None, image: Images | None, call: dict[str, Any]) -> list[str]:
        """One prompt per output; empty texts where the pipeline takes none, or embeddings stand for it."""
        if prompt is None and call.get("prompt_embeds") is not None:
            return [""] * len(call["prompt_embeds"])
        if not tasks.takes_prompt(self.pipe):
            if prompt is not None:
                raise InputError(f"{tasks.describe(self.pipe)}; it takes no prompt")
            return [""] * (1 if image is None or isinstance(image, Image.Image) else len(image))
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list | tuple) or not prompts or not all(isinstance(p, str) for p in prompts):
            raise InputError(f"prompt must be a text or a non-empty list of texts, got {prompt!r}")
        return list(prompts)

    def _arguments(
        self,
        prompts: list[str],
        negative: Prompts | None,
        steps: int | None,
        guidance: float | None,
        size: tuple[int, int] | int | None,
        call: dict[str, Any],
    ) -> dict[str, Any]:
        given: dict[str, Any] = dict(call)
        if tasks.takes_prompt(self.pipe) and call.get("prompt_embeds") is None:
            given["prompt"] = prompts
        if negative is not None:
            if isinstance(negative, list | tuple) and len(negative) != len(prompts):
                raise InputError(f"{len(negative)} negative prompts for {len(prompts)} prompts")
            given["negative_prompt"] = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        if steps is not None:
            given["num_inference_steps"] = _whole("steps", steps)
        elif given.get("num_inference_steps") is not None:  # some pipelines decode the noise after 0 steps
            _whole("num_inference_steps", given["num_inference_steps"])
        if guidance is not None:
            if isinstance(guidance, bool) or not isinstance(guidance, int | float):
                raise InputError(f"guidance must be a number, got {guidance!r}")
            given["guidance_scale"] = float(guidance)
        if size is not None:
            if not isinstance(size, int) and not (isinstance(size, list | tuple) and len(size) == 2):
                raise InputError(f"size must be (width, height) or one side, got {size!r}")
            width, height = (size, size) if isinstance(size, int) else size
            given |= {"width": _whole("width", width), "height": _whole("height", height)}
        tasks.check_arguments(self.pipe, given)
        return {**self.defaults, "output_type": "pil", **given}

    # --- the call ---

    def _call(
        self,
        arguments: dict[str, Any],
        prompts: list[str],
        seeds: list[int],
        image: Images | None,
        strength: float | None,
    ) -> Any:
        if strength is not None and (isinstance(strength, bool) or not 0 < strength <= 1):
            raise InputError(f"strength must lie in (0, 1], got {strength!r}")
        if strength is not None and image is None:
            raise InputError("strength says how far to go from a start image, but no image is given")
        # On the CPU, so that a seed means the same noise on every device.
        generators = [torch.Generator("cpu").manual_seed(s) for s in seeds]
        pipe = self.pipe
        with ExitStack() as stack:
            if image is not None:
                images = _one_each(image, len(prompts))
                pipe, extra = self._with_image(
                    images, arguments, 0.6 if strength is None else strength, generators, stack
                )
                arguments = {**arguments, **extra}
            elif tasks.needs_image(pipe):
                raise InputError(f"{tasks.describe(pipe)}; give it an image")
            takes = tasks.call_parameters(pipe)
            arguments = {k: v for k, v in arguments.items() if k in takes or k in self.defaults}
            try:
                return pipe(**arguments, generator=generators if len(generators) > 1 else generators[0])
            except DiffAccelError:
                raise
            except (TypeError, ValueError) as error:  # diffusers checks its inputs with these
                raise InputError(f"{type(pipe).__name__} refuses the call: {error}") from error

    def _with_image(
        self,
        images: list[Image.Image],
        arguments: dict[str, Any],
        strength: float,
        generators: list[torch.Generator],
        stack: ExitStack,
    ) -> tuple[Any, dict[str, Any]]:
        """What to call and the arguments that carry the image: its own way, diffusers' class, or the schedule."""
        size = [arguments[n] for n in ("width", "height") if n in arguments]
        images = [i.resize((size[0], size[1]), Image.Resampling.LANCZOS) for i in images] if len(size) == 2 else images
        pipe = self.pipe if tasks.image_parameter(self.pipe) else self._image_to_image()
        if pipe is not None:
            extra: dict[str, Any] = {str(tasks.image_parameter(pipe)): images if len(images) > 1 else images[0]}
            if "strength" in tasks.call_parameters(pipe):
                extra["strength"] = strength
            return pipe, extra
        if not can_start_from_image(self.pipe):
            target = "video" if self.makes_video else "image"
            raise InputError(
                f"{tasks.describe(self.pipe)}; it cannot start from an image: load an image-to-{target} model"
            )
        pixels = self.pipe.image_processor.preprocess(images)
        steps = arguments.get("num_inference_steps") or tasks.call_parameters(self.pipe)["num_inference_steps"].default
        return self.pipe, {"latents": stack.enter_context(start_image(self.pipe, pixels, steps, strength, generators))}

    def _image_to_image(self) -> Any:
        """diffusers' image-to-image class over the same components (an acceleration stays on them), or None."""
        if self._from_image is None and not self.makes_video:
            from diffusers import AutoPipelineForImage2Image

            try:
                self._from_image = AutoPipelineForImage2Image.from_pipe(self.pipe)
            except ValueError:  # no such class
                return None
        return self._from_image


def _whole(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} must be a whole number >= 1, got {value!r}")
    return value


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise InputError(f"{len(seeds)} seeds for {count} prompts")
    for one in seeds:
        if not isinstance(one, int) or isinstance(one, bool) or not 0 <= one < 1 << 63:
            raise InputError(f"a seed must be a whole number in [0, 2**63), got {one!r}")
    return seeds


def _one_each(image: Images, count: int) -> list[Image.Image]:
    images = [image] * count if isinstance(image, Image.Image) else list(image)
    if len(images) != count or not all(isinstance(i, Image.Image) for i in images):
        raise InputError(f"image must be one PIL image, or one per prompt ({count}), got {image!r}")
    return [i.convert("RGB") for i in images]


def _targets(out: str | os.PathLike[str] | None, count: int) -> list[Path | None]:
    if out is None:
        return [None] * count
    target = Path(out)
    return [target] if count == 1 else [target.with_name(f"{target.stem}-{i}{target.suffix}") for i in range(count)]

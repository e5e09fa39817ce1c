"""CLIP models behind one interface: open_clip's of any architecture, hub tag or local folder, and transformers'.

    clip = load_clip("ViT-B-32", "openai")            # an architecture and a tag of its weights
    clip = load_clip("hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K")
    clip = load_clip("local-dir:path/to/folder")      # with open_clip_config.json, such as the bundled evaluator
    clip = load_clip((model, processor))              # transformers' CLIPModel and CLIPProcessor

Pictures go through the model's own resizing and normalisation as floats, without rounding to 8 bit; captions through
its own tokenizer, which cuts them at the model's context length.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from diffaccel.eval.metrics.features import as_rgb, inference
from diffaccel.eval.metrics.samples import as_samples

ClipSource = str | tuple[Any, Any] | Callable[[], tuple[Any, Any]]


class Clip(ABC):
    """Both towers of a CLIP model. Called with pictures it gives their features, so it is an extractor for
    `image_features` as well.

    Attributes:
        network: the module; runs in eval mode, without gradients, on the device that it is on.
    """

    network: nn.Module

    def __call__(self, pictures: Tensor) -> Tensor:
        """Pictures ``[B, C, H, W]`` in [0, 1] -> features ``[B, D]`` of any length, float32 on the CPU."""
        with inference(self.network) as device:
            return self._encode_pixels(self.prepare(pictures.to(device))).float().cpu()

    @abstractmethod
    def prepare(self, pictures: Tensor) -> Tensor:
        """Pictures ``[B, C, H, W]`` in [0, 1] -> what the image tower takes."""

    @abstractmethod
    def _encode_pixels(self, pixels: Tensor) -> Tensor: ...

    @abstractmethod
    def _encode_texts(self, texts: list[str], device: torch.device) -> Tensor: ...

    def frames(self, samples: Any, batch: int = 32) -> Tensor:
        """Embeddings of all frames, see `as_samples` -> ``[N, F, D]`` of length 1; F is 1 for images."""
        videos = as_samples(samples)
        parts = [self(part) for part in videos.flatten(0, 1).split(batch)]
        return normalize(torch.cat(parts), dim=-1).unflatten(0, videos.shape[:2])

    def texts(self, texts: Sequence[str], batch: int = 64) -> Tensor:
        """Embeddings of captions -> ``[N, D]`` of length 1."""
        with inference(self.network) as device:
            starts = range(0, len(texts), batch)
            parts = [self._encode_texts(list(texts[i : i + batch]), device).float().cpu() for i in starts]
        return normalize(torch.cat(parts), dim=-1)


class OpenClip(Clip):
    """A model of open_clip with the preprocessing and the tokenizer that belong to it."""

    def __init__(self, network: nn.Module, preprocess: Any, tokenizer: Callable[[list[str]], Tensor]) -> None:
        self.network, self.tokenizer = network, tokenizer
        *self._resize, self._normalise = preprocess.transforms  # pictures come as tensors, which its parts take as well

    def prepare(self, pictures: Tensor) -> Tensor:
        pictures = as_rgb(pictures)
        for step in self._resize:
            pictures = step(pictures)
        return self._normalise(pictures.clamp(0, 1))  # bicubic resizing overshoots; pictures of bytes are cut there too

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        return self.network.encode_image(pixels)  # type: ignore[operator]

    def _encode_texts(self, texts: list[str], device: torch.device) -> Tensor:
        return self.network.encode_text(self.tokenizer(texts).to(device))  # type: ignore[operator]


class TransformersClip(Clip):
    """A ``CLIPModel`` of transformers, or one with the same methods, with its processor."""

    def __init__(self, network: nn.Module, processor: Any) -> None:
        self.network, self.processor = network, processor

    def prepare(self, pictures: Tensor) -> Tensor:
        images = self.processor.image_processor(
            images=list(as_rgb(pictures)), do_rescale=False, return_tensors="pt", input_data_format="channels_first"
        )
        return images["pixel_values"].to(pictures.device)

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        return _pooled(self.network.get_image_features(pixel_values=pixels))  # type: ignore[operator]

    def _encode_texts(self, texts: list[str], device: torch.device) -> Tensor:
        tokens = self.processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device)
        features = self.network.get_text_features(tokens["input_ids"], tokens["attention_mask"])  # type: ignore[operator]
        return _pooled(features)


def _pooled(output: Any) -> Tensor:
    """Transformers gives the features themselves before version 5, then an output that holds them."""
    return output if isinstance(output, Tensor) else output.pooler_output


def load_clip(source: ClipSource, pretrained: str | None = None, device: str | torch.device = "cpu") -> Clip:
    """A CLIP model with its weights; models that are passed in stay on the device that they are on.

    Args:
        source: an architecture of open_clip (with ``pretrained``), ``hf-hub:...``, ``local-dir:...``, or transformers'
            (model, processor), or a function that returns these two.
        pretrained: tag or file of an architecture's weights.
        device: where a model that is loaded here runs.

    Raises:
        ImportError: open_clip is not installed.
        ValueError: no such model, no weights, or they cannot be had.
    """
    if not isinstance(source, str):
        network, processor = source() if callable(source) else source
        return TransformersClip(network, processor)
    try:
        import open_clip
    except ImportError as error:
        raise ImportError("CLIP models need open_clip: pip install open_clip_torch") from error
    if ":" not in source and pretrained is None:
        tags = open_clip.list_pretrained_tags_by_model(source)
        known = f"weights of {source!r}: {', '.join(tags)}" if tags else "see open_clip.list_pretrained()"
        raise ValueError(f"CLIP model {source!r} without pretrained weights says nothing; {known}")
    try:
        with _untouched_globals():
            network, preprocess = open_clip.create_model_from_pretrained(source, pretrained, device=device)
            tokenizer = open_clip.get_tokenizer(source)
    except Exception as error:  # open_clip raises whatever its config reader, the hub or torch raise
        raise ValueError(
            f"cannot load CLIP model {source!r} (pretrained={pretrained!r}): {error}. Without network, give a folder "
            f"that holds open_clip_config.json and open_clip_model.safetensors as 'local-dir:FOLDER'"
        ) from error
    return OpenClip(network.eval(), preprocess, tokenizer)  # open_clip gives it in training mode


@contextmanager
def _untouched_globals() -> Iterator[None]:
    """open_clip draws weights before it loads them, and its log calls configure a root logger that has no handler."""
    handler, root = logging.NullHandler(), logging.getLogger()
    root.addHandler(handler)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        root.removeHandler(handler)

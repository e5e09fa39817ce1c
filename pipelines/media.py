"""Pictures and videos in files: every file is written beside its place and moved there, so none is ever half done."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from diffaccel.errors import InputError, MissingPackageError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
VIDEO_SUFFIXES = (".mp4", ".gif")


def read_image(file: str | os.PathLike[str]) -> Image.Image:
    """An RGB image.

    Raises:
        InputError: no such file, or it holds no image.
    """
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"no image file {os.fspath(file)!r}") from None
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"{os.fspath(file)!r} cannot be read as an image: {error}") from None


def save_image(image: Image.Image, file: str | os.PathLike[str]) -> Path:
    """Write a PNG, JPEG or WebP, by the suffix.

    Raises:
        InputError: another suffix, or the file cannot be written.
    """
    target = _target(file, IMAGE_SUFFIXES)
    return _write(target, lambda partial: image.save(partial))


def save_video(frames: Sequence[Image.Image], file: str | os.PathLike[str], fps: float = 8) -> Path:
    """Write an mp4 (H.264, 4:2:0) or gif, by the suffix. ``frames`` are RGB and of one size.

    Sides that are odd lose their last line in mp4, which cannot hold them.

    Raises:
        InputError: another suffix, no frames, or the file cannot be written.
    """
    target = _target(file, VIDEO_SUFFIXES)
    if not frames:
        raise InputError(f"no frames to write to {str(target)!r}")
    if not fps > 0:
        raise InputError(f"fps must be > 0, got {fps!r}")
    if target.suffix == ".gif":
        return _write(
            target,
            lambda partial: frames[0].save(
                partial, save_all=True, append_images=list(frames[1:]), duration=round(1000 / fps), loop=0
            ),
        )
    width, height = (side // 2 * 2 for side in frames[0].size)
    arrays = [np.asarray(frame.convert("RGB"))[:height, :width] for frame in frames]
    return _write(target, lambda partial: _write_mp4(arrays, partial, fps))


def _write_mp4(arrays: list[np.ndarray], file: Path, fps: float) -> None:
    import imageio

    require_writer(file.suffix)
    # Macro blocks of 16 are only a speed hint; the default would resize the picture to a multiple of them.
    with imageio.get_writer(file, fps=fps, codec="libx264", quality=8, macro_block_size=1) as writer:
        for array in arrays:
            writer.append_data(array)


def require_writer(suffix: str) -> None:
    """See to it that files of this suffix can be written, before time is spent on what goes into them.

    Raises:
        MissingPackageError: mp4 needs imageio-ffmpeg, which brings its own ffmpeg.
    """
    if suffix.lower() == ".mp4":
        try:
            import_module("imageio_ffmpeg")
        except ImportError as error:
            raise MissingPackageError(
                f"mp4 needs imageio-ffmpeg ({error}): pip install imageio-ffmpeg, or write a .gif"
            ) from None


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder that could not be made or written to, without making it yet.

    Raises:
        InputError: names what is in the way.
    """
    place = Path(folder).absolute()
    there = next(p for p in (place, *place.parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "is a file" if not there.is_dir() else "is not writable"
        raise InputError(f"cannot write to {os.fspath(folder)!r}: {str(there)!r} {what}; choose another --out")


def _target(file: str | os.PathLike[str], suffixes: tuple[str, ...]) -> Path:
    target = Path(file)
    if target.suffix.lower() not in suffixes:
        raise InputError(f"{str(target)!r}: the name must end in {', '.join(suffixes)}")
    return target


def _write(target: Path, write: Callable[[Path], object]) -> Path:
    partial = target.with_name(f".{target.stem}.partial{target.suffix}")  # the suffix tells the writers the format
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        os.replace(partial, target)
    except OSError as error:
        raise InputError(f"cannot write {str(target)!r}: {error.strerror or error}; choose another --out") from None
    finally:
        partial.unlink(missing_ok=True)
    return target

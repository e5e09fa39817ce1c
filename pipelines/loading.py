"""`load`: a pipeline from the hub, a local folder or the bundled ones, with a plan on it if wanted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffaccel.errors import InputError, MissingPackageError, ModelError
from diffaccel.pipelines.bundled import bundled
from diffaccel.pipelines.wrapped import Wrapped

if TYPE_CHECKING:
    from diffaccel.plan import Plan

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
_INDEX = "model_index.json"
_DEFAULTS = "diffaccel_call.json"


def load(
    model: str | os.PathLike[str] = "bundled:image",
    plan: str | os.PathLike[str] | Plan | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    originals: str = "cpu",
    **options: Any,
) -> Wrapped:
    """Load a pipeline and, with ``plan``, accelerate it.

    Args:
        model: ``bundled:image``, ``bundled:video``, a folder that ``save_pretrained`` wrote, or a hub id. The bundled
            ones never touch the network.
        plan: what `diffaccel.accelerate` takes; None leaves the pipeline as it is.
        dtype: of weights and computation; None is bfloat16 on CUDA and float32 elsewhere.
        device: None is CUDA where there is one, else the CPU.
        originals: where replaced weights wait, see `diffaccel.accelerate`.
        options: handed to ``DiffusionPipeline.from_pretrained``, such as ``revision`` or ``variant``.

    Raises:
        ModelError: the model cannot be found or read.
        MissingPackageError: the pipeline needs a package that is not installed.
        PlanError: the plan does not fit.
        InputError: an unknown dtype or device.
    """
    device = _device(device)
    options["dtype"] = _dtype(dtype, device)
    name = os.fspath(model)
    defaults: dict[str, Any] = {}
    if name.startswith("bundled:"):
        source = bundled(name)
        defaults = dict(source.call)
        pipe = _from_pretrained(str(source.path), name, {**options, "local_files_only": True})
    elif _is_folder(name):
        folder = _checked_folder(Path(name).expanduser())
        defaults = _defaults_in(folder)
        pipe = _from_pretrained(str(folder), name, options)
    else:
        pipe = _from_pretrained(name, name, options)
    wrapped = Wrapped(pipe.to(device), name=name, defaults=defaults)
    if plan is not None:
        wrapped.accelerate(plan, originals=originals)
    return wrapped


def save(wrapped: Wrapped, folder: str | os.PathLike[str]) -> None:
    """Write a pipeline as diffusers does, and beside it the arguments that its calls need, which `load` reads again."""
    wrapped.pipe.save_pretrained(folder)
    (Path(folder) / _DEFAULTS).write_text(json.dumps(wrapped.defaults, indent=2))


def _defaults_in(folder: Path) -> dict[str, Any]:
    """What `save` wrote; nothing in a folder that diffusers wrote."""
    try:
        return dict(json.loads((folder / _DEFAULTS).read_text()))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        raise ModelError(f"{folder / _DEFAULTS} is damaged ({error}); delete it, or save the pipeline again") from None


def _is_folder(name: str) -> bool:
    """Whether the text means a folder: it exists, or it cannot be a hub id (``user/name``)."""
    return Path(name).expanduser().exists() or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _checked_folder(folder: Path) -> Path:
    if not folder.exists():
        raise ModelError(
            f"no folder {str(folder)!r}; give a folder that save_pretrained wrote, a hub id, or bundled:image"
        )
    if (folder / _INDEX).is_file():
        return folder
    if folder.is_file():
        raise ModelError(
            f"{str(folder)!r} is a file; load single-file checkpoints with diffusers' from_single_file and hand the "
            "pipeline to diffaccel.accelerate, or save it as a folder by save_pretrained"
        )
    inner = sorted(p.parent.name for p in folder.glob(f"*/{_INDEX}"))
    hint = f"did you mean {str(folder / inner[0])!r}?" if inner else "give one that save_pretrained of a pipeline wrote"
    raise ModelError(f"{str(folder)!r} holds no {_INDEX}, so it is no diffusers pipeline; {hint}")


def _from_pretrained(source: str, name: str, options: dict[str, Any]) -> Any:
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.from_pretrained(source, **options)
    except ImportError as error:
        raise MissingPackageError(f"{name} needs a package that is not installed: {_first_line(error)}") from error
    except Exception as error:  # the hub, diffusers, transformers and safetensors raise a dozen unrelated types
        if Path(source).is_dir():
            raise ModelError(f"{name} cannot be loaded: {_first_line(error)}; the folder may be incomplete") from error
        raise ModelError(
            f"{name!r} is no local folder and could not be fetched from the hub ({type(error).__name__}: "
            f"{_first_line(error)}); check the name and the network, or use bundled:image or bundled:video without one"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:300]


def _dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in _DTYPES:
        raise InputError(f"dtype {dtype!r} is none of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"no device {device!r}: {_first_line(error)}") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {str(device)!r}: this torch sees no CUDA GPU; use device='cpu'")
    return chosen

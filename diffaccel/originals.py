"""Where replaced weights wait until they are put back: on the CPU, in a temporary folder, or where they were."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffaccel.errors import DiffAccelError


class Originals:
    """Parks weights in one place.

    Args:
        where: ``cpu``, ``disk`` (a temporary folder, which honours ``TMPDIR``; one file a weight) or ``device``.
        undo: gets the removal of the temporary folder; what is registered later, such as restoring, runs before it.
    """

    def __init__(self, where: str, undo: ExitStack) -> None:
        self._where = where
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if where == "disk":
            self._folder = tempfile.TemporaryDirectory(prefix="diffaccel-", ignore_cleanup_errors=True)
            undo.callback(self.discard)
        self._count = 0

    def claim(self, parameter: nn.Parameter, *, stay: bool = False) -> Parked:
        """A place for ``parameter``; nothing moves before `Parked.store`. ``stay`` leaves it on its device."""
        self._count += 1
        if stay or isinstance(parameter.data, torch._subclasses.FakeTensor) or self._where == "device":
            return Parked(parameter, None, move=False)
        file = Path(self._folder.name) / f"{self._count}.safetensors" if self._folder else None
        return Parked(parameter, file, move=True)

    def discard(self) -> None:
        """Remove the temporary folder."""
        if self._folder is not None:
            self._folder.cleanup()


class Parked:
    """One weight that was taken out of the model. The Parameter object stays the same throughout."""

    def __init__(self, parameter: nn.Parameter, file: Path | None, *, move: bool) -> None:
        self.parameter = parameter
        self._file, self._move, self._stored = file, move, False
        self._shape, self._stride = parameter.shape, parameter.stride()
        self._address = _address(parameter)

    def store(self) -> None:
        """Free the device memory of the weight (unless it stays there)."""
        data = self.parameter.data
        if self._file is not None:
            try:
                save_file({"weight": data.cpu().contiguous()}, self._file)
            except OSError as error:
                raise DiffAccelError(
                    f"originals='disk': {self._file.parent} cannot hold the weights ({error}); set TMPDIR to a "
                    "folder with more space, or use originals='cpu'"
                ) from error
            self.parameter.data = data.new_empty(0)
        elif self._move:
            self.parameter.data = data.cpu()
        self._stored = True

    def read(self) -> Tensor:
        """The weight as it was, for saving; from disk it is mapped, not copied, into memory."""
        if self._file is None or not self._stored:
            return self.parameter
        try:
            with safe_open(self._file, framework="pt") as file:
                return file.get_tensor("weight")
        except OSError as error:
            raise DiffAccelError(
                f"the original weight in {self._file} is gone ({error}); load the model again"
            ) from error

    def restore(self, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
        """Bring the weight back, to where and what the model meanwhile became."""
        if not self._stored:
            return self.parameter
        data = self.read().detach()
        if self._file is not None:
            data = _empty_at(self._address, self._shape, self._stride, data.dtype).copy_(data)
        self.parameter.data = data.to(device, dtype)
        self._stored = False
        return self.parameter


# Some CPU kernels round by where a weight begins within this many bytes; files are mapped to any address.
_LINE = 64


def _address(tensor: Tensor) -> int:
    """Where ``tensor`` begins within a cache line; 0 off the CPU and for fake tensors, where it does not matter."""
    real = tensor.device.type == "cpu" and not isinstance(tensor.data, torch._subclasses.FakeTensor)
    return tensor.data_ptr() % _LINE if real else 0


def _empty_at(address: int, shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised CPU memory that begins at ``address`` within a cache line, so that it computes to the same bits."""
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if 0 not in shape else 0
    buffer = torch.empty(extent + _LINE // dtype.itemsize, dtype=dtype)
    offset = (address - buffer.data_ptr()) % _LINE // dtype.itemsize
    return buffer.as_strided(shape, stride, offset)

"""A cache of tensors: in RAM up to a limit, then in memory-mapped files up to another limit."""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bayes_lora.errors import ConfigError

__all__ = ["TensorCache"]

SEGMENT = 1 << 28
"""Size in bytes of a memory-mapped file, whose disk space is reserved when it is made."""


class TensorCache:
    """Caches tuples of tensors on the CPU.

    Args:
        ram_bytes: maximum size in RAM.
        folder: folder for tensors beyond that size; its files are anonymous, and are deleted when the process ends.
            None keeps nothing on disk.
        disk_bytes: maximum size on disk.

    Raises:
        ConfigError: the folder cannot be written.
    """

    def __init__(self, ram_bytes: int, folder: str | Path | None = None, disk_bytes: int = 64 << 30) -> None:
        self.ram_bytes, self.disk_bytes = ram_bytes, disk_bytes
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=self.folder).close()
            except OSError as error:
                raise ConfigError(
                    f"cache folder {self.folder}: cannot be written ({error}). Choose another."
                ) from error
        self._kept: dict[bytes, tuple[Tensor, ...]] = {}
        self._segment, self._at = torch.empty(0, dtype=torch.uint8), 0
        self.ram_used = self.disk_used = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: bytes) -> tuple[Tensor, ...] | None:
        """Return the tensors of a key, or None. They must not be modified."""
        return self._kept.get(key)

    def put(self, key: bytes, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Cache copies of tensors on the CPU if there is room, and return the copies."""
        here = tuple(tensor.detach().to("cpu", copy=True).contiguous() for tensor in tensors)
        if key in self._kept:
            return here
        size = sum(tensor.nbytes for tensor in here)
        if self.ram_used + size <= self.ram_bytes:
            self._kept[key] = here
            self.ram_used += size
        elif self._reserve(sum(map(_room, here))):
            self._kept[key] = tuple(self._write(tensor) for tensor in here)
        return here

    def _reserve(self, size: int) -> bool:
        """Reserve ``size`` bytes in the current file or in a new one; return whether this succeeded."""
        if self._at + size <= len(self._segment):
            return True
        length = max(SEGMENT, size)
        if self.folder is None or self.disk_used + length > self.disk_bytes:
            return False
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                # Writing to a sparse file on a full disk would raise a signal.
                os.posix_fallocate(file.fileno(), 0, length)
                mapped = np.memmap(file, dtype=np.uint8, mode="r+", shape=(length,))
        except OSError as error:
            warnings.warn(f"cache folder {self.folder} is full ({error}): no more tensors are stored.", stacklevel=2)
            self.disk_bytes = self.disk_used
            return False
        self._segment, self._at = torch.from_numpy(mapped), 0
        self.disk_used += length
        return True

    def _write(self, tensor: Tensor) -> Tensor:
        place = self._segment[self._at : self._at + tensor.nbytes]
        place.copy_(tensor.flatten().view(torch.uint8))
        self._at += _room(tensor)
        return place.view(tensor.dtype).view(tensor.shape)


def _room(tensor: Tensor) -> int:
    """Return the size of a tensor in bytes, rounded up so that the next one is aligned for any dtype."""
    return 16 * math.ceil(tensor.nbytes / 16)

"""A cache of tensors: on the GPU and in RAM up to a limit each, and on disk for later runs and other processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from bayes_lora.lm.tensor_store import Entry, TensorStore
from bayes_lora.utils.devices import is_gpu, send

__all__ = ["TensorCache"]


class TensorCache:
    """Caches tuples of tensors, in the fastest memory with room for them: first on a GPU, then in RAM.

    Args:
        ram_bytes: maximum size in RAM.
        store: keeps tensors on disk; None keeps them in memory only.
        device: the device that reads the tensors.
        gpu_bytes: maximum size on ``device``, if it is a GPU.

    Attributes:
        ram_used: current size in RAM.
        gpu_used: current size on the GPU.
    """

    def __init__(
        self,
        ram_bytes: int,
        store: TensorStore | None = None,
        *,
        device: torch.device | str = "cpu",
        gpu_bytes: int = 0,
    ) -> None:
        self.ram_bytes, self.store, self.ram_used = ram_bytes, store, 0
        self.device, self.gpu_bytes, self.gpu_used = device, gpu_bytes if is_gpu(device) else 0, 0
        self._kept: dict[bytes, Entry] = {}

    def __len__(self) -> int:
        """Return the number of entries on the GPU and in RAM."""
        return len(self._kept)

    def get(self, keys: Iterable[bytes]) -> dict[bytes, Entry]:
        """Return the tensors of those keys that are cached, each where it is. They must not be modified."""
        wanted = dict.fromkeys(keys)
        found = {key: self._kept[key] for key in wanted if key in self._kept}
        if self.store is not None and len(found) < len(wanted):
            stored = self.store.get(key for key in wanted if key not in found)
            found |= {key: self._keep(key, tensors) for key, tensors in stored.items()}
        return found

    def put(self, entries: Mapping[bytes, tuple[Tensor, ...]]) -> dict[bytes, Entry]:
        """Cache copies of tensors where there is room, and return the copies."""
        copies = {
            key: tuple(tensor.detach().to("cpu", copy=True).contiguous() for tensor in tensors)
            for key, tensors in entries.items()
        }
        if self.store is not None:
            self.store.put(copies)
        return {key: self._keep(key, tensors) for key, tensors in copies.items()}

    def _keep(self, key: bytes, tensors: Entry) -> Entry:
        """Keep tensors of the CPU, and return those that are kept."""
        size = sum(tensor.nbytes for tensor in tensors)
        if key in self._kept:
            return self._kept[key]
        if self.gpu_used + size <= self.gpu_bytes:
            self._kept[key] = tuple(send(tensor, self.device) for tensor in tensors)
            self.gpu_used += size
        elif self.ram_used + size <= self.ram_bytes:
            self._kept[key] = tensors
            self.ram_used += size
        return self._kept.get(key, tensors)

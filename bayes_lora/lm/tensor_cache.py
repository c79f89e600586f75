"""A cache of tensors: in RAM up to a limit, and on disk for later runs and other processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from bayes_lora.lm.tensor_store import Entry, TensorStore

__all__ = ["TensorCache"]


class TensorCache:
    """Caches tuples of tensors on the CPU.

    Args:
        ram_bytes: maximum size in RAM.
        store: keeps tensors on disk; None keeps them in RAM only.

    Attributes:
        ram_used: current size in RAM.
    """

    def __init__(self, ram_bytes: int, store: TensorStore | None = None) -> None:
        self.ram_bytes, self.store, self.ram_used = ram_bytes, store, 0
        self._kept: dict[bytes, Entry] = {}

    def __len__(self) -> int:
        """Return the number of entries in RAM."""
        return len(self._kept)

    def get(self, keys: Iterable[bytes]) -> dict[bytes, Entry]:
        """Return the tensors of those keys that are cached. They must not be modified."""
        wanted = dict.fromkeys(keys)
        found = {key: self._kept[key] for key in wanted if key in self._kept}
        if self.store is not None and len(found) < len(wanted):
            stored = self.store.get(key for key in wanted if key not in found)
            for key, tensors in stored.items():
                self._keep(key, tensors)
            found |= stored
        return found

    def put(self, entries: Mapping[bytes, tuple[Tensor, ...]]) -> dict[bytes, Entry]:
        """Cache copies of tensors on the CPU where there is room, and return the copies."""
        copies = {
            key: tuple(tensor.detach().to("cpu", copy=True).contiguous() for tensor in tensors)
            for key, tensors in entries.items()
        }
        for key, tensors in copies.items():
            self._keep(key, tensors)
        if self.store is not None:
            self.store.put(copies)
        return copies

    def _keep(self, key: bytes, tensors: Entry) -> None:
        size = sum(tensor.nbytes for tensor in tensors)
        if key not in self._kept and self.ram_used + size <= self.ram_bytes:
            self._kept[key] = tensors
            self.ram_used += size

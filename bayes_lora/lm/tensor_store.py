"""Tensors on disk that several processes share: LMDB environments, one for each base model and kind of tensor.

LMDB (https://www.symas.com/mdb) is memory-mapped, and its transactions survive the death of a process. It needs a local
file system: on network file systems, choose a local folder.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import lmdb
from safetensors import SafetensorError

from bayes_lora.errors import ConfigError
from bayes_lora.utils.storage import write_json

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Entry", "TensorStore", "entries"]

ABOUT, DATA = "about.json", "data.mdb"
MAX_BYTES = 16 << 30

Entry = tuple["Tensor", ...]

_OPEN: dict[Path, tuple[int, lmdb.Environment]] = {}
"""Environments of this process by folder, with the inode of their file: LMDB opens each once."""
_LOCK = threading.RLock()


def _after_fork() -> None:
    """A child cannot use the environments of its parent."""
    global _LOCK
    _LOCK = threading.RLock()
    for _, environment in _OPEN.values():
        environment.close()
    _OPEN.clear()


os.register_at_fork(after_in_child=_after_fork)


class TensorStore:
    """A persistent mapping from keys to tuples of tensors.

    Args:
        folder: folder of all stores. It is made on first use.
        about: what determines the tensors, apart from their keys, as JSON values. Stores that differ in it are
            separate.
        max_bytes: maximum size of this store. When it is opened, the least recently used others are deleted as long as
            the sizes in ``folder`` sum to more.

    Raises:
        ConfigError: ``folder`` is a file.
    """

    def __init__(self, folder: str | Path, about: Mapping[str, Any], max_bytes: int = MAX_BYTES) -> None:
        self.folder, self.about, self.max_bytes = Path(folder).resolve(), dict(about), max_bytes
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"cache folder {self.folder}: expected a folder, but it is a file. Choose another.")
        name = blake2b(json.dumps(self.about, sort_keys=True).encode(), digest_size=16).hexdigest()
        self.path = self.folder / name
        self._readable = self._writable = True

    def get(self, keys: Iterable[bytes]) -> dict[bytes, Entry]:
        """Return the tensors of those keys that are stored."""
        wanted = list(keys)
        with _LOCK:
            environment = self._environment()
            if environment is None:
                return {}
            try:
                with environment.begin(buffers=True) as transaction:
                    found = {key: transaction.get(key) for key in wanted}
                    return {key: _unpack(value) for key, value in found.items() if value is not None}
            except (lmdb.Error, SafetensorError) as error:
                self._readable = False
                self._warn(f"cannot be read ({error}). Delete it")
                return {}

    def put(self, entries: Mapping[bytes, Entry]) -> None:
        """Store tensors of the CPU in one transaction; warn once if they cannot be written."""
        with _LOCK:
            environment = self._environment() if self._writable else None
            if environment is None:
                return
            try:
                with environment.begin(write=True) as transaction:
                    for key, tensors in entries.items():
                        transaction.put(key, _pack(tensors), overwrite=False)
            except lmdb.Error as error:
                full = isinstance(error, lmdb.MapFullError)
                self._writable = False
                self._warn(f"is full ({self.max_bytes / 2**30:.3g} GiB)" if full else f"cannot be written ({error})")

    def _environment(self) -> lmdb.Environment | None:
        if not self._readable:
            return None
        inode, opened = _inode(self.path / DATA), _OPEN.get(self.path)
        if opened is not None and opened[0] == inode:
            return opened[1]
        if opened is not None:  # the file was deleted or replaced
            opened[1].close()
            del _OPEN[self.path]
        try:
            self._describe()
            self._prune()
            environment = self._open()
        except (OSError, lmdb.Error) as error:
            self._readable = False
            self._warn(f"cannot be used ({error})")
            return None
        _OPEN[self.path] = _inode(self.path / DATA), environment
        return environment

    def _describe(self) -> None:
        """Make the folder and the file that describes it, whose time is that of the last use."""
        self.path.mkdir(parents=True, exist_ok=True)
        about = self.path / ABOUT
        if not about.exists():
            write_json(about, self.about)
        with suppress(OSError):
            os.utime(about)

    def _open(self) -> lmdb.Environment:
        options: dict[str, Any] = {"map_size": self.max_bytes, "max_readers": 512, "metasync": False}
        try:
            environment = lmdb.open(str(self.path), **options)
            pages = environment.info()["last_pgno"] + 1
            size, expected = (self.path / DATA).stat().st_size, pages * environment.stat()["psize"]
            if pages < 2 or size >= expected:  # a new one has not been written
                return environment
            environment.close()
            error: Exception = lmdb.CorruptedError(f"{size} of {expected} bytes")
        except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError) as raised:
            error = raised
        warnings.warn(f"{self.path} is damaged and is rebuilt ({error})", stacklevel=6)
        for file in self.path.glob("*.mdb"):
            file.unlink()
        return lmdb.open(str(self.path), **options)

    def _prune(self) -> None:
        total = 0
        for entry in entries(self.folder):
            total += entry.num_bytes
            if entry.path != self.path and total > self.max_bytes:
                shutil.rmtree(entry.path, ignore_errors=True)

    def _warn(self, problem: str) -> None:
        warnings.warn(f"cache folder {self.path} {problem}: no more tensors are stored.", stacklevel=5)


def _inode(file: Path) -> int:
    try:
        return file.stat().st_ino
    except OSError:
        return 0


class StoreFacts(NamedTuple):
    """One store in a folder of stores."""

    path: Path
    about: Mapping[str, Any]
    num_bytes: int
    last_used: float


def entries(folder: Path) -> list[StoreFacts]:
    """Return the stores of a folder, the most recently used first. Folders of another kind are left out."""
    found = []
    for data in folder.glob(f"*/{DATA}"):
        about = data.with_name(ABOUT)
        try:
            used = (about if about.exists() else data).stat().st_mtime
            files = [file.stat() for file in data.parent.iterdir()]
        except OSError:  # another process deletes it
            continue
        found.append(StoreFacts(data.parent, _read(about), sum(512 * one.st_blocks for one in files), used))
    return sorted(found, key=lambda entry: entry.last_used, reverse=True)


def _read(about: Path) -> dict[str, Any]:
    try:
        facts = json.loads(about.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _pack(tensors: Entry) -> bytes:
    import safetensors.torch  # imports torch, which a list of the stores does not need

    packed: bytes = safetensors.torch.save({str(index): tensor.contiguous() for index, tensor in enumerate(tensors)})
    return packed


def _unpack(value: Any) -> Entry:
    import safetensors.torch

    tensors = safetensors.torch.load(bytes(value))
    return tuple(tensors[str(index)] for index in range(len(tensors)))

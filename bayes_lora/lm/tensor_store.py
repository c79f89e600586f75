"""Tensors on disk that several processes share: LMDB environments, one for each base model and kind of tensor.

LMDB (https://www.symas.com/mdb) is memory-mapped, and its transactions survive the death of a process. It needs a local
file system: on network file systems, choose a local folder.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import safetensors.torch
import torch
import transformers
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import Tensor, nn

from bayes_lora.errors import ConfigError
from bayes_lora.lm.text_config import computation_values

__all__ = ["Entry", "TensorStore", "base_facts", "entries"]

ABOUT, DATA = "about.json", "data.mdb"
MAX_BYTES = 16 << 30

Entry = tuple[Tensor, ...]

_OPEN: dict[Path, tuple[int, int, lmdb.Environment]] = {}
"""Environments of this process by folder, with the process id and the inode of their file: LMDB opens each once."""


class TensorStore:
    """A persistent mapping from keys to tuples of tensors.

    Args:
        folder: folder of all stores. It is made on first use.
        about: returns what determines the tensors, apart from their keys, as JSON values; called on first use. Stores
            that differ in it are separate.
        max_bytes: maximum size of this store. When it is opened, the least recently used others are deleted as long as
            the sizes in ``folder`` sum to more.

    Raises:
        ConfigError: ``folder`` is a file.
    """

    def __init__(self, folder: str | Path, about: Callable[[], Mapping[str, Any]], max_bytes: int = MAX_BYTES) -> None:
        self.folder, self.max_bytes = Path(folder), max_bytes
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"cache folder {self.folder}: expected a folder, but it is a file. Choose another.")
        self._about, self._usable = about, True

    @cached_property
    def about(self) -> dict[str, Any]:
        """What determines the tensors, apart from their keys."""
        return dict(self._about())

    @cached_property
    def path(self) -> Path:
        """The folder of this store."""
        name = blake2b(json.dumps(self.about, sort_keys=True).encode(), digest_size=16).hexdigest()
        return self.folder / name

    def get(self, keys: Iterable[bytes]) -> dict[bytes, Entry]:
        """Return the tensors of those keys that are stored."""
        environment = self._environment()
        if environment is None:
            return {}
        try:
            with environment.begin(buffers=True) as transaction:
                found = {key: transaction.get(key) for key in keys}
                return {key: _unpack(value) for key, value in found.items() if value is not None}
        except (lmdb.Error, SafetensorError) as error:
            self._give_up(f"cannot be read ({error}). Delete it")
            return {}

    def put(self, entries: Mapping[bytes, Entry]) -> None:
        """Store tensors of the CPU in one transaction; warn once if they cannot be written."""
        environment = self._environment()
        if environment is None:
            return
        try:
            with environment.begin(write=True) as transaction:
                for key, tensors in entries.items():
                    transaction.put(key, _pack(tensors), overwrite=False)
        except lmdb.MapFullError:
            self._give_up(f"is full ({self.max_bytes / 2**30:.3g} GiB)")
        except lmdb.Error as error:
            self._give_up(f"cannot be written ({error})")

    def _environment(self) -> lmdb.Environment | None:
        if not self._usable:
            return None
        file, opened = self.path / DATA, _OPEN.get(self.path)
        if opened is not None and opened[:2] == (os.getpid(), _inode(file)):
            return opened[2]
        if opened is not None and opened[0] == os.getpid():  # the file was deleted or replaced
            opened[2].close()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / ABOUT).write_text(json.dumps(self.about) + "\n", encoding="utf-8")
            self._prune()
            environment = self._open()
        except (OSError, lmdb.Error) as error:
            self._give_up(f"cannot be used ({error})")
            return None
        _OPEN[self.path] = os.getpid(), _inode(file), environment
        return environment

    def _open(self) -> lmdb.Environment:
        options: dict[str, Any] = {"map_size": self.max_bytes, "max_readers": 512, "metasync": False}
        try:
            return lmdb.open(str(self.path), **options)
        except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError) as error:
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

    def _give_up(self, problem: str) -> None:
        self._usable = False
        warnings.warn(f"cache folder {self.path} {problem}: no more tensors are stored.", stacklevel=5)


def _inode(file: Path) -> int:
    return file.stat().st_ino if file.exists() else 0


class StoreFacts(NamedTuple):
    """One store in a folder of stores."""

    path: Path
    about: Mapping[str, Any]
    num_bytes: int
    last_used: float


def entries(folder: Path) -> list[StoreFacts]:
    """Return the stores of a folder, the most recently used first. Folders of another kind are left out."""
    found = []
    for about in folder.glob(f"*/{ABOUT}"):
        try:
            facts, used = json.loads(about.read_text(encoding="utf-8")), about.stat().st_mtime
            files = [file.stat() for file in about.parent.iterdir()]
        except (OSError, ValueError):  # another process deletes or makes it
            continue
        found.append(StoreFacts(about.parent, facts, sum(512 * one.st_blocks for one in files), used))
    return sorted(found, key=lambda entry: entry.last_used, reverse=True)


def base_facts(model: Any, name: str) -> dict[str, Any]:
    """Return all that determines what a base model computes from tokens, as JSON values.

    Args:
        model: the model; LoRA weights in it are left out.
        name: its hub id or path, which is shown to the user.
    """
    return {
        "model": name,
        "weights": _content(model),
        "config": computation_values(model.config),
        "dtype": str(model.dtype),
        "device": model.device.type,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


@torch.no_grad()
def _content(model: nn.Module) -> str:
    """Return a hash of all weights and buffers: their names, shapes, dtypes, and the sum of the bits of each row."""
    found = blake2b(digest_size=16)
    adapter = [f".{part}." for part in (*LoraLayer.adapter_layer_names, *LoraLayer.other_param_names)]
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and not any(part in f".{name}." for part in adapter):
            facts = name.replace(".base_layer.", "."), tuple(value.shape), value.dtype
            found.update(repr(facts).encode() + _row_sums(value).cpu().numpy().tobytes())
    return found.hexdigest()


def _row_sums(value: Tensor) -> Tensor:
    """Return sums of the bits of each row as integers, which do not depend on the order of summation."""
    rows = value.detach().reshape(len(value) if value.ndim > 1 else 1, -1).contiguous()
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.dtype.itemsize]
    if value.ndim < 2:  # few values: all of them
        return rows.view(bits)
    return rows.view(bits).sum(-1, dtype=torch.int64)


def _pack(tensors: Entry) -> bytes:
    packed: bytes = safetensors.torch.save({str(index): tensor.contiguous() for index, tensor in enumerate(tensors)})
    return packed


def _unpack(value: Any) -> Entry:
    tensors = safetensors.torch.load(bytes(value))
    return tuple(tensors[str(index)] for index in range(len(tensors)))

"""Child processes by fork, which import nothing again; what a killed process or a loss of power leaves of a folder."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import stat
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

CHANGES = ("rename", "replace", "unlink", "mkdir", "rmdir", "fsync")
"""What changes a folder, or writes it to disk."""


def forked(work: Callable[[], Any]) -> int:
    """Run a function in a child process that ends with 0, or with 1 and a traceback, or as it exits; its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)  # the threads of OpenMP do not survive a fork
        work()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def exit_code(child: int) -> int:
    """Wait for a child process; its exit code, or minus the number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextmanager
def watched(see: Callable[[], None]) -> Iterator[None]:
    """Call a function before and after every change of a name in a folder, and every ``fsync``."""
    busy = False

    def around(real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal busy
        if busy:
            return real(*args, **kwargs)
        busy = True
        try:
            see()
            done = real(*args, **kwargs)
            see()
            return done
        finally:
            busy = False

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, functools.partial(around, getattr(os, name)))
        yield


class Disk:
    """What is on the disk of the files below a folder, if only ``fsync`` writes to it.

    Args:
        root: the folder; it is on the disk from the beginning.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._open: dict[int, int] = {}  # a descriptor for each inode, so that its number is not used again
        self._data: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {self._inode(os.open(root, os.O_RDONLY)): {}}

    def fsync(self, descriptor: int) -> None:
        """Take the place of ``os.fsync``."""
        inode = self._inode(os.dup(descriptor))
        path = Path(f"/proc/self/fd/{descriptor}")
        if path.is_dir():
            self._names[inode] = {entry.name: self._inode(os.open(entry, os.O_RDONLY)) for entry in path.iterdir()}
        else:
            self._data[inode] = path.read_bytes()

    def left(self, to: Path, *, names: bool) -> None:
        """Make the folder that a loss of power leaves: without names that are not on the disk, or with empty files."""
        self._copy(os.stat(self.root).st_ino, self.root if names else None, to)

    def close(self) -> None:
        """Close the descriptors."""
        for descriptor in self._open.values():
            os.close(descriptor)

    def _copy(self, inode: int, now: Path | None, to: Path) -> None:
        if not (now.is_dir() if now else stat.S_ISDIR(os.fstat(self._open[inode]).st_mode)):
            to.write_bytes(self._data.get(inode, b""))
            return
        to.mkdir()
        if now:
            entries = {path.name: (path.stat().st_ino, path) for path in now.iterdir()}
        else:
            entries = {name: (child, None) for name, child in self._names.get(inode, {}).items()}
        for name, (child, path) in entries.items():
            self._copy(child, path, to / name)

    def _inode(self, descriptor: int) -> int:
        inode = os.fstat(descriptor).st_ino
        if inode in self._open:
            os.close(descriptor)
        else:
            self._open[inode] = descriptor
        return inode


class States:
    """Copies of a folder at several times, each different one once.

    Args:
        folder: where the copies lie, by number.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: set[bytes] = set()
        self.count = 0

    def add(self, make: Callable[[Path], object]) -> None:
        """Add what a function makes at a path."""
        path = self.folder / str(len(self.seen))
        make(path)
        self.count += 1
        found = hashlib.sha256()
        for one in sorted(path.rglob("*")):
            found.update(str(one.relative_to(path)).encode() + (b"/" if one.is_dir() else one.read_bytes()))
        if found.digest() in self.seen:
            shutil.rmtree(path)
        self.seen.add(found.digest())

    def __iter__(self) -> Iterator[Path]:
        return iter(sorted(self.folder.iterdir(), key=lambda path: int(path.name)))

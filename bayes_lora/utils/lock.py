"""A lock on a file, so that two processes do not write to one folder. The kernel releases it however a process ends."""

from __future__ import annotations

import errno
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bayes_lora.errors import RunFolderError
from bayes_lora.utils.storage import writing

if sys.platform != "win32":
    import fcntl

__all__ = ["check_unlocked", "locked"]

UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""Errors of file systems that have no locks, such as Lustre mounted without them."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock on a file inside the block; the file is made for it, and deleted afterwards.

    A file system without locks is a warning. On Windows nothing is locked.

    Raises:
        RunFolderError: another process holds the lock, or the file cannot be written.
    """
    if sys.platform == "win32":
        yield
        return
    with writing(path.parent):
        descriptor = _acquired(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is locked: see _acquired
        os.close(descriptor)


def check_unlocked(path: Path) -> None:
    """Raise :class:`RunFolderError` if a process holds the lock on a file, without changing it."""
    if sys.platform == "win32" or not path.exists():
        return
    with writing(path.parent):
        descriptor = os.open(path, os.O_RDWR)  # NFS locks no file that is open for reading
        try:
            _lock(descriptor, path)
        finally:
            os.close(descriptor)


if sys.platform != "win32":

    def _acquired(path: Path) -> int:
        """Return a descriptor of the locked file, which names this process."""
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                _lock(descriptor, path)
                if _is_at(descriptor, path):
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _is_at(descriptor: int, path: Path) -> bool:
        """Return whether the name still is that of the file: its last owner may have deleted it after it was opened."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(path))
        except FileNotFoundError:
            return False

    def _lock(descriptor: int, path: Path) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            raise RunFolderError(
                f"{path.parent} is in use by {owner}. Wait until it ends, or choose another folder."
            ) from error
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            warnings.warn(
                f"{path.parent} cannot be locked ({error.strerror}): use it in one process at a time", stacklevel=2
            )

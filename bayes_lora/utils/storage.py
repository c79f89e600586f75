"""Write folders of safetensors and JSON files (never pickle): under a temporary name, which is then renamed.

Files are written to disk before they are renamed, so that a loss of power leaves the old or the new one. Their modes
are those of the umask. :mod:`bayes_lora.utils.reading` reads them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from bayes_lora.errors import BayesLoraError, RunFolderError
from bayes_lora.utils.reading import read_json, read_tensors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "check_new_folder",
    "delete",
    "is_temporary",
    "make_folder",
    "new_folder",
    "read_json",
    "read_tensors",
    "write_json",
    "write_tensors",
    "write_text",
    "writing",
]

_TEMPORARY = re.compile(r"\.(.+\.(old\.)?[0-9a-f]{8}(\.tmp)?|tmp\w{6})", re.DOTALL)
"""Names that this module gives to files and folders until they are complete; and those that safetensors gives."""


def is_temporary(path: Path) -> bool:
    """Return whether a name is that of a file or folder that is being written, or was when its process was killed."""
    return _TEMPORARY.fullmatch(path.name) is not None


def delete(path: Path) -> None:
    """Delete a file, a link, or a folder with its contents."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def make_folder(path: Path) -> None:
    """Make a folder and its parents where they are missing, and write their names to disk."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        _flush(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert errors of the file system inside the block, such as a full disk, into :class:`RunFolderError`."""
    try:
        yield
    except BayesLoraError:
        raise
    except (OSError, SafetensorError) as error:
        raise RunFolderError(
            f"{path} cannot be written: {error}. Make room or allow writing there, or choose another folder."
        ) from error


@contextmanager
def new_folder(path: Path, *, overwrite: bool = False, marker: str | None = None) -> Iterator[Path]:
    """Yield a temporary folder next to ``path`` that is renamed to ``path`` when the block ends without an error.

    Args:
        path: the folder to make.
        overwrite: whether to replace an existing folder.
        marker: name of a file that only folders of this kind hold; no other folder is replaced unless it is empty.

    Raises:
        RunFolderError: ``path`` exists and may not be replaced, or it cannot be written.
    """
    path = Path(path)
    check_new_folder(path, overwrite=overwrite, marker=marker)
    with writing(path):
        make_folder(path.parent)
        temporary = _made_next_to(path, "")
    try:
        yield temporary
        with writing(path):
            for written in (*temporary.rglob("*"), temporary):
                _flush(written)
            _put_in_place(temporary, path)
            _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _made_next_to(path: Path, kind: str) -> Path:
    """Make a hidden folder next to ``path``. Unlike tempfile's, it is not private, and can take its place."""
    made = path.parent / f".{path.name}.{kind}{secrets.token_hex(4)}"
    made.mkdir()
    return made


def _put_in_place(new: Path, path: Path) -> None:
    """Rename ``new`` to ``path``. An existing folder is deleted only afterwards, and is restored if renaming fails."""
    aside = _made_next_to(path, "old.")
    old = aside / path.name
    try:
        if path.exists():
            os.rename(path, old)
        os.rename(new, path)
    except BaseException as error:
        if old.exists():
            os.rename(old, path)
        aside.rmdir()
        if isinstance(error, OSError):
            raise RunFolderError(f"{path} cannot be replaced ({error}). The existing folder is unchanged.") from error
        raise
    shutil.rmtree(aside)


def check_new_folder(path: Path, *, overwrite: bool = False, marker: str | None = None) -> None:
    """Raise :class:`RunFolderError` if :func:`new_folder` would, so that long work is not lost."""
    with writing(path):
        if path.is_file() and not overwrite:
            raise RunFolderError(f"{path} is a file, expected a new folder. Choose another name.")
        if path.exists() and not overwrite:
            raise RunFolderError(f"{path} already exists. Choose another name, or overwrite it (--overwrite).")
        if path.exists() and marker is not None:
            if not path.is_dir() or (any(path.iterdir()) and not (path / marker).exists()):
                raise RunFolderError(f"{path} has no {marker}, so it is not replaced. Choose another name.")


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name, then rename.

    Raises:
        RunFolderError: the file cannot be written.
    """
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8 under a temporary name, then rename.

    Raises:
        RunFolderError: the file cannot be written.
    """
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    """Write safetensors under a temporary name, then rename.

    Args:
        path: the file.
        tensors: the tensors by name.
        metadata: texts for the file's header.

    Returns:
        The file's SHA-256. Write it as :data:`bayes_lora.utils.reading.SHA256` into the JSON file next to it.

    Raises:
        RunFolderError: the file cannot be written.
    """
    from safetensors.torch import save_file  # imports torch, which JSON and folders do not need

    contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with _replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors would write a private file
        save_file(contiguous, temporary, metadata)
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield the name of a temporary file that replaces ``path`` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # of this process and thread alone
    with writing(path):
        try:
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Write a file, or the names in a folder, from the system's memory to disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Read and write folders of safetensors and JSON files (never pickle) under a temporary name, then rename them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bayes_lora.errors import PosteriorError, RunFolderError

__all__ = ["check_new_folder", "new_folder", "read_json", "read_tensors", "write_json", "write_tensors"]


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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise RunFolderError(f"{path} cannot be written: {error}") from error
    temporary.chmod(0o755)  # mkdtemp makes it private
    try:
        yield temporary
        _put_in_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(new: Path, path: Path) -> None:
    """Rename ``new`` to ``path``. An existing folder is deleted only afterwards, and is restored if renaming fails."""
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
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
    if path.exists() and not overwrite:
        raise RunFolderError(f"{path} already exists. Choose another name, or allow overwriting.")
    if path.exists() and marker is not None:
        if not path.is_dir() or (any(path.iterdir()) and not (path / marker).exists()):
            raise RunFolderError(f"{path} has no {marker}, so it is not replaced. Choose another name.")


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name, then rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors under a temporary name, then rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary)
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        PosteriorError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PosteriorError(f"{path} is missing. Check that {path.parent} is the right folder.") from error
    except (OSError, ValueError) as error:
        raise PosteriorError(f"{path} is damaged ({error}). Restore it, or run again.") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read safetensors.

    Raises:
        PosteriorError: the file is missing or damaged.
    """
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise PosteriorError(f"{path} is missing. Check that {path.parent} is the right folder.") from error
    except (OSError, SafetensorError) as error:
        raise PosteriorError(f"{path} is damaged ({error}). Restore it, or run again.") from error

"""Limits on files that others may have made: what kind of file, how long, how deeply nested, how many values."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["check_nesting", "check_regular", "read_limited"]

MAX_DEPTH = 50
"""The functions that check, merge and copy nested values are recursive."""


def check_regular(path: Path) -> Path:
    """Return the path of a file.

    Raises:
        OSError: there is no such file.
        ValueError: it is a pipe or a device, which may be endless, or a folder.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("expected a file, got a folder, a pipe or a device")
    return path


def read_limited(path: Path, max_bytes: int) -> str:
    """Read a text file in UTF-8.

    Raises:
        OSError: the file cannot be read.
        ValueError: see :func:`check_regular`; or it is longer than ``max_bytes`` or not UTF-8.
    """
    with check_regular(path).open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"expected at most {max_bytes:,} bytes, got more")
    return content.decode("utf-8")


def check_nesting(value: Any, max_values: float = float("inf")) -> None:
    """Check that a value is neither too deeply nested nor, with its aliases written out, too large.

    A YAML file of 300 bytes can hold a list of references to a list of references ... of 10^9 values in all.

    Args:
        value: a scalar, or mappings and lists of values. It may contain itself.
        max_values: maximum number of values in it.

    Raises:
        ValueError: it is nested more than 50 levels deep, or has more values.
    """
    size, _ = _size_and_depth(value, 0, {})
    if size > max_values:
        raise ValueError(f"expected at most {max_values:,} values, got {size:,} (with each alias written out)")


def _size_and_depth(value: Any, level: int, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return the size and the depth of a value; ``known`` are those of mappings and lists visited before."""
    if not isinstance(value, Mapping | list | tuple | set):
        return 1, 0
    size, depth = known.get(id(value), (1, 0))
    if level + depth >= MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    if id(value) not in known:
        children = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
        for child in children:
            inner_size, inner_depth = _size_and_depth(child, level + 1, known)
            size, depth = size + inner_size, max(depth, inner_depth + 1)
        known[id(value)] = size, depth
    return size, depth

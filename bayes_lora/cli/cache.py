"""Show and clear what is kept on disk for later runs."""

from __future__ import annotations

import shutil
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayes_lora.cli.console import print_line, print_remark, print_tables
from bayes_lora.cli.options import Table
from bayes_lora.errors import ConfigError
from bayes_lora.utils.tables import Column, ResultTable, TableFormat

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["cache"]

KINDS = ("states", "tokens", "forwards", "arithmetic")
"""Folders of what is kept: hidden states and features, tokens, and which models passed the check of their forward."""


def cache(
    clear: Annotated[
        bool, typer.Option("--clear", help="Delete hidden states, features, tokens, checks and rates.")
    ] = False,
    folder: Annotated[Path | None, typer.Option(help="By default $BAYES_LORA_CACHE or ~/.cache/bayes_lora.")] = None,
    table: Table = TableFormat.TEXT,
) -> None:
    """Show what is kept on disk for later runs: hidden states and features, tokens, passed checks, rates of CPUs.

    Example: `bayes-lora cache`, or `bayes-lora cache --clear`
    """
    from bayes_lora.lm.model_files import cache_folder

    folder = cache_folder() if folder is None else folder
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--folder {folder}: expected a folder, but it is a file.")
    if clear and table is not TableFormat.TEXT:
        raise ConfigError(f"--clear prints no table, got --table {table}. Leave out one of them.")
    if clear:
        freed = sum(_size(folder / kind) for kind in KINDS)
        for kind in KINDS:
            if (folder / kind).is_dir():
                _delete((folder / kind).resolve())
        print_line(f"{folder}: deleted {_shown(freed)}")
        return
    print_tables([_contents(folder)], table)
    print_remark(str(folder), table)


def _contents(folder: Path) -> ResultTable:
    """Return a table of what is kept in a folder."""
    from bayes_lora.lm.tensor_store import entries

    rows = []
    for entry in entries(folder / "states"):
        row = {name: entry.about.get(name) for name in ("what", "model", "layer")}
        used = datetime.fromtimestamp(entry.last_used).astimezone().isoformat(timespec="seconds")
        rows.append(row | {"count": None, "last_used": used, "size_bytes": entry.num_bytes})
    tokens = sum(path.is_dir() for path in (folder / "tokens").glob("*"))
    checks = len(list((folder / "forwards").glob("*.json")))
    for what, count, kind in (
        ("tokens", tokens, "tokens"),
        ("passed checks", checks, "forwards"),
        ("rates of CPUs", None, "arithmetic"),
    ):
        about = {"what": what, "model": None, "layer": None, "count": count, "last_used": None}
        rows.append(about | {"size_bytes": _size(folder / kind)})
    columns = [
        Column("what", lambda row: str(row["what"]), is_number=False),
        Column("model", _model, is_number=False),
        Column("layer", lambda row: "" if row["layer"] is None else str(row["layer"]), optional=1),
        Column("last used", lambda row: (row["last_used"] or "")[:16].replace("T", " "), optional=2),
        Column("size", lambda row: _shown(row["size_bytes"])),
    ]
    return ResultTable("cache", columns, rows)


def _model(row: Mapping[str, Any]) -> str:
    if row["count"] is None:
        return str(row["model"] or "")
    return f"{row['count']} {'collections' if row['what'] == 'tokens' else 'models'}"


def _delete(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be deleted: {error}.") from error


def _size(folder: Path) -> int:
    """Return the size on disk; LMDB's files are sparse."""
    return sum(512 * path.stat().st_blocks for path in folder.rglob("*") if path.is_file())


def _shown(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size < 2**30 else f"{size / 2**30:.2f} GiB"

"""Show and clear what is kept on disk for later runs."""

from __future__ import annotations

import shutil
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from bayes_lora.cli.console import out, print_line
from bayes_lora.errors import ConfigError

__all__ = ["cache"]

KINDS = ("states", "tokens", "forwards", "arithmetic")
"""Folders of what is kept: hidden states and features, tokens, and which models passed the check of their forward."""


def cache(
    clear: Annotated[
        bool, typer.Option("--clear", help="Delete hidden states, features, tokens, checks and rates.")
    ] = False,
    folder: Annotated[Path | None, typer.Option(help="By default $BAYES_LORA_CACHE or ~/.cache/bayes_lora.")] = None,
) -> None:
    """Show what is kept on disk for later runs: hidden states and features, tokens, passed checks, rates of CPUs.

    Example: `bayes-lora cache`, or `bayes-lora cache --clear`
    """
    from rich.table import Table

    from bayes_lora.lm.model_files import cache_folder
    from bayes_lora.lm.tensor_store import entries

    folder = cache_folder() if folder is None else folder
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--folder {folder}: expected a folder, but it is a file.")
    tokens = sorted(path for path in (folder / "tokens").glob("*") if path.is_dir())
    if clear:
        freed = sum(_size(folder / kind) for kind in KINDS)
        for kind in KINDS:
            if (folder / kind).is_dir():
                _delete((folder / kind).resolve())
        print_line(f"{folder}: deleted {_shown(freed)}")
        return
    table = Table("what", "model", "layer", "last used", "size")
    for entry in entries(folder / "states"):
        model, layer = (str(entry.about.get(name, "")) for name in ("model", "layer"))
        used = datetime.fromtimestamp(entry.last_used).strftime("%Y-%m-%d %H:%M")
        table.add_row(str(entry.about.get("what")), model, layer, used, _shown(entry.num_bytes))
    table.add_row("tokens", f"{len(tokens)} collections", "", "", _shown(_size(folder / "tokens")))
    checks = list((folder / "forwards").glob("*.json"))
    table.add_row("passed checks", f"{len(checks)} models", "", "", _shown(_size(folder / "forwards")))
    table.add_row("rates of CPUs", "", "", "", _shown(_size(folder / "arithmetic")))
    out.print(table)
    print_line(str(folder))


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

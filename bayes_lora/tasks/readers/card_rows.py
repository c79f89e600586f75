"""Rows of a card: from local files, or from a data set of the Hugging Face hub."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bayes_lora.errors import TaskError
from bayes_lora.tasks.readers.card import Card
from bayes_lora.tasks.readers.table_cells import DELIMITERS
from bayes_lora.tasks.readers.table_rows import Table, read_table

__all__ = ["CardRows", "card_tables", "hub_rows", "local_rows"]


class CardRows(NamedTuple):
    """Rows of a split: columns in order, and the cells of each row with the place that error messages begin with."""

    source: str
    columns: list[str]
    cells: Sequence[Mapping[str, Any]]
    places: Sequence[str]


def card_tables(card: Card) -> dict[str, Table]:
    """Read the local files of a card, by split.

    Raises:
        TaskError: a file is missing or malformed.
    """
    tables = {}
    for split, name in card.split_files.items():
        path = card.folder / name
        if not path.is_file():
            raise TaskError(f"{path}: there is no such file; relative paths begin at the card's folder")
        tables[split] = read_table(path, delimiter=card.delimiter)
    return tables


def local_rows(tables: Mapping[str, Table], split: str) -> CardRows:
    """Select the rows of a split, which is spelled as for `datasets.load_dataset`; an empty cell of CSV is missing.

    Raises:
        TaskError: there is no such split, or a table has no rows.
    """
    from datasets import ReadInstruction

    rows = {name: table.filled_rows() for name, table in tables.items()}
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({name: len(found) for name, found in rows.items()})
    except ValueError as error:
        raise TaskError(f"split {split!r} cannot be read: {error}") from error
    chosen = [row for part in parts for row in rows[part.splitname][part.from_ : part.to]]
    columns = list(dict.fromkeys(name for part in parts for name in tables[part.splitname].columns))
    empty = "" if any(table.path.suffix.lower() in DELIMITERS for table in tables.values()) else None
    cells = [{name: None if (cell := row.get(name)) == empty else cell for name in columns} for _, row in chosen]
    source = f"{split} of {', '.join(str(table.path) for table in tables.values())}"
    return CardRows(source, columns, cells, [place for place, _ in chosen])


def hub_rows(card: Card, split: str, cache_dir: str | Path | None) -> CardRows:
    """Load the rows of a split from the hub.

    Raises:
        TaskError: `datasets` cannot load them; its error is the cause.
    """
    import datasets

    source = f"{split} of {card.path}"
    with _quiet():
        try:
            rows = datasets.load_dataset(
                card.path, card.config, split=split, revision=card.revision, cache_dir=cache_dir and str(cache_dir)
            )
        except Exception as error:  # of Arrow, the hub, the file system
            cause = error.__cause__ or error  # `datasets` wraps some errors in another one
            problem = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
            cure = "see `path`, `config`, `split`, `revision`, and whether the hub can be reached"
            raise TaskError(f"{source} cannot be read: {problem} ({cure})") from error
    return CardRows(source, rows.column_names, rows, [f"{source}, row {number}" for number in range(1, len(rows) + 1)])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep `datasets` from drawing progress bars, and from logging errors that are raised anyway."""
    import datasets

    bars, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()

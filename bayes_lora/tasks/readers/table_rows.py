"""Tables: the rows of CSV, TSV, JSON-lines, JSON and Parquet files, read once and by one set of rules.

- Text files are UTF-8 (:mod:`bayes_lora.tasks.readers.text_files`).
- The first row of a CSV or TSV file names the columns (:mod:`bayes_lora.tasks.readers.table_cells`).
- A line of a JSON-lines file, or an element of the list in a JSON file, is an object.
- Each row has a place, which error messages begin with: ``<file>:<line>``, the line on which the row begins, or
  ``<file>, row <number>`` if the file has no lines.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bayes_lora.errors import TaskError, did_you_mean
from bayes_lora.tasks.readers.parquet_files import read_parquet
from bayes_lora.tasks.readers.table_cells import DELIMITERS, Cells
from bayes_lora.tasks.readers.text_files import MAX_LINE_BYTES, MAX_LISTED, lines, listed, read_text

__all__ = ["TABLES", "Row", "Table", "at", "filled", "is_blank", "read_table", "scan_table"]

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
SPREADSHEETS = (".xlsx", ".xls", ".ods")
MAX_CELL = MAX_LINE_BYTES
"""Characters of a cell: a quote that is left open must not swallow a large file."""

Row = tuple[str, dict[str, Any]]


@dataclass
class Table:
    """A table's file.

    Attributes:
        path: the file.
        columns: their names, in order.
        rows: the place and the cells of each row.
        delimiter: separates the cells of a CSV or TSV file; None for other files.
        error: why reading ended early, if it did.
    """

    path: Path
    columns: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    delimiter: str | None = None
    error: TaskError | None = None

    def require(self, column: str, cure: str) -> None:
        """Raise `TaskError` if the table lacks a column."""
        if column not in self.columns:
            near = did_you_mean(column, self.columns[:MAX_LISTED])
            raise TaskError(f"{self.path}:1: column {column!r} is missing; got {listed(self.columns)}{near}; {cure}")

    def filled_rows(self) -> list[Row]:
        """Return the rows without those whose cells are all blank; raise `TaskError` if none is left."""
        rows = [row for row in self.rows if not all(map(is_blank, row[1].values()))]
        if not rows:
            raise TaskError(f"{self.path}: expected rows, got none; columns are {listed(self.columns)}; add rows")
        return rows


def read_table(source: str | Path | Table, suffix: str | None = None, delimiter: str | None = None) -> Table:
    """Read a table, or take one that :func:`scan_table` has read.

    Args:
        source: the file or the table.
        suffix: the kind of the file, such as ``.csv``; by default that of its name.
        delimiter: separates the cells of a CSV or TSV file; by default detected.

    Raises:
        TaskError: the file is of no known kind or cannot be read, or a row is malformed.
    """
    table = source if isinstance(source, Table) else scan_table(source, suffix, delimiter)
    if table.error is not None:
        raise table.error
    return table


def scan_table(path: str | Path, suffix: str | None = None, delimiter: str | None = None) -> Table:
    """Read a table as :func:`read_table` does, but keep an error, and what was read before it, instead of raising."""
    table = Table(Path(path))
    suffix = suffix or table.path.suffix.lower()
    limit = csv.field_size_limit(MAX_CELL)
    try:
        if suffix in DELIMITERS:
            cells = Cells(table.path, suffix, delimiter)
            table.delimiter = cells.delimiter
            try:
                table.rows.extend(cells)
            finally:
                table.columns = cells.columns
        elif suffix == ".parquet":
            table.columns, read = read_parquet(table.path)
            table.rows.extend((f"{path}, row {number}", row) for number, row in enumerate(read, start=1))
        elif suffix in (".jsonl", ".json"):
            table.rows.extend(_json_lines(table.path) if suffix == ".jsonl" else _json_list(table.path))
        else:
            cure = "save the sheet as CSV in UTF-8" if suffix in SPREADSHEETS else "check the file's name"
            raise TaskError(f"{path}: expected a table, which is a file {', '.join(TABLES)}, got {suffix!r}; {cure}")
    except TaskError as error:
        table.error = error
    finally:
        csv.field_size_limit(limit)
    if suffix in (".jsonl", ".json"):
        table.columns = list(dict.fromkeys(name for _, row in table.rows for name in row))
    return table


@contextmanager
def at(place: str) -> Iterator[None]:
    """Let error messages begin with a row's place."""
    try:
        yield
    except TaskError as error:
        raise TaskError(f"{place}: {error}") from error.__cause__


def is_blank(value: object) -> bool:
    """Whether a cell is empty: no value, not a number, or a text of spaces."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def filled(row: Mapping[str, Any], columns: list[str], options: str | None) -> dict[str, Any]:
    """Return a row's cells with empty texts for what is missing.

    Args:
        row: its cells by column.
        columns: the table's columns, which a JSON object may lack.
        options: the column of options, if any: a text in it becomes the list that it spells in JSON, or between ``|``.
    """
    cells = {name: "" if is_blank(value := row.get(name)) else value for name in columns}
    if options is not None and isinstance(text := cells.get(options), str):
        cells[options] = _divided(text)
    return cells


def _divided(text: str) -> list[Any]:
    if text.startswith("["):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, list):
            return found
    return [part.strip() for part in text.split("|")] if text else []


def _json_lines(path: Path) -> Iterator[Row]:
    for place, line in lines(path, "jsonl", "one JSON object a line"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TaskError(f"{place}: broken JSON ({error}); expected one whole object on this line") from None
        yield place, _object(place, record)


def _json_list(path: Path) -> Iterator[Row]:
    """Yield the objects of a list, or of the lines of a file that is no list."""
    text = read_text(path, "json")
    if not text.lstrip().startswith("["):
        yield from _json_lines(path)
        return
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{path}: broken JSON ({error}); expected one whole list of objects") from None
    for number, record in enumerate(records, start=1):
        place = f"{path}, row {number}"
        yield place, _object(place, record)


def _object(place: str, record: object) -> dict[str, Any]:
    if not isinstance(record, dict):
        expected = "an object with named fields such as `input`, `output`, `options`"
        raise TaskError(f"{place}: expected {expected}; got {type(record).__name__}")
    return record

"""Rows of a table of a user's own: a CSV, TSV, JSON-lines or Parquet file.

Cells of CSV and TSV files are texts, as they stand; rows whose cells are all blank are passed over. Each row comes with
the place that a message names, ``<file>:<line>``, or ``<file>, row <number>`` of a Parquet file.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bayes_lora.errors import TaskError
from bayes_lora.tasks.readers.text_files import json_object, lines, listed, read_table

__all__ = ["SPREADSHEETS", "TABLES", "Rows", "at", "filled", "first_cells", "first_record", "is_blank", "read_rows"]

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
SPREADSHEETS = (".xlsx", ".xls", ".ods")
DELIMITERS = {".csv": ",;\t", ".tsv": "\t"}


class Rows(NamedTuple):
    """Column names in order, each row with its place, and what divides cells where the file's name does not say so."""

    columns: list[str]
    rows: list[tuple[str, dict[str, Any]]]
    delimiter: str | None = None


def read_rows(path: str | Path) -> Rows:
    """Read all rows of a table, in order.

    A CSV file whose first line holds no comma, but semicolons or tabs, is divided at these.

    Raises:
        TaskError: the file is of no known kind or cannot be read, has no row, or a row is malformed.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in TABLES:
        cure = "save the sheet as CSV in UTF-8" if suffix in SPREADSHEETS else "check the file's name"
        raise TaskError(f"{path}: expected a table, which is a file {', '.join(TABLES)}, got {suffix!r}; {cure}")
    read = {".jsonl": _json_lines, ".parquet": _parquet}.get(suffix, _cells)
    table = read(path)
    rows = [(place, row) for place, row in table.rows if not all(is_blank(value) for value in row.values())]
    if not rows:
        raise TaskError(f"{path}: expected rows, got none; columns are {listed(table.columns)}; add rows")
    return table._replace(rows=rows)


@contextmanager
def at(place: str) -> Iterator[None]:
    """Let messages begin with a row's place."""
    try:
        yield
    except TaskError as error:
        raise TaskError(f"{place}: {error}") from None


def is_blank(value: object) -> bool:
    """Whether a cell holds nothing: no value, not a number, or a text of spaces."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def filled(row: Mapping[str, Any], label: str | None, options: str | None) -> dict[str, Any]:
    """Return a row without missing values.

    Args:
        row: its cells by column.
        label: the column of the answer, which then has no spaces around it.
        options: the column of options, which then is a list: what a text holds in JSON, or divided by ``|``.
    """
    cells = {name: "" if is_blank(value) else value for name, value in row.items()}
    if label is not None and isinstance(text := cells.get(label), str):
        cells[label] = text.strip()
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


def first_cells(path: Path) -> list[str]:
    """The column names of a CSV or TSV file, as far as its first line has them; none where it cannot be read."""
    try:
        _, line = next(lines(path, "table", "a first row that names the columns"))
        return [cell.strip() for cell in next(csv.reader([line], delimiter=_delimiter(path, line)), [])]
    except (TaskError, csv.Error):
        return []


def first_record(path: Path) -> dict[str, Any] | None:
    """The object on the first line of a JSON-lines file; None where there is none, or it cannot be read."""
    try:
        _, line = next(lines(path, "jsonl", "one JSON object a line"))
        record = json.loads(line)
    except (TaskError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _cells(path: Path) -> Rows:
    _, line = next(lines(path, "table", "a first row that names the columns"))
    delimiter = _delimiter(path, line)
    table = read_table(path, delimiter)
    rows = [(place, dict[str, Any](cells)) for place, cells in table.rows]
    return Rows(table.header, rows, None if delimiter == DELIMITERS[path.suffix.lower()][0] else delimiter)


def _delimiter(path: Path, line: str) -> str:
    """The first of those that a file of this kind may have which its first line holds."""
    known = DELIMITERS[path.suffix.lower()]
    return next((delimiter for delimiter in known if delimiter in line), known[0])


def _json_lines(path: Path) -> Rows:
    rows: list[tuple[str, dict[str, Any]]] = []
    for place, line in lines(path, "jsonl", "one JSON object a line"):
        with at(place):
            rows.append((place, json_object(line, "an object whose keys are the columns")))
    columns = list(dict.fromkeys(name for _, row in rows for name in row))
    return Rows(columns, [(place, {name: row.get(name) for name in columns}) for place, row in rows])


def _parquet(path: Path) -> Rows:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = list(file.schema_arrow.names)
            rows = list(_numbered(path, file))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise TaskError(f"{path}: expected a Parquet file that can be read, got: {reason}; write it anew") from error
    if len(set(columns)) < len(columns):
        raise TaskError(f"{path}: expected columns of different names, got {listed(columns)}; rename one")
    return Rows(columns, rows)


def _numbered(path: Path, file: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for batch in file.iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield f"{path}, row {number}", row

"""Reader of tables of a user's own.

Columns are given or guessed (:mod:`bayes_lora.tasks.readers.table_columns`); then rows are read as by the card
(:class:`bayes_lora.tasks.Card`) that says the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bayes_lora.errors import ConfigError, TaskError
from bayes_lora.tasks.readers.card_examples import example_of, input_of
from bayes_lora.tasks.readers.table_columns import Columns, find_columns, label_text
from bayes_lora.tasks.readers.table_rows import at, filled, is_blank, read_rows
from bayes_lora.tasks.readers.text_files import short
from bayes_lora.tasks.task import Example, Task

__all__ = ["load_table"]

Cells = Mapping[str, Any]
MISSING = "the value is missing; fill it in, or remove the row"


def load_table(
    path: str | Path,
    *,
    input: str | None = None,
    label: str | None = None,
    options: Sequence[str] | None = None,
    on_columns: Callable[[Path, Columns], None] | None = None,
) -> Task:
    """Load the task of a CSV, TSV, JSON-lines or Parquet file; support holds all its rows, in order.

    Args:
        path: the file, from which the task has its name.
        input: the column of the input, or a template with columns in braces; by default guessed.
        label: the column of the answer; by default guessed.
        options: the options of all rows, in order; by default those of a column ``options`` (a list, or texts with
            ``|`` between), else the distinct answers in alphabetical order, else none: answers are then free text.
        on_columns: is told which columns were taken.

    Raises:
        TaskError: the file cannot be read, a column is missing or cannot be guessed, or a row does not fit; the message
            names the row and the column.
    """
    path = Path(path)
    table = read_rows(path)
    columns = find_columns(path, table, input, label, options)
    if on_columns is not None:
        on_columns(path, columns)
    convert = _free_form(columns) if columns.options is None else _multiple_choice(path, columns)
    examples = []
    for index, (place, row) in enumerate(table.rows):
        with at(place):
            if is_blank(row[columns.label]):
                raise TaskError(f"column {columns.label!r}: {MISSING}")
            examples.append(convert(filled(row, columns.label, columns.own), index))
    return Task(path.stem, tuple(examples))


def _multiple_choice(path: Path, columns: Columns) -> Callable[[Cells, int], Example]:
    try:
        card = columns.card(path)
    except ConfigError as error:
        raise TaskError(f"{path}: {str(error).rstrip('.')}") from None
    kinds: dict[str, int] = {}

    def convert(row: Cells, index: int) -> Example:
        example = example_of(card, row, kinds, index)
        assert example is not None  # `labels` leaves nothing out
        return example

    return convert


def _free_form(columns: Columns) -> Callable[[Cells, int], Example]:
    def convert(row: Cells, _: int) -> Example:
        answer = row[columns.label]
        references = answer if isinstance(answer, list) else [answer]
        if not references or any(is_blank(text) for text in references):
            raise TaskError(f"column {columns.label!r}: {MISSING}")
        if not all(isinstance(text, (str, int, float)) for text in references):
            raise TaskError(f"column {columns.label!r}: expected a text or a list of texts, got {short(repr(answer))}")
        return Example(input_of(columns.input, row), references=tuple(map(label_text, references)))

    return convert

"""Reader of tables of a user's own, as tasks to learn or as questions to answer.

Columns are given or guessed (:mod:`bayes_lora.tasks.table_columns`); then rows are read as by the card
(:class:`bayes_lora.tasks.Card`) that says the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bayes_lora.errors import ConfigError, TaskError
from bayes_lora.tasks.card_file import RowOptions
from bayes_lora.tasks.cards import example_of, input_of, row_texts
from bayes_lora.tasks.table_columns import LABELS, OPTIONS, Columns, find_columns, find_input, label_text
from bayes_lora.tasks.table_rows import is_blank, read_rows
from bayes_lora.tasks.task import Example, Task
from bayes_lora.tasks.text_files import listed, short

__all__ = ["load_table", "read_table_questions"]

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
        with _at(place):
            if is_blank(row[columns.label]):
                raise TaskError(f"column {columns.label!r}: {MISSING}")
            examples.append(convert(_filled(row, columns.options, columns.label), index))
    return Task(path.stem, tuple(examples))


def read_table_questions(
    path: str | Path,
    *,
    input: str | None = None,
    label: str | None = None,
    options: tuple[str, ...] | RowOptions | None = None,
) -> list[Example]:
    """Read the rows of a table as questions, in order: ``answer`` is 0, and a column of answers is not read.

    Args:
        path: the file.
        input: the column of the input, or a template; by default guessed.
        label: the column of the answer, if there is one; by default guessed.
        options: of all rows, or the columns in which each row has its own; by default the column ``options``.

    Raises:
        TaskError: as `load_table`, or there are no options.
    """
    path = Path(path)
    table = read_rows(path)
    if options is None:
        own = [name for name in table.columns if name.lower() == OPTIONS]
        if not own:
            raise TaskError(
                f"{path}: no column `options`; columns are {listed(table.columns)}; add one, with a list a row"
            )
        options = RowOptions(own[0])
    holders = [options.column or "", *(options.columns or ())] if isinstance(options, RowOptions) else []
    for name in filter(None, holders):
        if name.partition(".")[0] not in table.columns:
            raise TaskError(f"{path}: no column {short(name)}, of options; columns are {listed(table.columns)}")
    answers = [name for name in table.columns if name == label or (label is None and name.lower() in LABELS)]
    template = find_input(path, table, input, [*answers, *holders])
    questions = []
    for place, row in table.rows:
        with _at(place):
            cells = _filled(row, options)
            texts = row_texts(options, cells) if isinstance(options, RowOptions) else options
            questions.append(Example(input_of(template, cells), tuple(texts)))
    return questions


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


def _filled(row: Cells, options: object, label: str | None = None) -> dict[str, Any]:
    """Return a row without missing values, in which options that one text holds are a list."""
    cells = {name: "" if is_blank(value) else value for name, value in row.items()}
    if label is not None and isinstance(cells[label], str):
        cells[label] = cells[label].strip()
    if isinstance(options, RowOptions) and options.column in cells and isinstance(cells[options.column], str):
        cells[options.column] = _divided(options.column, cells[options.column])
    return cells


def _divided(name: str, text: str) -> list[Any]:
    if text.startswith("["):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, list):
            return found
    return [part.strip() for part in text.split("|")] if text else []


@contextmanager
def _at(place: str) -> Iterator[None]:
    try:
        yield
    except TaskError as error:
        raise TaskError(f"{place}: {error}") from None

"""Reader of tables of a user's own: read by a card that is guessed (:mod:`bayes_lora.tasks.readers.table_columns`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bayes_lora.errors import TaskError
from bayes_lora.tasks.readers.card import Card, RowOptions
from bayes_lora.tasks.readers.card_examples import example_of
from bayes_lora.tasks.readers.table_answers import MAX_OPTIONS, check_filled, label_text
from bayes_lora.tasks.readers.table_columns import table_card
from bayes_lora.tasks.readers.table_description import describe
from bayes_lora.tasks.readers.table_rows import Table, at, filled, is_blank, read_table
from bayes_lora.tasks.readers.text_files import short, warn_caller
from bayes_lora.tasks.task import Example, Task

__all__ = ["load_table"]


def load_table(
    path: str | Path | Table,
    *,
    input: str | None = None,
    label: str | None = None,
    options: Sequence[str] | None = None,
    max_options: int = MAX_OPTIONS,
    on_card: Callable[[Card, str], None] | None = None,
) -> Task:
    """Load the task of a CSV, TSV, JSON-lines or Parquet file; support holds all its rows, in order.

    Args:
        path: the file, from which the task has its name, or its table.
        input: the column of the input, or a template with columns in braces; by default guessed.
        label: the column of the answer; by default guessed.
        options: the options of all rows, in order; by default those of a column ``options`` (a list, or texts with
            ``|`` between), else the distinct answers in alphabetical order, else none: answers are then free text.
        max_options: maximum number of distinct answers that become options; above it they are free text.
        on_card: is called with the card by which the table is read, and a line that describes it. Without it, the
            line is a warning if something was decided: columns left out that are not ids, answers that are free text
            because there are many, a delimiter that is not the suffix's own.

    Raises:
        TaskError: the file cannot be read, a column is missing or cannot be guessed, or a row does not fit; the message
            names the row and the column.
    """
    table = read_table(path)
    rows = table.filled_rows()
    card = table_card(table, rows, input, label, options, max_options)
    line, decided = describe(card, table, rows, input, max_options)
    if on_card is not None:
        on_card(card, line)
    elif decided:
        warn_caller(f"{table.path}: {line}")
    check_filled(rows, card.label)
    kinds: dict[str, str] = {}
    examples: list[Example] = []
    for place, row in rows:
        with at(place):
            example = example_of(card, _cells(card, row, table.columns), kinds, place)
        if example is not None:  # `labels` of a guessed card leave no row out
            examples.append(example)
    return Task(card.name, tuple(examples))


def _cells(card: Card, row: Mapping[str, Any], columns: list[str]) -> dict[str, Any]:
    """Return what a card expects of a row: options as a list, answers without the spaces around them."""
    answer = row.get(card.label)
    answers = answer if isinstance(answer, list) else [answer]
    free = card.options is None
    if is_blank(answer) or (free and (not answers or any(map(is_blank, answers)))):
        raise TaskError(f"column {card.label!r}: the value is missing; fill it in, or remove the row")
    if free and not all(isinstance(text, (str, int, float)) for text in answers):
        problem = f"expected a text or a list of texts, got {short(repr(answer))}"
        raise TaskError(f"column {card.label!r}: {problem}; write it as text")
    cells = filled(row, columns, card.options.column if isinstance(card.options, RowOptions) else None)
    if free:
        cells[card.label] = [label_text(text) for text in answers]
    elif isinstance(answer, str):
        cells[card.label] = answer.strip()
    return cells

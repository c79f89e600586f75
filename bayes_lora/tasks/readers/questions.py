"""Questions to predict, from a table without answers: read by the card of the task that was adapted to."""

from __future__ import annotations

from pathlib import Path

from bayes_lora.errors import TaskError
from bayes_lora.tasks.readers.card import Card, RowOptions
from bayes_lora.tasks.readers.card_examples import input_of, row_texts
from bayes_lora.tasks.readers.table_columns import LABELS, OPTIONS, find_input, plain
from bayes_lora.tasks.readers.table_rows import Table, at, filled, read_table
from bayes_lora.tasks.readers.text_files import listed
from bayes_lora.tasks.task import Example, Task

__all__ = ["OWN_OPTIONS", "question_card", "read_table_questions"]

OWN_OPTIONS = Card("questions", "", RowOptions(OPTIONS), "")
"""The input is guessed, and the column ``options`` holds the options of each row."""


def question_card(task: Task) -> Card:
    """Make a card for questions of a task that was read without one: with its options if all examples share them."""
    if task.free_form:
        return Card(task.name, "", None, "")
    options = task.examples[0].options
    fixed = all(example.options == options for example in task.examples)
    return Card(task.name, "", options if fixed else OWN_OPTIONS.options, "")


def read_table_questions(path: str | Path | Table, card: Card = OWN_OPTIONS) -> list[Example] | list[str]:
    """Read the rows of a table as questions, in order.

    Args:
        path: a CSV, TSV, JSON-lines or Parquet file, or its table.
        card: says how. Of a table without answers; where its input is empty, that is guessed from the columns.

    Returns:
        Examples whose ``answer`` is 0, or inputs alone if answers are free text.

    Raises:
        TaskError: the file cannot be read, a column is missing or cannot be guessed, or a row does not fit; the message
            names the row and the column.
    """
    table = read_table(path)
    rows = table.filled_rows()
    options = _present(table, card.options) if isinstance(card.options, RowOptions) else card.options
    own = options if isinstance(options, RowOptions) else None
    answers = [name for name in table.columns if name == card.label or (not card.label and plain(name) in LABELS)]
    label = answers[0] if len(answers) == 1 else None
    template = find_input(table, rows, card.input, [*answers, *(own.names if own else [])], label)
    inputs, examples = [], []
    for place, row in rows:
        with at(place):
            cells = filled(row, table.columns, own.column if own else None)
            inputs.append(input_of(template, cells))
            if options is not None:
                texts = row_texts(options, cells) if isinstance(options, RowOptions) else options
                examples.append(Example(inputs[-1], tuple(texts)))
    return inputs if options is None else examples


def _present(table: Table, options: RowOptions) -> RowOptions:
    """Return the columns of options as the table spells them, whatever the case."""
    names = []
    for name in options.names:
        spelled = {name, name.partition(".")[0]} & {*table.columns}
        alike = [column for column in table.columns if plain(column) == plain(name)]
        if not (spelled or alike):
            columns = f"columns are {listed(table.columns)}"
            raise TaskError(f"{table.path}: no column `{name}`, of options; {columns}; add one, with a list a row")
        names.append(name if spelled else alike[0])
    return RowOptions(names[0]) if options.column is not None else RowOptions(columns=tuple(names))

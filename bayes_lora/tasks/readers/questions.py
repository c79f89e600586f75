"""Questions to predict, from a table without answers: read as the rows were from which the task was learnt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayes_lora.errors import TaskError
from bayes_lora.tasks.readers.card import Card, RowOptions
from bayes_lora.tasks.readers.card_examples import input_of, row_texts
from bayes_lora.tasks.readers.table_columns import LABELS, OPTIONS, Columns, find_input
from bayes_lora.tasks.readers.table_rows import Rows, at, filled, read_rows
from bayes_lora.tasks.readers.text_files import listed, short
from bayes_lora.tasks.task import Example, Task

__all__ = ["QuestionForm", "read_table_questions"]


@dataclass(frozen=True)
class QuestionForm:
    """How questions of a task are read from a table.

    Attributes:
        input: template of the input; None guesses it.
        label: column of the answers, which is no input; None guesses it.
        options: of all rows, or where a row has its own; empty where answers are free text; None takes the column
            ``options``.
    """

    input: str | None = None
    label: str | None = None
    options: tuple[str, ...] | RowOptions | None = None

    @classmethod
    def of(cls, task: Task, source: Columns | Card | None = None) -> QuestionForm:
        """Tell from a task, and from the table's columns or the card that it was read by."""
        if source is not None:
            return cls(source.input, source.label, () if task.free_form else source.options)
        if task.free_form:
            return cls(options=())
        first = task.examples[0].options
        return cls(options=first if all(example.options == first for example in task.examples) else None)

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        options: Any = self.options
        if isinstance(options, RowOptions):
            options = {"column": options.column} if options.column else {"columns": list(options.columns or ())}
        return {"input": self.input, "label": self.label, "options": list(options) if options == () else options}

    @classmethod
    def from_dict(cls, values: Any) -> QuestionForm:
        """Return what :meth:`to_dict` was given.

        Raises:
            ValueError: it is something else.
        """
        if not isinstance(values, Mapping) or values.keys() != {"input", "label", "options"}:
            raise ValueError("expected input, label and options")
        input, label, options = values["input"], values["label"], values["options"]
        if not all(text is None or isinstance(text, str) for text in (input, label)):
            raise ValueError("expected texts input and label")
        if isinstance(options, dict):
            columns = options.get("columns")
            return cls(input, label, RowOptions(options.get("column"), columns and tuple(columns)))
        if options is not None and not (isinstance(options, list) and all(isinstance(text, str) for text in options)):
            raise ValueError("expected a list of texts options")
        return cls(input, label, None if options is None else tuple(options))


def read_table_questions(path: str | Path, form: QuestionForm | None = None) -> list[Example] | list[str]:
    """Read the rows of a table as questions, in order.

    Args:
        path: a CSV, TSV, JSON-lines or Parquet file.
        form: how its rows are read; by default input and options are guessed from its columns.

    Returns:
        Examples whose ``answer`` is 0, or inputs alone where answers are free text.

    Raises:
        TaskError: the file cannot be read, a column is missing or cannot be guessed, or a row does not fit; the message
            names the row and the column.
    """
    form, path = form or QuestionForm(), Path(path)
    table = read_rows(path)
    options = _own_options(path, table) if form.options is None else form.options
    holders = _check_columns(path, table, options)
    answers = [name for name in table.columns if name == form.label or (not form.label and name.lower() in LABELS)]
    template = find_input(path, table, form.input, [*answers, *holders])
    inputs, examples = [], []
    for place, row in table.rows:
        with at(place):
            cells = filled(row, None, options.column if isinstance(options, RowOptions) else None)
            inputs.append(input_of(template, cells))
            if options:
                texts = row_texts(options, cells) if isinstance(options, RowOptions) else options
                examples.append(Example(inputs[-1], tuple(texts)))
    return examples if options else inputs


def _own_options(path: Path, table: Rows) -> RowOptions:
    own = [name for name in table.columns if name.lower() == OPTIONS]
    if not own:
        raise TaskError(f"{path}: no column `options`; columns are {listed(table.columns)}; add one, with a list a row")
    return RowOptions(own[0])


def _check_columns(path: Path, table: Rows, options: tuple[str, ...] | RowOptions) -> list[str]:
    """Return the columns that hold options, if rows have their own."""
    if not isinstance(options, RowOptions):
        return []
    holders = [options.column] if options.column is not None else list(options.columns or ())
    for name in holders:
        if name.partition(".")[0] not in table.columns and name not in table.columns:
            raise TaskError(f"{path}: no column {short(name)}, of options; columns are {listed(table.columns)}")
    return holders

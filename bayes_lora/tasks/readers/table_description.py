"""What is said of a table: by which columns it is read, what is left out, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bayes_lora.tasks.readers.card import Card, RowOptions, placeholders
from bayes_lora.tasks.readers.table_answers import (
    MAX_OPTIONS,
    answer_notes,
    distinct_answers,
    first_row_as_data,
    too_many,
)
from bayes_lora.tasks.readers.table_cells import DELIMITER_NAMES, DELIMITERS
from bayes_lora.tasks.readers.table_columns import SHOWN, column_leaks, left_out_columns, plain
from bayes_lora.tasks.readers.table_rows import Row, Table

__all__ = ["Description", "describe"]

FREE = ("answer", "output")
"""Names of columns whose answers are expected to differ from row to row."""


class Description(NamedTuple):
    """One line about a table.

    Attributes:
        line: how the table is read.
        decided: whether something was decided that the names of the columns and the suffix of the file do not say.
    """

    line: str
    decided: bool


def describe(
    card: Card, table: Table, rows: Sequence[Row], input: str | None = None, max_options: int = MAX_OPTIONS
) -> Description:
    """Describe how a table is read by a card that `table_card` has made with these arguments."""
    answers, decided = _answers(card, rows, max_options)
    if input:  # columns that the caller chose are not judged
        read = {name for column in card.columns for name in (column, column.partition(".")[0])}
        left_out = _listed([name for name in table.columns if name not in read])
        notes: list[str] = []
    else:
        left_out, notes = _left_out(card, table, rows)
    notes += answer_notes(rows, card.label)
    if table.delimiter and table.delimiter != DELIMITERS.get(table.path.suffix.lower(), ",")[0]:
        notes.append(f"cells are separated by {DELIMITER_NAMES.get(table.delimiter, repr(table.delimiter))}")
    if first_row_as_data(table, rows, [card.label]):
        notes.append(f"{card.label!r} is a name and a value of its column: if the first row is no header, add one")
    text = f"input is {card.input}, answers from {card.label}: {answers}{left_out}"
    line = "; ".join([text, *notes])
    line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)
    return Description(line, decided or bool(notes))


def _answers(card: Card, rows: Sequence[Row], max_options: int) -> tuple[str, bool]:
    """Describe the answers, and say whether this was decided by their number."""
    if isinstance(card.options, RowOptions):
        return f"one of the row's {', '.join(card.options.names)}", False
    if card.options is not None:
        more = f" and {len(card.options) - SHOWN} more" * (len(card.options) > SHOWN)
        return ", ".join(card.options[:SHOWN]) + more, False
    texts = distinct_answers(rows, card.label)
    reason = too_many(texts, len(rows), max_options)
    expected = plain(card.label) in FREE and texts is not None and 2 * len(texts) > len(rows)
    return ("free text, because " + reason if reason else "free text"), bool(reason) and not expected


def _left_out(card: Card, table: Table, rows: Sequence[Row]) -> tuple[str, list[str]]:
    """Return the list of ids that are not read, and a note for each other reason not to read columns."""
    options = card.options.names if isinstance(card.options, RowOptions) else []
    names = [name for name in table.columns if name not in (card.label, *options)]
    by_reason: dict[str, list[str]] = {}
    for name, reason in left_out_columns(rows, names, card.label).items():
        by_reason.setdefault(reason, []).append(name)
    notes = [
        f"not read: {', '.join(found[:SHOWN])}, because {reason.format('it' if len(found) == 1 else 'them')}"
        for reason, found in by_reason.items()
        if reason
    ]
    for name, kind in column_leaks(rows, placeholders(card.input), card.label).items():
        notes.append(kind.format(f"{name}, the only column left,"))
    return _listed(by_reason.get("", [])), notes


def _listed(names: Sequence[str]) -> str:
    return f"; not read: {', '.join(name or 'a column without a name' for name in names[:SHOWN])}" if names else ""

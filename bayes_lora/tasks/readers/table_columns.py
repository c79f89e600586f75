"""Which columns of a table are the input and the answer: as the caller says, or guessed from their names.

The answer is the one column named as in :data:`LABELS`, in any case. The input is the column that is left, or a line
``<name>: {<name>}`` of each that holds texts, if several are left; columns named as in :data:`IDS`, or with one of
:data:`ID_ENDS`, are not read. A
column named ``options`` holds the options of its row. Otherwise the options are the distinct answers in alphabetical
order; where these are more than :data:`MAX_OPTIONS`, or more than half of the rows, answers are free text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayes_lora.errors import ConfigError, TaskError, did_you_mean
from bayes_lora.tasks.readers.card import Card, RowOptions, key_of, placeholders
from bayes_lora.tasks.readers.table_rows import Rows, is_blank
from bayes_lora.tasks.readers.text_files import CannotScore, listed, short

__all__ = ["IDS", "LABELS", "MAX_OPTIONS", "OPTIONS", "Columns", "find_columns", "find_input", "label_text"]

LABELS = ("label", "output", "answer", "target", "class", "category", "sentiment", "intent", "gold")
IDS = ("", "id", "uid", "uuid", "guid", "idx", "index", "row", "nr", "unnamed: 0")
ID_ENDS = ("_id", " id")
OPTIONS = "options"
MAX_OPTIONS = 64
SHOWN, LONGEST_CARD = 10, 400


@dataclass(frozen=True)
class Columns:
    """How the rows of a table become examples.

    Attributes:
        input: template of the input, with columns in braces.
        label: column of the answer.
        options: of all rows, in order; or the column in which each row has its own; None where answers are free text.
        left_out: columns that are not read.
    """

    input: str
    label: str
    options: tuple[str, ...] | RowOptions | None
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Say it in one line."""
        if self.options is None:
            answers = "free text"
        elif isinstance(self.options, RowOptions):
            answers = f"one of the row's {self.options.column or ', '.join(self.options.columns or ())}"
        else:
            more = f" and {len(self.options) - SHOWN} more" * (len(self.options) > SHOWN)
            answers = ", ".join(self.options[:SHOWN]) + more
        not_read = f"; not read: {', '.join(self.left_out[:SHOWN])}" if self.left_out else ""
        text = f"input is {self.input}, answers from {self.label}: {answers}{not_read}"
        return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)

    @property
    def own(self) -> str | None:
        """The column in which a row has all its options."""
        return self.options.column if isinstance(self.options, RowOptions) else None

    def card(self, path: Path) -> Card:
        """Make the card that reads this file in the same way; answers must not be free text."""
        assert self.options is not None
        labels: dict[bool | int | float | str, str | None] | None = None
        if isinstance(self.options, tuple):
            labels = {text: text for text in self.options}
        return Card(path.stem, self.input, self.options, self.label, files=path.name, labels=labels, folder=path.parent)


def label_text(value: object) -> str:
    """Spell an answer as an option; a text without the spaces around it."""
    return value.strip() if isinstance(value, str) else key_of(value)


def find_columns(
    path: Path,
    table: Rows,
    input: str | None = None,
    label: str | None = None,
    options: Sequence[str] | None = None,
) -> Columns:
    """Say which columns are what; what is None is guessed.

    Args:
        path: the file, which messages name.
        table: its rows.
        input: a column, or a template with columns in braces.
        label: the column of the answer.
        options: of all rows, in order.

    Raises:
        TaskError: a column is missing, or cannot be guessed; the message lists the columns, and shows what would do.
        CannotScore: all rows have one answer.
    """
    if options is not None:
        _check_options(options)
    label = _named(path, table, label, "label") if label is not None else _guess_label(path, table)
    own = [name for name in table.columns if name.lower() == OPTIONS and name != label] if options is None else []
    template = find_input(path, table, input, [label, *own])
    read = {label, *own, *(name for place in placeholders(template) for name in (place, place.partition(".")[0]))}
    left_out = tuple(name for name in table.columns if name not in read)
    if options is not None:
        return Columns(template, label, tuple(options), left_out)
    if own:
        return Columns(template, label, RowOptions(own[0]), left_out)
    return Columns(template, label, _distinct(path, table, label), left_out)


def find_input(path: Path, table: Rows, input: str | None, taken: Sequence[str]) -> str:
    """Return the template of the input: the given one, that of the given column, or one guessed.

    Args:
        path: the file, which messages name.
        table: its rows.
        input: a column, or a template with columns in braces; None guesses.
        taken: columns that are no input.

    Raises:
        TaskError: a column is missing, or none is left.
    """
    if input is not None:
        return _given_input(path, table, input)
    left = [name for name in table.columns if name not in taken and not _is_id(name)]
    if len(left) > 1:
        left = [name for name in left if _holds_text(table, name)] or left
    unfit = [name for name in left if "{" in name or "}" in name]
    if unfit:
        raise TaskError(f"{path}: column {short(unfit[0])} has a brace in its name, and cannot be read; rename it")
    if not left:
        raise TaskError(
            f"{path}: no column is left for the input; columns are {listed(table.columns)}, of which "
            f"{listed(list(taken))} are the answer's; say which as `input` (--input)"
        )
    return f"{{{left[0]}}}" if len(left) == 1 else "\n".join(f"{name}: {{{name}}}" for name in left)


def _given_input(path: Path, table: Rows, input: str) -> str:
    if input in table.columns and "{" not in input and "}" not in input:
        return f"{{{input}}}"
    try:
        names = placeholders(input)
    except ConfigError as error:
        raise TaskError(f"{path}: {str(error).rstrip('.')}") from None
    for name in names or [input]:
        if name not in table.columns and name.partition(".")[0] not in table.columns:
            _named(path, table, name, "input")
    return input


def _named(path: Path, table: Rows, name: str, option: str) -> str:
    if name not in table.columns:
        near = did_you_mean(name, table.columns[:SHOWN])
        raise TaskError(
            f"{path}: `{option}` (--{option}) names {short(name)}; columns are {listed(table.columns)}{near}"
        )
    return name


def _guess_label(path: Path, table: Rows) -> str:
    found = [name for name in table.columns if name.lower() in LABELS]
    if len(found) == 1:
        return found[0]
    problem = f"{listed(found)} may all be" if found else f"none is named {', '.join(LABELS)}"
    likely = found[0] if found else _fewest_answers(table)
    example = "" if likely is None else f", as in --label {short(likely)}{_card(path, table, likely)}"
    raise TaskError(
        f"{path}: cannot tell which column holds the answer: columns are {listed(table.columns)}, and {problem}; "
        f"say which{example}"
    )


def _card(path: Path, table: Rows, label: str) -> str:
    """Offer the YAML of a card of these columns, in one line, unless it would be long."""
    try:
        template = find_input(path, table, None, [label])
    except TaskError:
        template = "..."
    options = sorted({label_text(row[label]) for _, row in table.rows if not is_blank(row[label])})[:SHOWN]
    values: dict[str, Any] = {
        "name": path.stem,
        "files": path.name,
        "input": template,
        "options": options,
        "label": label,
    }
    values |= {"delimiter": table.delimiter} if table.delimiter else {}
    card = json.dumps(values, ensure_ascii=False)
    card = card if card.isprintable() else json.dumps(values)
    return f", or load a card instead, a file {short(path.stem + '.yaml')} with {card}" * (len(card) <= LONGEST_CARD)


def _fewest_answers(table: Rows) -> str | None:
    """The column with the fewest distinct values, but at least two: it looks most like one of answers."""
    counts: dict[str, int] = {}
    for name in table.columns:
        values = [row[name] for _, row in table.rows if not is_blank(row[name])]
        if not _is_id(name) and all(isinstance(value, (str, int, float)) for value in values):
            counts[name] = len({label_text(value) for value in values})
    # Of several it is the last: answers mostly stand behind what they answer.
    return min((name for name in reversed(counts) if counts[name] > 1), key=counts.__getitem__, default=None)


def _is_id(name: str) -> bool:
    return name.lower() in IDS or name.lower().endswith(ID_ENDS)


def _holds_text(table: Rows, name: str) -> bool:
    return any(isinstance(row[name], str) and row[name].strip() and not _is_number(row[name]) for _, row in table.rows)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _distinct(path: Path, table: Rows, label: str) -> tuple[str, ...] | None:
    """Return the distinct answers, or None if they are free text."""
    values = [value for _, row in table.rows if not is_blank(value := row[label])]
    if any(isinstance(value, (list, Mapping)) for value in values):
        return None
    texts = {label_text(value) for value in values}
    if len(texts) < 2:
        held = f"only {short(min(texts))}" if texts else "nothing"
        cure = "give the options, or rows with another answer"
        raise CannotScore(f"{path}: column {label!r} holds {held}, but a task needs two answers; {cure}", "one label")
    if len(texts) > MAX_OPTIONS or 2 * len(texts) > len(table.rows):
        return None
    alike: dict[str, str] = {}
    for text in sorted(texts):
        if alike.setdefault(text.casefold(), text) != text:
            raise TaskError(
                f"{path}: column {label!r} holds both {short(alike[text.casefold()])} and {short(text)}; "
                "write them alike"
            )
    return tuple(sorted(texts))


def _check_options(options: Any) -> None:
    if isinstance(options, str) or len(set(options)) < max(2, len(options)):
        raise TaskError(f"`options` must be a list of at least 2 different texts, got {options!r}")

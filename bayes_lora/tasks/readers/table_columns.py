"""A card for a table of a user's own: columns as the caller says, or guessed from their names and values.

The answer is the one column whose name is in :data:`LABELS`, in any case. The input is the column that is left, or, if
several are left, a line ``<name>: {<name>}`` for each column of texts. Columns of ids are not read (their names are in
:data:`IDS`, or end as in :data:`ID_ENDS`, or each of their values is another number with a prefix), nor are columns
that give the answer away (:mod:`bayes_lora.tasks.readers.table_leaks`). A column named ``options`` holds the options of
its row. Otherwise the options are the distinct answers in alphabetical order, unless these are more than
``max_options``, or more than half of the rows: then answers are free text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence

from bayes_lora.errors import ConfigError, TaskError, did_you_mean
from bayes_lora.tasks.appearance import appearance
from bayes_lora.tasks.readers.card import Card, RowOptions, card_values, placeholders
from bayes_lora.tasks.readers.table_answers import (
    MAX_OPTIONS,
    distinct_answers,
    distinct_options,
    first_row_as_data,
    label_text,
)
from bayes_lora.tasks.readers.table_leaks import NAMED, leaking_columns
from bayes_lora.tasks.readers.table_rows import Row, Table, is_blank
from bayes_lora.tasks.readers.text_files import listed, short

__all__ = [
    "LABELS",
    "OPTIONS",
    "SHOWN",
    "column_leaks",
    "find_input",
    "left_out_columns",
    "plain",
    "table_card",
]

LABELS = ("label", "output", "answer", "target", "class", "category", "sentiment", "intent", "gold")
IDS = ("", "id", "uid", "uuid", "guid", "idx", "index", "row", "nr")
ID_ENDS = ("_id", " id")
# Names that pandas gives to an index that has none.
INDEX = re.compile(r"unnamed: \d+(\.\d+)*|level_\d+|__index_level_\d+__")
ID_VALUE = re.compile(r"[A-Za-z]{0,8}[-_:#]?\d+|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{24,}")
DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
OPTIONS = "options"
SHOWN, LONGEST_CARD = 10, 400
LIKE_ID, NO_TEXT = "the values of {} look like ids", "other columns hold texts"


def plain(name: str) -> str:
    """Return the name of a column as it is compared: in lower case, without what cannot be seen."""
    return appearance(name).casefold()


def table_card(
    table: Table,
    rows: Sequence[Row],
    input: str | None = None,
    label: str | None = None,
    options: Sequence[str] | None = None,
    max_options: int = MAX_OPTIONS,
) -> Card:
    """Make the card by which a table is read; an argument that is None is guessed.

    Args:
        table: the table.
        rows: its rows that are not blank.
        input: a column, or a template with columns in braces.
        label: the column of the answer.
        options: of all rows, in order.
        max_options: maximum number of distinct answers that become options.

    Raises:
        TaskError: a column is missing, or cannot be guessed; the message lists the columns, and shows what to pass.
        CannotScore: all rows have one answer.
    """
    if options is not None and (isinstance(options, str) or len(set(options)) < max(2, len(options))):
        raise TaskError(f"`options` must be a list of at least 2 different texts, got {options!r}")
    if not isinstance(max_options, int) or max_options < 2:  # True is below 2
        raise TaskError(f"`max_options` (--max-options) must be an integer of 2 or more, got {max_options!r}")
    label = _guess_label(table, rows) if label is None else _named(table, label, "label")
    own = [name for name in table.columns if plain(name) == OPTIONS and name != label] if options is None else []
    template = find_input(table, rows, input, [label, *own], label)
    if options is not None:
        found: tuple[str, ...] | RowOptions | None = tuple(options)
    else:
        found = RowOptions(own[0]) if own else distinct_options(table, rows, label, max_options)
    try:
        return _card(table, template, found, label)
    except ConfigError as error:
        raise TaskError(f"{table.path}: {str(error).rstrip('.')}") from None


def _card(table: Table, input: str, options: tuple[str, ...] | RowOptions | None, label: str) -> Card:
    # The text of an option means the option, though it may be the letter or the index of another.
    labels: dict[bool | int | float | str, str | None] | None = None
    if isinstance(options, tuple):
        labels = {text: text for text in options}
    path = table.path
    return Card(path.stem, input, options, label, files=path.name, labels=labels, folder=path.parent)


def find_input(
    table: Table, rows: Sequence[Row], input: str | None, taken: Collection[str], label: str | None = None
) -> str:
    """Return the template of the input: the given one, that of the given column, or a guess.

    Args:
        table: the table.
        rows: its rows that are not blank.
        input: a column, or a template with columns in braces; None or an empty text guesses.
        taken: columns that are not input.
        label: the column of the answer, if there is one: a guess leaves out the columns that give it away.

    Raises:
        TaskError: a column is missing, or none is left.
    """
    if input:
        return _given_input(table, input)
    names = [name for name in table.columns if name not in taken]
    reasons = left_out_columns(rows, names, label)
    left = [name for name in names if name not in reasons]
    if leaks := [name for name in names if reasons.get(name)] * (not left):
        raise TaskError(
            f"{table.path}: no column is left for the input: {listed(leaks)} would give the answer away, because "
            f"{reasons[leaks[0]].format('them')}; add a column of inputs, or say --input {short(leaks[0])} if it is "
            "the input"
        )
    for name in left:
        if "{" in name or "}" in name:
            raise TaskError(
                f"{table.path}: column {short(name)} has a brace in its name, and cannot be read; rename it"
            )
    if not left:
        raise TaskError(
            f"{table.path}: no column is left for the input; columns are {listed(table.columns)}, of which "
            f"{listed(list(taken))} are the answer's; say which as `input` (--input)"
        )
    return f"{{{left[0]}}}" if len(left) == 1 else "\n".join(f"{name}: {{{name}}}" for name in left)


def left_out_columns(rows: Sequence[Row], names: Sequence[str], label: str | None) -> dict[str, str]:
    """Return which columns a guess of the input leaves out, each with the reason; an empty one for the name of an id.

    Args:
        rows: rows that are not blank.
        names: the columns.
        label: the column of the answer, if there is one: columns that give it away are left out.
    """
    reasons = dict.fromkeys(filter(_is_id, names), "")
    left = [name for name in names if name not in reasons]
    # A table of an answer and one more column leaves no doubt which the input is.
    if label is not None and len(left) > 1:
        leaks = column_leaks(rows, left, label)
        if not any(_holds_text(rows, name) for name in left if name not in leaks):
            leaks = {name: kind for name, kind in leaks.items() if kind != NAMED}
        reasons |= leaks
    texts = [name for name in left if name not in reasons and _holds_text(rows, name)]
    ids = [name for name in texts if _holds_ids(rows, name)]
    if 0 < len(ids) < len(texts):
        reasons |= dict.fromkeys(ids, LIKE_ID)
    if texts:
        reasons |= {name: NO_TEXT for name in left if name not in reasons and name not in texts}
    return reasons


def column_leaks(rows: Sequence[Row], names: Sequence[str], label: str) -> dict[str, str]:
    """Return which of the columns give the answer away, each with its kind; see `leaking_columns`."""
    texts = distinct_answers(rows, label)
    return leaking_columns(rows, names, label, fixed=texts is not None and 2 * len(texts) <= len(rows))


def _given_input(table: Table, input: str) -> str:
    if input in table.columns and "{" not in input and "}" not in input:
        return f"{{{input}}}"
    try:
        names = placeholders(input)
    except ConfigError as error:
        raise TaskError(f"{table.path}: {str(error).rstrip('.')}") from None
    for name in names or [input]:
        if name.partition(".")[0] not in table.columns:
            _named(table, name, "input")
    return input


def _named(table: Table, name: str, option: str) -> str:
    if name not in table.columns:
        near = did_you_mean(name, table.columns[:SHOWN])
        columns = f"columns are {listed(table.columns)}{near}"
        raise TaskError(f"{table.path}: `{option}` (--{option}) names {short(name)}; {columns}")
    return name


def _guess_label(table: Table, rows: Sequence[Row]) -> str:
    found = [name for name in table.columns if plain(name) in LABELS]
    if len(found) == 1:
        return found[0]
    problem = f"{listed(found)} may all be" if found else f"none is named {', '.join(LABELS)}"
    likely = found[0] if found else _fewest_answers(table, rows)
    example = "" if likely is None else f", as in --label {short(likely)}{_offer(table, rows, likely)}"
    value = first_row_as_data(table, rows, table.columns)
    header = f"; if the first row is no header ({short(value)} is also a value), add one" if value else ""
    raise TaskError(
        f"{table.path}: cannot tell which column holds the answer: columns are {listed(table.columns)}, and {problem}; "
        f"say which{example}{header}"
    )


def _offer(table: Table, rows: Sequence[Row], label: str) -> str:
    """Offer the YAML of a card with this label, in one line, unless it would be long or invalid."""
    options = tuple(sorted({label_text(cell) for _, row in rows if not is_blank(cell := row.get(label))})[:SHOWN])
    try:
        card = _card(table, find_input(table, rows, None, [label], label), options, label)
    except (ConfigError, TaskError):
        return ""
    values = {name: value for name, value in card_values(card).items() if name != "labels"}
    text = json.dumps(values, ensure_ascii=False)
    text = text if text.isprintable() else json.dumps(values)
    offer = f", or load a card instead, a file {short(table.path.stem + '.yaml')} with {text}"
    return offer * (len(text) <= LONGEST_CARD)


def _fewest_answers(table: Table, rows: Sequence[Row]) -> str | None:
    """Return the column with the fewest distinct values, but at least two: it looks most like one of answers."""
    counts: dict[str, int] = {}
    for name in table.columns:
        values = [value for _, row in rows if not is_blank(value := row.get(name))]
        if not _is_id(name) and all(isinstance(value, (str, int, float)) for value in values):
            counts[name] = len({label_text(value) for value in values})
    # The last of several: an answer mostly follows what it answers.
    return min((name for name in reversed(counts) if counts[name] > 1), key=counts.__getitem__, default=None)


def _is_id(name: str) -> bool:
    return plain(name) in IDS or plain(name).endswith(ID_ENDS) or INDEX.fullmatch(plain(name)) is not None


def _holds_ids(rows: Sequence[Row], name: str) -> bool:
    """Whether each value is another one, and each is a number with a prefix, or hexadecimal."""
    values = [cell.strip() for _, row in rows if isinstance(cell := row.get(name), str) and cell.strip()]
    return 0 < len(set(values)) == len(values) and all(map(ID_VALUE.fullmatch, values))


def _holds_text(rows: Sequence[Row], name: str) -> bool:
    cells = (row.get(name) for _, row in rows)
    return any(isinstance(cell, str) and cell.strip() and not _is_number(cell) for cell in cells)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return DECIMAL_COMMA.fullmatch(text.strip()) is not None
    return True

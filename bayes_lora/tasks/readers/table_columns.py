"""A card for a table of a user's own: columns as the caller says, or guessed from their names.

The answer is the one column whose name is in :data:`LABELS`, in any case. The input is the column that is left, or, if
several are left, a line ``<name>: {<name>}`` for each column of texts. Columns whose name is in :data:`IDS`, or ends as
in :data:`ID_ENDS`, are not read, nor are columns that give the answer away
(:mod:`bayes_lora.tasks.readers.table_leaks`). A column named ``options`` holds the options of its row. Otherwise the
options are the distinct answers in alphabetical order, unless these are more than ``max_options``, or more than
half of the rows: then answers are free text.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence

from bayes_lora.errors import ConfigError, TaskError, did_you_mean
from bayes_lora.tasks.appearance import appearance
from bayes_lora.tasks.readers.card import Card, RowOptions, card_values, key_of, placeholders
from bayes_lora.tasks.readers.table_leaks import leaking_columns
from bayes_lora.tasks.readers.table_rows import Row, Table, is_blank
from bayes_lora.tasks.readers.text_files import CannotScore, listed, short

__all__ = ["LABELS", "MAX_OPTIONS", "OPTIONS", "describe", "find_input", "label_text", "table_card"]

LABELS = ("label", "output", "answer", "target", "class", "category", "sentiment", "intent", "gold")
IDS = ("", "id", "uid", "uuid", "guid", "idx", "index", "row", "nr", "unnamed: 0")
ID_ENDS = ("_id", " id")
OPTIONS = "options"
MAX_OPTIONS = 64
"""By default: every option is scored for every example, so a forward pass grows with their number."""
SHOWN, LONGEST_CARD = 10, 400


def label_text(value: object) -> str:
    """Spell an answer as an option; a text without the spaces around it."""
    return value.strip() if isinstance(value, str) else key_of(value)


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
    own = [name for name in table.columns if name.lower() == OPTIONS and name != label] if options is None else []
    template = find_input(table, rows, input, [label, *own], label)
    if options is not None:
        found: tuple[str, ...] | RowOptions | None = tuple(options)
    else:
        found = RowOptions(own[0]) if own else _distinct(table, rows, label, max_options)
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


def describe(
    card: Card, table: Table, rows: Sequence[Row], input: str | None = None, max_options: int = MAX_OPTIONS
) -> str:
    """Say in one line how a table is read by a card that :func:`table_card` has made with these arguments."""
    if card.options is None:
        reason = _too_many(_answers(rows, card.label), len(rows), max_options)
        answers = f"free text, because {reason}" if reason else "free text"
    elif isinstance(card.options, RowOptions):
        answers = f"one of the row's {', '.join(card.options.names)}"
    else:
        more = f" and {len(card.options) - SHOWN} more" * (len(card.options) > SHOWN)
        answers = ", ".join(card.options[:SHOWN]) + more
    read = {name for column in card.columns for name in (column, column.partition(".")[0])}
    left_out = [name for name in table.columns if name not in read]
    leaks = [] if input else leaking_columns(rows, [name for name in table.columns if not _is_id(name)], card.label)
    unread = [name for name in left_out if name in leaks]
    others = [name for name in left_out if name not in leaks]
    not_read = f"; not read: {', '.join(others[:SHOWN])}" if others else ""
    if unread:
        them = "it" if len(unread) == 1 else "them"
        not_read += f"; not read: {', '.join(unread[:SHOWN])}, because each value of {them} stands for one answer"
    not_read += "".join(
        f"; each value of {name}, the only column left, stands for one answer"
        for name in placeholders(card.input)
        if name in leaks
    )
    text = f"input is {card.input}, answers from {card.label}: {answers}{not_read}"
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


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
    left = [name for name in table.columns if name not in taken and not _is_id(name)]
    # A table of an answer and one more column leaves no doubt which the input is.
    leaks = [] if label is None or len(left) == 1 else leaking_columns(rows, left, label)
    if leaks and len(leaks) == len(left):
        raise TaskError(
            f"{table.path}: no column is left for the input: {listed(leaks)} would give the answer away, because each "
            f"value stands for one answer; add a column of inputs, or say --input {short(leaks[0])} if it is the input"
        )
    left = [name for name in left if name not in leaks]
    if len(left) > 1:
        left = [name for name in left if _holds_text(rows, name)] or left
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
    found = [name for name in table.columns if name.lower() in LABELS]
    if len(found) == 1:
        return found[0]
    problem = f"{listed(found)} may all be" if found else f"none is named {', '.join(LABELS)}"
    likely = found[0] if found else _fewest_answers(table, rows)
    example = "" if likely is None else f", as in --label {short(likely)}{_offer(table, rows, likely)}"
    raise TaskError(
        f"{table.path}: cannot tell which column holds the answer: columns are {listed(table.columns)}, and {problem}; "
        f"say which{example}"
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
    return name.lower() in IDS or name.lower().endswith(ID_ENDS)


def _holds_text(rows: Sequence[Row], name: str) -> bool:
    cells = (row.get(name) for _, row in rows)
    return any(isinstance(cell, str) and cell.strip() and not _is_number(cell) for cell in cells)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _distinct(table: Table, rows: Sequence[Row], label: str, max_options: int) -> tuple[str, ...] | None:
    """Return the distinct answers, or None if they are free text."""
    texts = _answers(rows, label)
    if texts is None:
        return None
    if len(texts) < 2:
        held = f"only {short(min(texts))}" if texts else "nothing"
        problem = f"column {label!r} holds {held}, but a task needs two answers"
        raise CannotScore(f"{table.path}: {problem}; give the options, or rows with another answer", "one label")
    if _too_many(texts, len(rows), max_options):
        return None
    alike: dict[str, str] = {}
    for text in sorted(texts):
        first = alike.setdefault(appearance(text).casefold(), text)
        if first != text:
            # Where more than the case differs, only code points show what it is.
            spell = short if first.casefold() == text.casefold() else ascii
            look = ", which look the same" * (appearance(first) == appearance(text))
            problem = f"column {label!r} holds both {spell(first)} and {spell(text)}{look}"
            raise TaskError(f"{table.path}: {problem}; write them alike")
    return tuple(sorted(texts))


def _answers(rows: Sequence[Row], label: str) -> set[str] | None:
    """Return the texts of the answers; None if some are lists, which only free answers are."""
    values = [value for _, row in rows if not is_blank(value := row.get(label))]
    if any(isinstance(value, (list, Mapping)) for value in values):
        return None
    return {label_text(value) for value in values}


def _too_many(texts: Collection[str] | None, num_rows: int, max_options: int) -> str:
    """Say why these answers are free text rather than options; nothing if they are options, or lists."""
    if texts is None:
        return ""
    if 2 * len(texts) > num_rows:
        return f"there are {len(texts)} different answers in {num_rows} rows"
    if len(texts) > max_options:
        limit = f"at most {max_options} would be options (--max-options)"
        return f"there are {len(texts)} different answers, and {limit}"
    return ""

"""The answers of a table: which are options, and what about them deserves a second look."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from bayes_lora.errors import TaskError
from bayes_lora.tasks.appearance import appearance
from bayes_lora.tasks.readers.card import key_of
from bayes_lora.tasks.readers.table_rows import Row, Table, is_blank
from bayes_lora.tasks.readers.text_files import CannotScore, short

__all__ = [
    "MAX_OPTIONS",
    "answer_notes",
    "check_filled",
    "distinct_answers",
    "distinct_options",
    "first_row_as_data",
    "label_text",
    "too_many",
]

MAX_OPTIONS = 64
"""By default: every option is scored for every example, so a forward pass grows with their number."""
NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?")
DATE = re.compile(r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}([T ].*)?|\d{1,2}[-/.]\d{1,2}[-/.](\d{4}|\d{2})")
MISSING = ("nan", "null", "n/a", "#n/a", "<na>")
# More numbers than these are rather measured than codes of classes; ratings in halves are few.
MAX_CODES, MAX_FRACTIONS = 20, 10


def label_text(value: object) -> str:
    """Spell an answer as an option; a text without the spaces around it."""
    return value.strip() if isinstance(value, str) else key_of(value)


def check_filled(rows: Sequence[Row], label: str) -> None:
    """Raise `TaskError` with the first row without an answer, and how many there are."""
    missing = [place for place, row in rows if is_blank(row.get(label))]
    if missing:
        others = f", as in {len(missing) - 1} more of {len(rows)} rows" * (len(missing) > 1)
        cure = "fill them in, or remove these rows" if others else "fill it in, or remove the row"
        raise TaskError(f"{missing[0]}: column {label!r}: the value is missing{others}; {cure}")


def distinct_answers(rows: Sequence[Row], label: str) -> set[str] | None:
    """Return the texts of the answers; None if some are lists, which only free answers are."""
    values = [value for _, row in rows if not is_blank(value := row.get(label))]
    if any(isinstance(value, (list, Mapping)) for value in values):
        return None
    return {label_text(value) for value in values}


def distinct_options(table: Table, rows: Sequence[Row], label: str, max_options: int) -> tuple[str, ...] | None:
    """Return the distinct answers in alphabetical order, or None if they are free text.

    Raises:
        CannotScore: all rows have one answer.
        TaskError: two answers are spellings of one.
    """
    texts = distinct_answers(rows, label)
    if texts is None:
        return None
    if len(texts) < 2:
        held = f"only {short(min(texts))}" if texts else "nothing"
        problem = f"column {label!r} holds {held}, but a task needs two answers"
        raise CannotScore(f"{table.path}: {problem}; give the options, or rows with another answer", "one label")
    if too_many(texts, len(rows), max_options):
        return None
    seen: dict[str, str] = {}
    for text in sorted(texts):
        first = seen.setdefault(_meaning(text), text)
        if first != text:
            raise TaskError(f"{table.path}: column {label!r} holds both {_both(first, text)}; write them alike")
    return tuple(sorted(texts))


def _meaning(text: str) -> str:
    """Return a text that is equal for spellings of one answer: in case, a last full stop or zeros of a number."""
    folded = appearance(text).casefold()
    bare = folded.strip("\"'").rstrip(".,;:!").strip("\"' ") or folded
    return str(float(bare)) if re.fullmatch(r"[+-]?\d+(\.\d+)?", bare) else bare


def _both(first: str, text: str) -> str:
    if first.casefold() == text.casefold():
        return f"{short(first)} and {short(text)}"
    if appearance(first).casefold() != appearance(text).casefold():
        number = NUMBER.fullmatch(text) and NUMBER.fullmatch(first)
        return f"{short(first)} and {short(text)}, which {'are one number' if number else 'differ in punctuation'}"
    # Where more than the case differs, only code points show what it is.
    look = ", which look the same" * (appearance(first) == appearance(text))
    return f"{ascii(first)} and {ascii(text)}{look}"


def too_many(texts: Collection[str] | None, num_rows: int, max_options: int) -> str:
    """Say why these answers are free text rather than options; nothing if they are options, or lists."""
    if texts is None:
        return ""
    if 2 * len(texts) > num_rows:
        return f"there are {len(texts)} different answers in {num_rows} rows"
    if len(texts) > max_options:
        limit = f"at most {max_options} would be options (max_options, --max-options)"
        return f"there are {len(texts)} different answers, and {limit}"
    return ""


def first_row_as_data(table: Table, rows: Sequence[Row], names: Sequence[str]) -> str | None:
    """Return the first of the columns of a CSV or TSV file whose name is also one of its values."""
    for name in names if table.delimiter else ():
        if name and any(label_text(row.get(name)) == name for _, row in rows):
            return name
    return None


def answer_notes(rows: Sequence[Row], label: str) -> list[str]:
    """Say what is unusual for answers: numbers that are no codes, dates, spellings of a missing value."""
    texts = distinct_answers(rows, label)
    if not texts:
        return []
    notes = []
    if _measured(texts):
        notes.append(
            f"the {len(texts)} answers are numbers, each taken as a text: group them if they measure something"
        )
    if all(map(DATE.fullmatch, texts)):
        notes.append(f"the {len(texts)} answers are dates, each taken as a text")
    for text in sorted(text for text in texts if text.casefold() in MISSING):
        places = [place for place, row in rows if not is_blank(row.get(label)) and label_text(row.get(label)) == text]
        count = f"in {len(places)} rows, first in {places[0]}," if len(places) > 1 else f"in {places[0]}"
        notes.append(f"{short(text)} {count} is taken as an answer: clear the cell if the value is missing")
    return notes


def _measured(texts: Collection[str]) -> bool:
    if not all(map(NUMBER.fullmatch, texts)):
        return False
    numbers = [float(text.replace(",", ".")) for text in texts]
    if not all(number.is_integer() for number in numbers):
        return len(texts) > MAX_FRACTIONS
    codes = min(numbers) in (0, 1) and max(numbers) < 2 * len(numbers)
    return len(texts) > MAX_CODES and not codes

"""Find columns that give the answer away, such as a column with the name of each numeric label.

There are three kinds:

- :data:`ONE_ANSWER`: each value occurs with one answer only, each answer has at most :data:`MAX_VALUES` of the values,
  and a value occurs at least twice on average. The last two conditions keep inputs: a column of texts that all differ
  determines the answer too.
- :data:`ONE_VALUE`: each answer has one value of the column, which has several, each at least twice. So are one-hot
  columns, and digits of a code.
- :data:`NAMED`: each text, in at least :data:`MIN_ROWS` rows, names the answer, and either the first or the last option
  that it names is the answer in every row, as in "... so the answer is yes".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from bayes_lora.tasks.readers.table_rows import Row, is_blank

__all__ = ["NAMED", "ONE_ANSWER", "ONE_VALUE", "leaking_columns"]

MAX_VALUES = 3
"""Maximum number of values per answer: ratings 1 to 6 behind two labels leak, a topic with more values does not."""
MIN_ROWS, MIN_ROWS_PER_ANSWER = 8, 3
"""In fewer rows a column may follow the answer by chance."""
ONE_ANSWER = "each value of {} stands for one answer"
ONE_VALUE = "each answer has one value of {}"
NAMED = "each text of {} names the answer"


def leaking_columns(rows: Sequence[Row], names: Sequence[str], label: str, *, fixed: bool = True) -> dict[str, str]:
    """Return which of the columns give away the answer in the column ``label``, each with its kind.

    Args:
        rows: of the table.
        names: the columns.
        label: the column of the answer.
        fixed: whether all rows have the same options, the distinct answers: otherwise a text may well hold the answer,
            and is not of the kind :data:`NAMED`.
    """
    answered = [(_spell(row.get(label)), row) for _, row in rows if not is_blank(row.get(label))]
    answers = [answer for answer, _ in answered]
    kinds = {}
    for name in names:
        values = [_spell(row.get(name)) for _, row in answered]
        if _gives_away(values, answers):
            kinds[name] = ONE_ANSWER
        elif _follows(values, answers):
            kinds[name] = ONE_VALUE
        elif fixed and _names(values, answers):
            kinds[name] = NAMED
    return kinds


def _spell(value: object) -> str:
    return "" if is_blank(value) else str(value).strip()


def _gives_away(values: Sequence[str], answers: Sequence[str]) -> bool:
    distinct = set(answers)
    most = min(MAX_VALUES * len(distinct), len(values) // 2)
    meanings: dict[str, set[str]] = {}
    for value, answer in zip(values, answers, strict=True):
        meanings.setdefault(value, set()).add(answer)
        if len(meanings) > most + 1:  # at least one more than the blank
            return False
    blank = meanings.get("", set())
    filled = len(values)
    if len(blank) > 1:  # values are missing, and a blank is none of them
        del meanings[""]
        filled -= sum(not value for value in values)
    if len(distinct) < 2 or 2 * filled < len(values) or 2 * len(meanings) > filled:
        return False
    per_answer = dict.fromkeys(distinct, 0)
    for meant in meanings.values():
        if len(meant) > 1:
            return False
        per_answer[next(iter(meant))] += 1
    return all(1 <= count <= MAX_VALUES for count in per_answer.values())


def _follows(values: Sequence[str], answers: Sequence[str]) -> bool:
    value_of: dict[str, str] = {}
    if any(value_of.setdefault(answer, value) != value for value, answer in zip(values, answers, strict=True)):
        return False
    counts = Counter(values)
    enough = len(values) >= max(MIN_ROWS, MIN_ROWS_PER_ANSWER * len(value_of))
    return enough and len(counts) > 1 and min(counts.values()) > 1


def _names(values: Sequence[str], answers: Sequence[str]) -> bool:
    options = sorted({answer.casefold() for answer in answers}, key=len, reverse=True)
    filled = [(text.casefold(), answer.casefold()) for text, answer in zip(values, answers, strict=True) if text]
    if len(options) < 2 or len(filled) < MIN_ROWS or 2 * len(filled) < len(values):
        return False
    # A letter or a digit next to an option makes it another word; an underscore does not.
    named = re.compile(rf"(?<![^\W_])(?:{'|'.join(map(re.escape, options))})(?![^\W_])")
    first = last = True
    for text, answer in filled:
        found = named.findall(text)
        first = first and bool(found) and found[0] == answer
        last = last and bool(found) and found[-1] == answer
        if not (first or last):
            return False
    return True

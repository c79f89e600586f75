"""Find columns that give the answer away, such as a column with the name of each numeric label.

A column gives the answer away if each of its values occurs with one answer only, each answer has at most
:data:`MAX_VALUES` of its values, and a value occurs at least twice on average. The last two conditions keep inputs:
a column of texts that all differ determines the answer too.
"""

from __future__ import annotations

from collections.abc import Sequence

from bayes_lora.tasks.readers.table_rows import Row, is_blank

__all__ = ["leaking_columns"]

MAX_VALUES = 3
"""Maximum number of values per answer: ratings 1 to 6 behind two labels leak, a topic with more values does not."""


def leaking_columns(rows: Sequence[Row], names: Sequence[str], label: str) -> list[str]:
    """Return which of the columns give away the answer in the column ``label``."""
    answered = [(_spell(row.get(label)), row) for _, row in rows if not is_blank(row.get(label))]
    answers = [answer for answer, _ in answered]
    return [name for name in names if _gives_away([_spell(row.get(name)) for _, row in answered], answers)]


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

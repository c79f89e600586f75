"""Tasks from tables: a card (:mod:`bayes_lora.tasks.readers.card`) says how rows become examples.

The first row that does not fit the card is an error, which names the column and the row: the line of a local file, or
the number of the row in a split of a data set of the hub, from 1.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bayes_lora.errors import ConfigError, TaskError, did_you_mean
from bayes_lora.tasks.appearance import merge_alike
from bayes_lora.tasks.readers.card import Card, RowOptions, fill, gallery, key_of, placeholders, read_card
from bayes_lora.tasks.readers.card_rows import CardRows, card_tables, hub_rows, local_rows
from bayes_lora.tasks.readers.table_rows import at
from bayes_lora.tasks.readers.text_files import listed, short
from bayes_lora.tasks.task import Example, Task

__all__ = ["example_of", "input_of", "load_card", "row_texts"]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def load_card(card: Card | str | Path, *, max_examples: int | None = None, cache_dir: str | Path | None = None) -> Task:
    """Load the task of a card.

    Args:
        card: a card, the path of one, or the name of one in the gallery.
        max_examples: instead of the card's own.
        cache_dir: folder in which `datasets` caches data sets of the hub; by default its own.

    Raises:
        ConfigError: there is no such card, or it is malformed.
        TaskError: the rows cannot be read, or one does not fit the card.
    """
    card = card if isinstance(card, Card) else read_card(_find(card))
    if max_examples is not None:
        card = replace(card, max_examples=max_examples)
    with at(f"card {card.name!r}"):
        tables = card_tables(card)

        def examples(split: str, seen: Collection[str] = ()) -> tuple[Example, ...]:
            return _examples(card, local_rows(tables, split) if tables else hub_rows(card, split, cache_dir), seen)

        support = examples(card.split)
        query = () if card.query_split is None else examples(card.query_split, {one.input for one in support})
    return Task(card.name, support, query)


def _find(card: str | Path) -> Path:
    known = gallery()
    if str(card) in known:
        return known[str(card)]
    path = Path(card)
    if not path.is_file():
        near = did_you_mean(str(card), known)
        raise ConfigError(f"card {str(card)!r}: no such file, and none in the gallery{near}.")
    return path


def _examples(card: Card, rows: CardRows, seen: Collection[str]) -> tuple[Example, ...]:
    """Convert rows in order, or as many as the card asks for, drawn at random, without inputs that were seen."""
    with at(rows.source):
        _check_columns(card, rows.columns)
    order = list(range(len(rows.places)))
    if card.max_examples is not None:
        order = random.Random(card.seed).sample(order, len(order))
    kept: dict[int, Example] = {}
    kinds: dict[str, str] = {}
    for index in order:
        with at(rows.places[index]):
            example = example_of(card, _cells(rows, index), kinds, rows.places[index])
        if example is not None and example.input not in seen:
            kept[index] = example
        if len(kept) == card.max_examples:
            break
    if not kept:
        raise TaskError(
            f"{rows.source}: none of the {len(order)} rows is left; see `labels`, and whether support has them all"
        )
    return tuple(kept[index] for index in sorted(kept))


def _cells(rows: CardRows, index: int) -> Mapping[str, Any]:
    try:
        return rows.cells[index]
    except UnicodeError as error:  # Arrow keeps the bytes of a text and decodes them only here
        raise TaskError(f"cannot be read: {error}; save the file in UTF-8") from error


def _check_columns(card: Card, columns: list[str]) -> None:
    for name in card.columns:
        if name not in columns and name.partition(".")[0] not in columns:
            raise TaskError(f"no column {short(name)}{did_you_mean(name, columns)}; columns are {listed(columns)}")


def example_of(card: Card, row: Mapping[str, Any], kinds: dict[str, str], place: str) -> Example | None:
    """Convert a row; None if the card leaves it out. ``kinds`` keeps the first place of each type of label."""
    if card.options is None:
        references = _references(card.label, _cell(row, card.label))
        return Example(input_of(card.input, row), references=references)
    label = _scalar(card.label, _cell(row, card.label))
    kind = "text" if isinstance(label, str) else "true or false" if isinstance(label, bool) else "number"
    kinds.setdefault(kind, place)
    if len(kinds) > 1:
        listed = " and ".join(f"{kind} in {first}" for kind, first in kinds.items())
        raise TaskError(f"column {card.label!r}: mixed types, {listed}; write all alike")
    if card.labels is not None and card.texts.get(key_of(label), "") is None:
        return None
    options = list(card.options) if isinstance(card.options, tuple) else row_texts(card.options, row)
    try:
        answer = _answer(card, label, options, row)
    except TaskError as error:
        raise TaskError(f"column {card.label!r}: {error}") from None
    text = input_of(card.input, row)
    return Example(text, *(merge_alike(options, answer) if card.merge_duplicates else (tuple(options), answer)))


def input_of(template: str, row: Mapping[str, Any]) -> str:
    """Fill a template of the input with what a row holds, of which something must not be blank."""
    texts = {name: _text(name, _cell(row, name)) for name in placeholders(template)}
    if not any(text.strip() for text in texts.values()):
        raise TaskError(f"`input` is empty: column {', '.join(map(repr, texts))} holds nothing; remove the row")
    return fill(template, texts.__getitem__)


def _references(name: str, value: Any) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [_scalar(name, value)]
    if not texts:
        cure = "remove the row, or see whether another `split` has answers"
        raise TaskError(f"column {name!r}: the list holds no answer; {cure}")
    if not all(isinstance(text, str) for text in texts):
        # A number is most likely the class label of a card whose options were forgotten.
        expected = "without `options`, a free answer is a text or a list of texts"
        raise TaskError(f"column {name!r}: got {value!r}; {expected}, and a label needs `options`")
    return tuple(dict.fromkeys(texts))


def _answer(card: Card, label: object, options: list[str], row: Mapping[str, Any]) -> int:
    """Return the index of the gold option."""
    key = key_of(label)
    if card.labels is not None:
        return _labelled(card, label, options)
    if card.letters is not None:
        names = card.letters if isinstance(card.letters, tuple) else row_texts(card.letters, row)
        letters = [key_of(name) for name in names[: len(options)]]
        if key not in letters:
            raise TaskError(f"got {label!r}; `letters` of the {len(options)} options are {letters}")
        return letters.index(key)
    read = {options.index(text) for text in (str(label), key) if text in options}
    read |= {place for place in range(len(options)) if key in (str(place), *LETTERS[place : place + 1])}
    if len(read) > 1:
        raise TaskError(f"got {label!r}, the text of one option and the place of another in {options}; add `letters`")
    if not read:
        cure = "other labels need `labels`, a split without labels another `split`"
        raise TaskError(
            f"expected one of {options}, its letter, or its index in 0..{len(options) - 1}; got {label!r}; {cure}"
        )
    return read.pop()


def _labelled(card: Card, label: object, options: list[str]) -> int:
    key = key_of(label)
    if key not in card.texts:
        raise TaskError(
            f"got {label!r}, which is none of `labels`{did_you_mean(key, card.texts, list_all=True)}; add it"
        )
    if card.texts[key] not in options:
        cure = "correct `labels`, or the row's options"
        raise TaskError(f"got {label!r}, which `labels` maps to {card.texts[key]!r}, none of {options}; {cure}")
    return options.index(str(card.texts[key]))


def row_texts(where: RowOptions, row: Mapping[str, Any]) -> list[str]:
    """Return a row's own texts."""
    if where.column is not None:
        return _texts(where.column, _cell(row, where.column))
    return [_text(name, _cell(row, name)) for name in where.columns or ()]


def _cell(row: Mapping[str, Any], name: str) -> Any:
    """What the row holds in a column, or under ``column.key``; of a list of records, a list."""
    if name in row:
        return row[name]
    column, *keys = name.split(".")
    value = row[column]
    for key in keys:
        records = value if isinstance(value, list) else [value]
        for record in records:
            if not isinstance(record, Mapping) or key not in record:
                held = ", ".join(map(str, record)) if isinstance(record, Mapping) else repr(record)
                raise TaskError(f"column {name!r}: no {key!r} there, only {held}; correct the card, or the row")
        value = [record[key] for record in records] if isinstance(value, list) else value[key]
    return value


def _texts(name: str, value: Any) -> list[str]:
    if not isinstance(value, list):
        raise TaskError(f"column {name!r}: expected a list, got {value!r}; name columns of a text each as `columns`")
    if len({isinstance(item, str) for item in value}) > 1:
        raise TaskError(f"column {name!r}: mixed types, expected a list of texts; got {value!r}")
    return [_text(name, item) for item in value]


def _text(name: str, value: Any) -> str:
    return str(_scalar(name, value))


def _scalar(name: str, value: Any) -> str | int | float | bool:
    if value is None or isinstance(value, float) and math.isnan(value):
        raise TaskError(f"column {name!r}: the value is missing; fill it in, or remove the row")
    if not isinstance(value, (str, int, float, bool)):
        raise TaskError(f"column {name!r}: expected a text or a number, got {value!r}; convert the column")
    return value

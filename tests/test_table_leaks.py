"""Columns of a table that give the answer away are left out and named; inputs that look alike are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from files import write

from bayes_lora.tasks import load_table

THREE, FOUR = ("neg", "neu", "pos"), ("red", "green", "blue", "grey")
YES = ("no", "yes")


def table(path: Path, num_rows: int, columns: dict[str, Callable[[int], object]]) -> Path:
    """A CSV file with a text and these columns."""
    rows = [["text", *columns], *([f"film {i}", *(cell(i) for cell in columns.values())] for i in range(num_rows))]
    return write(path / "t.csv", "".join(",".join(f'"{cell}"' for cell in row) + "\n" for row in rows))


LEAKS: dict[str, tuple[dict[str, Callable[[int], object]], str]] = {
    "one-hot": (
        {
            **{f"is {name}": lambda i, k=k: int(i % 3 == k) for k, name in enumerate(THREE)},
            "label": lambda i: THREE[i % 3],
        },
        "is neg, is neu, is pos, because each answer has one value of them",
    ),
    "one-hot in words": (
        {"is neg": lambda i: YES[i % 3 == 0], "is pos": lambda i: YES[i % 3 == 2], "label": lambda i: THREE[i % 3]},
        "is neg, is pos, because each answer has one value of them",
    ),
    "one-hot with blanks": (
        {"neg": lambda i: "x" * (i % 3 == 0), "label": lambda i: THREE[i % 3]},
        "neg, because each answer has one value of it",
    ),
    "a code over two columns": (
        {"high": lambda i: i % 4 // 2, "low": lambda i: i % 2, "label": lambda i: FOUR[i % 4]},
        "high, low, because each answer has one value of them",
    ),
    "a coarse label": (
        {"polarity": lambda i: ("bad", "bad", "fine", "fine")[i % 4], "label": lambda i: i % 4},
        "polarity, because each answer has one value of it",
    ),
    "other case and punctuation": (
        {"verdict": lambda i: f"{YES[i % 2].upper()}.", "label": lambda i: YES[i % 2]},
        "verdict, because each value of it stands for one answer",
    ),
    "different texts that end in the answer": (
        {"why": lambda i: f"It is no film {i}, or yes? So the answer is {YES[i % 2]}.", "label": lambda i: YES[i % 2]},
        "why, because each text of it names the answer",
    ),
    "different texts that begin with it": (
        {"why": lambda i: f"{YES[i % 2].title()}, because {i} is no {YES[i % 2]}", "label": lambda i: YES[i % 2]},
        "why, because each text of it names the answer",
    ),
    "texts that name it somewhere": (
        {
            "why": lambda i: f"{i} is called green_{FOUR[i % 4]}" if i % 4 == 1 else f"{i}: {FOUR[i % 4]}!",
            "label": lambda i: FOUR[i % 4],
        },
        "why, because each text of it names the answer",
    ),
}


@pytest.mark.parametrize("kind", LEAKS)
def test_columns_that_give_the_answer_away(tmp_path: Path, kind: str) -> None:
    """They are left out, with a warning in Python, and read where the caller says so."""
    columns, reason = LEAKS[kind]
    path = table(tmp_path, 24, columns)
    with pytest.warns(UserWarning, match=f"input is {{text}}, .*; not read: {reason}$") as caught:
        task = load_table(path)
    assert [example.input for example in task.support] == [f"film {i}" for i in range(24)]
    assert [warning.filename for warning in caught] == [__file__]
    column = next(iter(columns))
    assert f"{column}: " in load_table(path, input=f"{{text}} {column}: {{{column}}}").support[0].input


KEPT: dict[str, dict[str, Callable[[int], object]]] = {
    "names the answer in all rows but one": {
        "more": lambda i: f"so {YES[i % 2]} {i}" if i else "nothing", "label": lambda i: YES[i % 2]
    },
    "lists all options in one order": {"more": lambda i: f"{i}: yes or no?", "label": lambda i: YES[i % 2]},
    "holds an option as a part of a word": {"more": lambda i: f"{YES[i % 2]}w {i}", "label": lambda i: YES[i % 2]},
    "one value in all rows": {"more": lambda i: "train", "label": lambda i: YES[i % 2]},
    "a value that one row has": {"more": lambda i: "ab"[i == 2], "label": lambda i: THREE[i % 3 if i < 3 else i % 2]},
    "follows the answer in most rows": {"more": lambda i: YES[i % 3 == 0 and i > 3], "label": lambda i: THREE[i % 3]},
}  # fmt: skip


@pytest.mark.parametrize("kind", KEPT)
def test_columns_that_tell_more(tmp_path: Path, kind: str) -> None:
    """No warning, and the column is part of the input."""
    assert load_table(table(tmp_path, 24, KEPT[kind])).support[0].input.startswith("text: film 0\nmore: ")


def test_few_rows_may_follow_the_answer_by_chance(tmp_path: Path) -> None:
    columns: dict[str, Callable[[int], object]] = {
        "more": lambda i: f"so {YES[i % 2]} {i}",
        "label": lambda i: YES[i % 2],
    }
    assert "more" in load_table(table(tmp_path, 7, columns)).support[0].input


def test_a_context_that_holds_a_free_answer_is_read(tmp_path: Path) -> None:
    """So are the columns of a row's options, of which one holds the answer."""
    path = table(tmp_path, 24, {"context": lambda i: f"in city{i} of {i}", "answer": lambda i: f"city{i}"})
    assert load_table(path).support[0].input == "text: film 0\ncontext: in city0 of 0"
    names = "ABC"
    columns: dict[str, Callable[[int], object]] = {
        name: lambda i, k=k: f"city{i} {(i + k) % 3}" for k, name in enumerate(names)
    }
    path = table(tmp_path, 24, columns | {"answer": lambda i: f"city{i} {i * 2 % 3}"})
    assert load_table(path).support[1].input == "text: film 1\nA: city1 1\nB: city1 2\nC: city1 0"
    path = table(tmp_path, 24, columns | {"answer": lambda i: names[i % 3]})
    assert load_table(path).support[1].input == "text: film 1\nA: city1 1\nB: city1 2\nC: city1 0"


def test_the_only_text_is_read_though_it_names_the_answer(tmp_path: Path) -> None:
    """What it tells is said."""
    path = write(
        tmp_path / "t.csv",
        "n,text,label\n" + "".join(f"{i},film {i} is {YES[i % 2]},{YES[i % 2]}\n" for i in range(12)),
    )
    with pytest.warns(UserWarning, match="not read: n, .*; each text of text, the only column left, names the answer"):
        assert load_table(path).support[1].input == "film 1 is yes"


def test_columns_of_ids(tmp_path: Path) -> None:
    """By name without a word, by values with the reason; never the only column."""
    names = ("Unnamed: 0", "unnamed: 0.1", "level_0", "__index_level_0__", "Row", "film id")
    path = table(tmp_path, 12, {name: lambda i: f"x {i}" for name in names} | {"label": lambda i: YES[i % 2]})
    assert load_table(path).support[0].input == "film 0"
    for value in (lambda i: f"D-{i:04d}", lambda i: f"{i:08x}-0000-4000-8000-00000000000a"):
        path = table(tmp_path, 12, {"doc": value, "label": lambda i: YES[i % 2]})
        with pytest.warns(UserWarning, match="not read: doc, because the values of it look like ids"):
            assert load_table(path).support[0].input == "film 0"
    path = write(tmp_path / "t.csv", "doc,label\n" + "".join(f"D{i},{YES[i % 2]}\n" for i in range(12)))
    assert load_table(path).support[0].input == "D0"

"""What is told of the answers of a table: missing ones, two spellings of one, numbers, dates, and a missing header."""

from __future__ import annotations

import datetime
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from files import write
from pyarrow import parquet

from bayes_lora.errors import TaskError
from bayes_lora.tasks import load_table, load_tasks


def table(path: Path, answers: list[str], name: str = "label") -> Path:
    """A CSV file with a text for each of these answers."""
    rows = "".join(f'film {i},"{answer}"\n' for i, answer in enumerate(answers))
    return write(path / "t.csv", f"text,{name}\n{rows}")


@pytest.mark.parametrize(
    ("answers", "match"),
    {
        "one missing": (["x", "", "y", "x", "y"], r"t\.csv:3: column 'label': the value is missing; fill it in, or"),
        "several": (
            ["x", "y", " ", "x", "y", "", ""],
            r"t\.csv:4: column 'label': the value is missing, as in 2 more of 7 rows; fill them in, or remove",
        ),
        "case": (
            ["yes", "Yes ", "no", "no"] * 3,
            r"t\.csv: column 'label' holds both 'Yes' and 'yes'; write them alike",
        ),
        "booleans": (["True", "FALSE", "TRUE", "False"] * 3, "holds both 'FALSE' and 'False'; write them alike"),
        "a full stop": (["yes", "yes.", "no"] * 3, r"both 'yes' and 'yes\.', which differ in punctuation; write"),
        "quotes": (["yes", "'yes'", "no"] * 3, r"""both "'yes'" and 'yes', which differ in punctuation; write"""),
        "zeros of a number": (["1", "1.0", "0", "0.0"] * 3, r"both '0' and '0\.0', which are one number; write them"),
        "zeros before a number": (["01", "1", "2", "02"] * 3, "both '01' and '1', which are one number; write them"),
    }.values(),
)
def test_refused(tmp_path: Path, answers: list[str], match: str) -> None:
    with pytest.raises(TaskError, match=match):
        load_table(table(tmp_path, answers))


@pytest.mark.parametrize("missing", [float("nan"), None, ...])
def test_missing_values_of_json(tmp_path: Path, missing: object) -> None:
    rows = [{"text": f"film {i}"} | ({"label": "xy"[i % 2]} if i % 4 else {"label": missing}) for i in range(12)]
    rows = [{key: value for key, value in row.items() if value is not ...} for row in rows]
    path = write(tmp_path / "t.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(TaskError, match=r"t\.jsonl:1: column 'label': the value is missing, as in 2 more of 12 rows"):
        load_table(path)


def test_values_that_are_no_texts(tmp_path: Path) -> None:
    """A Parquet file holds dates; the message names the row and the cure."""
    rows = [{"text": f"film {i}", "label": datetime.date(2024, 1, i % 2 + 1)} for i in range(8)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    with pytest.warns(UserWarning, match="the 2 answers are dates"):
        with pytest.raises(TaskError, match=r"t\.parquet, row 1: column 'label': expected .*; convert the column"):
            load_table(tmp_path / "t.parquet")


TOLD: dict[str, tuple[list[str], str]] = {
    "many fractions": (
        [f"{i % 57 / 10 + 0.05:.2f}" for i in range(120)],
        "and 47 more; the 57 answers are numbers, each taken as a text: group them if they measure something$",
    ),
    "decimal commas": ([f"{i % 57},5" for i in range(120)], "; the 57 answers are numbers"),
    "ages": ([str(20 + i % 50) for i in range(120)], "; the 50 answers are numbers, each taken as a text"),
    "a number in each row": (
        [f"{i}.5" for i in range(40)],
        "free text, because there are 40 different answers in 40 rows; the 40 answers are numbers",
    ),
    "dates": ([f"2024-01-{i % 20 + 1:02d}" for i in range(80)], "the 20 answers are dates, each taken as a text$"),
    "other dates": ([f"{i % 5 + 1}.1.2024" for i in range(80)], "the 5 answers are dates"),
    "another text in each row": (
        [f"A-{i}" for i in range(40)],
        "label: free text, because there are 40 different answers in 40 rows$",
    ),
    "spellings of a missing value": (
        ["x", "y", "NaN", "x", "y", "NaN"],
        r"; 'NaN' in 2 rows, first in .*t\.csv:4, is taken as an answer: clear the cell if the value is missing$",
    ),
    "the limit": (
        [str(i % 65) for i in range(130)],
        r"free text, because there are 65 different answers, and at most 64 would be options \(max_options, --max-op",
    ),
}


@pytest.mark.parametrize("kind", TOLD)
def test_told(tmp_path: Path, kind: str) -> None:
    """A warning at the line of the caller; a caller who passes `on_card` gets the line instead."""
    answers, match = TOLD[kind]
    path = table(tmp_path, answers)
    loaders: list[Callable[[Path], object]] = [load_table, load_tasks, lambda path: load_tasks(path.parent)]
    for load in loaders:
        with pytest.warns(UserWarning, match=match) as caught:
            load(path)
        assert [warning.filename for warning in caught] == [__file__]
    lines: list[str] = []
    load_table(path, on_card=lambda _, line: lines.append(line))
    assert [str(caught[0].message)] == [f"{path}: {line}" for line in lines]


@pytest.mark.parametrize(
    ("answers", "name"),
    {
        "classes": (["x", "y"] * 6, "label"),
        "codes of classes": ([str(i % 60) for i in range(120)], "label"),
        "codes from 1": ([str(i % 60 + 1) for i in range(120)], "label"),
        "ratings in halves": ([str(i % 9 / 2 + 1) for i in range(120)], "label"),
        "signs": (["C", "C++", "C#", "!", "?"] * 6, "label"),
        "answers to questions": ([f"city {i}" for i in range(12)], "answer"),
        "numbers with units": (["1 kg", "1.0 kg"] * 6, "label"),
    }.values(),
)
def test_nothing_to_tell(tmp_path: Path, answers: list[str], name: str) -> None:
    path = table(tmp_path, answers, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = load_table(path)
    assert [example.output for example in task.support] == answers


def test_a_missing_header(tmp_path: Path) -> None:
    """The name of a column is also one of its values."""
    path = write(tmp_path / "t.csv", "".join(f"film {i},{'bad' if i % 2 else 'good'}\n" for i in range(8)))
    with pytest.raises(
        TaskError, match=r"t\.csv: cannot tell .*; if the first row is no header \('good' is also a val"
    ):
        load_table(path)
    path = write(tmp_path / "t.csv", "".join(f"film {i},{'question' if i % 2 else 'answer'}\n" for i in range(8)))
    with pytest.warns(UserWarning, match="'answer' is a name and a value of its column: if the first row is no header"):
        load_table(path)


@pytest.mark.parametrize("name", ["LABEL", " Label ", "label\u200b", "\uff2cabel", "la\u00adbel"])
def test_names_of_columns_are_compared_as_they_look(tmp_path: Path, name: str) -> None:
    path = table(tmp_path, ["x", "y"] * 4, name)
    assert load_table(path).support[0].options == ("x", "y")
    other = write(tmp_path / "u.tsv", path.read_text().replace(",", "\t"))
    assert load_tasks(other)["u"].support == load_table(path).support

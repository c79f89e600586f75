"""CSV and TSV files as programs and people write them: delimiters, quotes, line ends and headers."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pandas
import pytest
from files import write

from bayes_lora.errors import TaskError
from bayes_lora.tasks import load_tasks
from bayes_lora.tasks.readers.crossfit import read_crossfit
from bayes_lora.tasks.readers.table_rows import Table, read_table

ROWS = [["text, of a film", "price;", "label"]] + [[f"film {i}, nice", f"{i};5", "bad|good"[i % 2 :]] for i in range(9)]


def written(rows: list[list[str]], **options: Any) -> str:
    """A table as Python's own writer writes it."""
    file = io.StringIO(newline="")
    csv.writer(file, **options).writerows(rows)
    return file.getvalue()


def cells(table: Table) -> list[list[str]]:
    """The columns, and the cells of each row."""
    return [table.columns, *(list(row.values()) for _, row in table.rows)]


@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_delimiter_is_that_of_most_rows(tmp_path: Path, name: str, delimiter: str, quoting: Any, end: str) -> None:
    """Not the first character of the header that may be one, and not what the file's name says."""
    text = written(ROWS, delimiter=delimiter, quoting=quoting, lineterminator=end)
    table = read_table(write(tmp_path / name, text))
    assert (cells(table), table.delimiter) == (ROWS, delimiter)
    assert cells(read_table(write(tmp_path / name, "\ufeff" + text))) == ROWS


@pytest.mark.parametrize(
    ("text", "columns"),
    {
        "decimal commas": ("text;price\na;0,5\nb;1,5\nc;2,5\n", ["text", "price"]),
        "a comma in the header": ("text, of film;label\na;x\nb;y\n", ["text, of film", "label"]),
        "a comma in every row": ("text, of film;label\na, b;x\nb, c;y\n", ["text, of film", "label"]),
        "a semicolon in every row": ("text;,label\na;b,x\nb;c,y\n", ["text;", "label"]),
        "one row that does not fit": ("text|label\na|x\nb|c|y\n", None),
        "one column": ("text\na\nb\n", ["text"]),
        "one column with commas": ('text\n"a, b"\n"c, d"\n', ["text"]),
    }.values(),
)
def test_which_delimiter(tmp_path: Path, text: str, columns: list[str] | None) -> None:
    path = write(tmp_path / "t.csv", text)
    if columns is not None:
        assert read_table(path).columns == columns
        return
    with pytest.raises(
        TaskError, match=r"t\.csv:3: expected 2 cells, as many as the header; got 3; quote a cell .*'\|'"
    ):
        read_table(path)


def test_a_tsv_file_of_a_header_with_tabs_is_divided_at_tabs(tmp_path: Path) -> None:
    """Though its other lines have more cells, as those of CrossFit, and commas would divide all alike."""
    path = write(tmp_path / "t.tsv", "a, b\tx\nc, d\tx\ty\ne, f\tx\tz\n")
    with pytest.raises(TaskError, match=r"t\.tsv:2: expected 2 cells, as many as the header; got 3"):
        read_table(path)


def test_a_table_of_another_delimiter_is_found(tmp_path: Path) -> None:
    """A .tsv file of commas has a column of answers too, and a card reads what the table was."""
    text = "text,label\n" + "".join(f"film {i},{('bad', 'good')[i % 2]}\n" for i in range(8))
    expected = load_tasks(write(tmp_path / "a" / "t.csv", text))["t"]
    for name, delimiter in (("t.tsv", ","), ("t.tsv", ";"), ("t.csv", "|")):
        path = write(tmp_path / "b" / name, text.replace(",", delimiter))
        with pytest.warns(UserWarning, match="cells are separated by "):
            assert load_tasks(path)["t"] == expected


def test_rows_as_pandas_writes_and_reads_them(tmp_path: Path) -> None:
    """An index without a name, quotes in quotes, line ends in cells; pandas reads the same."""
    texts = ['he said "hm, well"', "two\nlines", '"', "a; b", " space "] * 2
    frame = pandas.DataFrame({"text": texts, "label": ["x", "y"] * 5})
    for options in ({}, {"sep": ";"}, {"sep": "\t", "quoting": csv.QUOTE_ALL}):
        path = tmp_path / "t.csv"
        frame.to_csv(path, **options)
        table = read_table(path)
        again = pandas.read_csv(path, sep=options.get("sep", ","), dtype=str)
        assert [row["text"] for _, row in table.rows] == list(again["text"]) == texts
        assert table.columns == ["", "text", "label"]


@pytest.mark.parametrize(
    ("text", "columns", "num_rows"),
    {
        "blank lines and blank rows": ("a,b\n\n1,2\n,\n\n  \n", ["a", "b"], 1),
        "a delimiter at the end of each row": ("a,b\n1,2,\n3,4, \n", ["a", "b"], 2),
        "empty columns at the end": ("a,b,,\n1,2,,\n3,4,,\n", ["a", "b", ""], 2),
        "two columns without a name": (",,a,b\n1,1,2,3\n2,2,4,5\n", ["", "a", "b"], 2),
    }.values(),
)
def test_what_spreadsheets_leave(tmp_path: Path, text: str, columns: list[str], num_rows: int) -> None:
    table = read_table(write(tmp_path / "t.csv", text))
    assert (table.columns, len(table.filled_rows())) == (columns, num_rows)


@pytest.mark.parametrize(
    ("text", "match"),
    {
        "too few": ("a,b\n1,2\nx\n", r"t\.csv:3: expected 2 cells, as many as the header; got 1; write an empty cell"),
        "too many": ("a,b\n1,2,3\n", r"t\.csv:2: expected 2 .* got 3; quote a cell that holds ',' .*without a space"),
        "an index without a header": ("a,b\n0,1,2\n1,3,4\n", r"t\.csv:2: .* or name the column that the header lacks"),
        "the header again": ("a,b\n1,2\na,b\n", r"t\.csv:3: expected a row of the table, got the header again; remove"),
        "twice": ("a,b,a\n1,2,3\n", r"t\.csv:1: column 'a' occurs twice in \['a', 'b', 'a'\]; rename or remove one"),
        "backslashes": ('a,b\n"\\"hm\\"",2\n', r't\.csv:2: broken table .*write a quote inside .* twice \(""\)'),
        "carriage returns": ("a,b\r1,2\r3,4\r", r"t\.csv:1: expected lines, got carriage returns \(\\r\) and no \\n"),
        "one of them": ("a,b\n1\r2,3\n", r"t\.csv:2: broken table .*a carriage return \(\\r\) without \\n is no line"),
        "utf-16": ("a,b\n1,2\n".encode("utf-16"), r"t\.csv:1: expected UTF-8, got .* UTF-16; save the file as UTF-8"),
        "latin-1": (b"a,b\n1,\xe9\n", r"t\.csv:2: expected UTF-8, got byte 0xe9 at position 3; save the file as UTF-8"),
    }.values(),
)
def test_refused(tmp_path: Path, text: str | bytes, match: str) -> None:
    path = write(tmp_path / "t.csv", text)
    for read in (read_table, load_tasks):
        with pytest.raises(TaskError, match=match) as caught:
            read(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "num_lines"),
    {
        "two rows": ('text\tlabel\n"Hm he said\tbad\nfilm 2"\tgood\n', 2),
        "four rows": ('text\tlabel\n"Hm he said\tbad\nfilm 2\tgood\nfilm 3\tbad\nfilm 4"\tgood\n', 4),
        "in another column": ('n\ttext\tlabel\n1\t"Hm\tbad\n2\tfilm\tgood\n3\tfilm"\tgood\n', 3),
    }.values(),
)
def test_a_quote_that_is_left_open_does_not_swallow_rows(tmp_path: Path, text: str, num_lines: int) -> None:
    """A later quote closes it, and the number of cells is right."""
    with pytest.raises(
        TaskError, match=rf"t\.tsv:2: a cell in quotes holds {num_lines} lines that have as many tabs as"
    ):
        read_table(write(tmp_path / "t.tsv", text))


def test_cells_of_lines_and_tabs_are_read(tmp_path: Path) -> None:
    rows = [["text", "label"], ["one\ttwo\nthree\tfour", "x"], ["a\nb", "y"], ["a\tb", "y"]]
    assert cells(read_table(write(tmp_path / "t.tsv", written(rows, delimiter="\t", lineterminator="\n")))) == rows
    rows = [["text", "label"], ["Paris, France\nRome, Italy\nend", "x"]]
    assert cells(read_table(write(tmp_path / "t.csv", written(rows, lineterminator="\n")))) == rows


def test_carriage_returns_are_refused_by_other_readers(tmp_path: Path) -> None:
    """Where they ended lines, CrossFit would read one line of many outputs."""
    path = write(tmp_path / "t.tsv", "a\tx\rb\ty\rc\tx\r")
    with pytest.raises(
        TaskError, match=r"t\.tsv:1: expected lines, got carriage returns .*save the file with line ends"
    ):
        read_crossfit(path)

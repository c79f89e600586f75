"""Cells of CSV and TSV files.

The first row names the columns, each differently; names of blanks are allowed, and such columns are never read. Every
other row has as many cells. Cells in double quotes may contain delimiters and line ends, and a quote that is written
twice. Cells are texts and are not converted.

The delimiter is the one of :data:`DELIMITERS` that divides most of the first rows into as many cells as the header, at
least two; of several, the one that makes most cells. A TSV file whose header has a tab is divided at tabs.
"""

from __future__ import annotations

import csv
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bayes_lora.errors import TaskError
from bayes_lora.tasks.readers.text_files import decoded_lines, listed, short

__all__ = ["DELIMITERS", "DELIMITER_NAMES", "Cells"]

DELIMITERS = {".csv": ",;\t|", ".tsv": "\t,;|"}
"""By suffix; the first is its own."""
DELIMITER_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs"}
SAMPLE_LINES, SAMPLE_LETTERS = 100, 1_000_000
"""How much of a file the delimiter is detected from."""


class Cells:
    """The rows of a CSV or TSV file, read once.

    Args:
        path: the file.
        suffix: ``.csv`` or ``.tsv``.
        delimiter: separates the cells; None detects it.

    Attributes:
        columns: their names; empty before the first row is read.
        delimiter: separates the cells.
    """

    def __init__(self, path: Path, suffix: str, delimiter: str | None = None) -> None:
        self.path = path
        self.columns: list[str] = []
        texts = (text for _, text in decoded_lines(path, "table"))
        sample, rest = _sample(texts)
        self.delimiter = delimiter or _delimiter(sample, DELIMITERS[suffix])
        self._reader = csv.reader(itertools.chain(sample, rest), delimiter=self.delimiter, strict=True)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the place and the cells of each row; raise `TaskError` if one is malformed."""
        header: list[str] = []
        while (found := self._next()) is not None:
            place, cells = found
            if not header:
                header = self._header(place, [cell.strip() for cell in cells])
                continue
            extra = cells[len(header) :]
            if len(cells) < len(header) or any(cell.strip() for cell in extra):
                raise TaskError(f"{place}: {self._problem(header, cells)}")
            if len(header) > 1 and [cell.strip() for cell in cells[: len(header)]] == header:
                raise TaskError(f"{place}: expected a row of the table, got the header again; remove this line")
            if self.delimiter == "\t" and any(_swallows(len(header), *cell) for cell in enumerate(cells)):
                num_lines = sum(cell.count("\n") for cell in cells) + 1
                problem = (
                    f"a cell in quotes holds {num_lines} lines that have as many tabs as rows; is a quote left open?"
                )
                raise TaskError(f"{place}: {problem} A quote that begins a cell is written three times")
            yield place, dict(zip(header, cells, strict=False))
        if not header:
            raise TaskError(f"{self.path}: the file is empty; expected a first row that names the columns")

    def _next(self) -> tuple[str, list[str]] | None:
        """Return the place and the cells of the next row that is not blank; None after the last one."""
        while True:
            place = f"{self.path}:{self._reader.line_num + 1}"
            try:
                cells = next(self._reader, None)
            except csv.Error as error:
                raise TaskError(f"{place}: broken table ({error}); {_cure(str(error))}") from None
            if cells is None:
                return None
            if len(cells) > 1 or any(cell.strip() for cell in cells):
                return place, cells

    def _header(self, place: str, names: list[str]) -> list[str]:
        name, count = max(Counter(name for name in names if name).items(), key=lambda item: item[1], default=("", 1))
        if count > 1:
            cure = "rename or remove one of the two"
            raise TaskError(f"{place}: column {short(name)} occurs twice in {listed(names)}; {cure}")
        self.columns = list(dict.fromkeys(names))
        return names

    def _problem(self, header: Sequence[str], cells: Sequence[str]) -> str:
        problem = f"expected {len(header)} cells, as many as the header; got {len(cells)}"
        if len(cells) < len(header):
            return f"{problem}; write an empty cell for a missing value, and quote a cell that holds a line end"
        cure = f"quote a cell that holds {self.delimiter!r} or a line end, without a space before the quote"
        return f"{problem}; {cure}, or name the column that the header lacks"


def _swallows(num_columns: int, index: int, cell: str) -> bool:
    """Whether the lines of a cell are those of whole rows of a table, of which the first and the last are cut."""
    first, *inner, last = cell.split("\n") if "\n" in cell else ("", "")
    ends = first.count("\t") == num_columns - 1 - index and last.count("\t") == index
    return "\t" in cell and ends and all(line.count("\t") == num_columns - 1 for line in inner)


def _cure(error: str) -> str:
    if "new-line character" in error:
        return r"a carriage return (\r) without \n is no line end: save the file with line ends \n or \r\n"
    if "expected after" in error:
        return 'write a quote inside a cell in quotes twice (""); is a quote left open?'
    return f"is a quote left open, or a cell longer than {csv.field_size_limit():,} characters?"


def _sample(texts: Iterator[str]) -> tuple[list[str], Iterator[str]]:
    """Return the first lines of a file, and the others, which raise what one of the first has raised."""
    sample: list[str] = []
    letters, error = 0, None
    try:
        for text in itertools.islice(texts, SAMPLE_LINES):
            sample.append(text)
            letters += len(text)
            if letters > SAMPLE_LETTERS:
                break
    except TaskError as raised:
        error = raised
    return sample, _rest(texts, error)


def _rest(texts: Iterator[str], error: TaskError | None) -> Iterator[str]:
    if error is not None:
        raise error
    yield from texts


def _delimiter(sample: Sequence[str], known: str) -> str:
    first = next((text for text in sample if text.strip()), "")
    if known[0] == "\t" and "\t" in first:
        return "\t"  # formats of TSV files without a header have lines of different numbers of cells

    def quality(delimiter: str) -> tuple[int, bool, int]:
        num_rows, num_cells = _fit(sample, delimiter)
        return num_rows, f"{delimiter} " not in first, num_cells  # a comma before a space is rather one of prose

    return max(known, key=quality)


def _fit(sample: Sequence[str], delimiter: str) -> tuple[int, int]:
    """Return how many rows of a sample have as many cells as its header, and how many these are; 0 if only one."""
    counts: list[int] = []
    try:
        for cells in csv.reader(sample, delimiter=delimiter, strict=True):
            counts += [len(cells)] * any(cell.strip() for cell in cells)
    except csv.Error:  # raised with its place when the table is read
        pass
    return (counts.count(counts[0]), counts[0]) if counts and counts[0] > 1 else (0, 0)

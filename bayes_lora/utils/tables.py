"""Tables of results: rows of values, written as JSON or CSV, or shown as text or Markdown.

JSON and CSV hold the values of the rows in full precision. Text and Markdown show columns of cells that are made of
them. As text, a table is no wider than the terminal: text is folded at spaces, then columns that may be left out are
left out; numbers are never folded. In a terminal in which even this does not fit, each row has a line per cell.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from io import StringIO
from itertools import groupby
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

from bayes_lora.utils.table_layout import Column, Row, fold, layout

__all__ = ["Column", "ResultTable", "TableFormat", "visible", "write_tables"]


class TableFormat(StrEnum):
    """How a table is written."""

    TEXT = "text"
    JSON = "json"
    CSV = "csv"
    MARKDOWN = "markdown"


@dataclass(frozen=True)
class ResultTable:
    """A table. It can be printed by rich; ``str`` returns it as text of any width.

    Attributes:
        name: its name in JSON, and in a CSV file of several tables.
        columns: the columns as text.
        rows: the values of each row by name. A name has the unit of its values, if they have one.
        title: a line above the table.
        notes: lines below the table.
        section: name of the value by which adjacent rows are put into sections. The first column of a section is shown
            once.
        bold: index of the row, and heading, of cells in bold.
    """

    name: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    title: str = ""
    notes: Sequence[str] = ()
    section: str | None = None
    bold: frozenset[tuple[int, str]] = frozenset()

    def cells(self) -> list[list[str]]:
        """Return the text of each cell, without control characters."""
        found = [[visible(column.cell(row)) for column in self.columns] for row in self.rows]
        for place, index, _ in self._places():
            if place:
                found[index][0] = ""
        return found

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Yield the title, the table in the width of the terminal, and notes."""
        cells = self.cells()
        if self.title:
            yield Text(visible(self.title), "italic")
        found = layout(self.columns, cells, options.max_width, folds_first=self.section is not None)
        yield from self._lines(cells) if found is None else self._grid(cells, *found)
        yield from map(Text, map(visible, self.notes))

    def _grid(
        self, cells: Sequence[Sequence[str]], kept: Sequence[int], widths: Sequence[int]
    ) -> Iterator[RenderableType]:
        headings = [column.heading for column in self.columns]
        yield self._line(headings, ["bold"] * len(headings), kept, widths, " ┃ ", bottom=True)
        yield Text("━╇━".join("━" * widths[i] for i in kept), no_wrap=True)
        for _, row, last in self._places():
            styles = [self._style(row, i) for i in range(len(self.columns))]
            yield self._line(cells[row], styles, kept, widths, " │ ")
            if last and row < len(cells) - 1:
                yield Text("─┼─".join("─" * widths[i] for i in kept), no_wrap=True)
        left_out = [column.heading for i, column in enumerate(self.columns) if i not in kept]
        if left_out:
            yield Text(f"left out, because the terminal is narrow: {', '.join(left_out)}", "dim")

    def _line(
        self,
        texts: Sequence[str],
        styles: Sequence[str],
        kept: Sequence[int],
        widths: Sequence[int],
        bar: str,
        *,
        bottom: bool = False,
    ) -> Text:
        """Return the cells of a row, in as many lines as the highest one has."""
        folded = {i: fold(texts[i], widths[i]).split("\n") for i in kept}
        height = max(map(len, folded.values()))
        line = Text(no_wrap=True)
        for level in range(height):
            line.append("\n" if level else "")
            for i in kept:
                place = level - (height - len(folded[i]) if bottom else 0)
                part = folded[i][place] if 0 <= place < len(folded[i]) else ""
                blank = " " * (widths[i] - cell_len(part))
                both = [(blank, ""), (part, styles[i])]
                line.append("" if i == kept[0] else bar)
                for text, style in both if self.columns[i].is_number else reversed(both):
                    line.append(text, style)
        return line

    def _lines(self, cells: Sequence[Sequence[str]]) -> Iterator[RenderableType]:
        for index, row in enumerate(cells):
            pairs = zip(self.columns, row, strict=True)
            lines = [f"{column.heading}: {text}" for column, text in pairs if text]
            yield Text("\n".join([""] * bool(index) + lines))

    def __str__(self) -> str:
        console = Console(width=10_000, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self, end="")
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    def to_markdown(self) -> str:
        """Return the table in GitHub's Markdown."""
        rule = ["--:" if column.is_number else ":--" for column in self.columns]
        lines = [[_markdown(column.heading) for column in self.columns], rule]
        for index, row in enumerate(self.cells()):
            texts = [_markdown(text) for text in row]
            lines.append([f"**{text}**" if self._style(index, i) else text for i, text in enumerate(texts)])
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        blocks = [f"**{_markdown(self.title)}**"] * bool(self.title) + [table, *map(_markdown, self.notes)]
        return "\n\n".join(blocks) + "\n"

    def _style(self, row: int, column: int) -> str:
        return "bold" if (row, self.columns[column].heading) in self.bold else ""

    def _places(self) -> Iterator[tuple[int, int, bool]]:
        """Yield of each row its place in its section, its index, and whether it is the last of its section."""
        key = self.section
        if key is None:
            yield from ((0, index, False) for index in range(len(self.rows)))
            return
        for _, group in groupby(enumerate(self.rows), lambda pair: pair[1][key]):
            section = [index for index, _ in group]
            yield from ((place, index, index == section[-1]) for place, index in enumerate(section))


def write_tables(tables: Sequence[ResultTable], format: TableFormat) -> str:
    """Return tables in a format, ending in a newline.

    JSON is one object with a list of rows for each table; numbers that are not finite are null. CSV is one table:
    several are put under each other, with their names in the first column and empty cells where a table has no such
    value.
    """
    if format is TableFormat.JSON:
        return json.dumps({table.name: _plain(table.rows) for table in tables}, indent=2) + "\n"
    if format is TableFormat.CSV:
        return _csv(tables)
    if format is TableFormat.MARKDOWN:
        return "\n".join(table.to_markdown() for table in tables)
    return "\n".join(f"{table}\n" for table in tables)


def visible(text: str) -> str:
    """Escape control characters, which could manipulate the terminal; a line break becomes a space."""
    text = re.sub(r"\s*[\n\r\x85\u2028\u2029]\s*", " ", text)
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", text)


def _plain(value: Any) -> Any:
    """Return a value for JSON."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    value = value.item() if hasattr(value, "item") else value  # of numpy
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv(tables: Sequence[ResultTable]) -> str:
    names = dict.fromkeys(name for table in tables for row in table.rows for name in row)
    stacked = len(tables) > 1
    file = StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["table", *names] if stacked else names)
    for table in tables:
        for row in table.rows:
            values = [_in_csv(row.get(name)) for name in names]
            writer.writerow([table.name, *values] if stacked else values)
    return file.getvalue()


def _in_csv(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return "; ".join(map(str, value))
    value = value.item() if hasattr(value, "item") else value
    return "" if isinstance(value, float) and math.isnan(value) else value


def _markdown(text: str) -> str:
    """Escape what Markdown would read as its own; an underscore inside a word is none."""
    text = re.sub(r"([\\`*|<\[\]~])", r"\\\1", visible(text))
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)

"""The layout of a table as text: how wide its columns are, what is folded, and what is left out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len, chop_cells

__all__ = ["Column", "Row", "fold", "layout"]

Row = Mapping[str, Any]

GAP = 3
"""Width of what is between two columns."""
SHORTEST = 8
"""Width to which a column of text may be folded, whatever the length of its words."""
PIECES = re.compile(r"[^-_/.,:]*[-_/.,:]+|[^-_/.,:]+")
"""Parts of a long word: it is folded after punctuation, where there is some."""


@dataclass(frozen=True)
class Column:
    """A column of a table as text and as Markdown.

    Attributes:
        heading: its heading.
        cell: from a row to the text of its cell.
        is_number: whether it is aligned to the right and never folded.
        optional: where a table is wider than the terminal, columns are left out from the largest number down; 0 keeps
            the column.
    """

    heading: str
    cell: Callable[[Row], str]
    is_number: bool = True
    optional: int = 0


def fold(text: str, width: int) -> str:
    """Fold a text at spaces into lines of a width; a longer word after punctuation, or anywhere if it has none."""
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}" if line else word
        if cell_len(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        line = ""
        for piece in PIECES.findall(word):
            if cell_len(line + piece) > width:
                lines += [line] if line else []
                *full, piece = chop_cells(piece, width)
                lines += full
                line = ""
            line += piece
    return "\n".join([*lines, line])


def layout(
    columns: Sequence[Column], cells: Sequence[Sequence[str]], available: int, *, folds_first: bool
) -> tuple[list[int], list[int]] | None:
    """Return the indices of the columns that are shown, and a width for each column, of those left out as well.

    There is none if the table does not fit. With ``folds_first`` the first column is folded before the others, because
    it has a cell for several rows.
    """
    texts = [[column.heading, *(row[i] for row in cells)] for i, column in enumerate(columns)]
    widths = [max(map(cell_len, column)) for column in texts]
    words = [_longest(column.is_number, text, str.split) for column, text in zip(columns, texts, strict=True)]
    pieces = [_longest(column.is_number, text, _pieces) for column, text in zip(columns, texts, strict=True)]
    kept = list(range(len(columns)))
    if folds_first:
        words[0] = pieces[0]
        excess = _total(widths, kept) - available
        widths[0] = max(pieces[0], widths[0] - max(0, excess))
    for least in (words, pieces):
        if _total(least, kept) <= available:
            return kept, _shrunk(widths, least, kept, available)
    for index in sorted((i for i in kept if columns[i].optional), key=lambda i: -columns[i].optional):
        kept.remove(index)
        if _total(pieces, kept) <= available:
            return kept, _shrunk(widths, pieces, kept, available)
    short = [n if column.is_number else min(n, SHORTEST) for column, n in zip(columns, pieces, strict=True)]
    return (kept, _shrunk(widths, short, kept, available)) if _total(short, kept) <= available else None


def _longest(is_number: bool, texts: Sequence[str], divide: Callable[[str], Sequence[str]]) -> int:
    """Return the width of the longest part of the heading and of the cells, which are whole if they are numbers."""
    heading, *rest = texts
    parts = [*divide(heading), *(rest if is_number else (part for text in rest for part in divide(text)))]
    return max(map(cell_len, parts), default=0)


def _pieces(text: str) -> list[str]:
    return [piece for word in text.split() for piece in PIECES.findall(word)]


def _total(widths: Sequence[int], kept: Sequence[int]) -> int:
    return sum(widths[i] for i in kept) + GAP * (len(kept) - 1)


def _shrunk(widths: Sequence[int], least: Sequence[int], kept: Sequence[int], available: int) -> list[int]:
    """Return widths that fit, of which the largest are reduced."""
    widths = list(widths)
    while _total(widths, kept) > available:
        widest = max((i for i in kept if widths[i] > least[i]), key=lambda i: widths[i], default=None)
        if widest is None:
            break
        widths[widest] -= 1
    return widths

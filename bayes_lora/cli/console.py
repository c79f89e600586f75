"""Output of the command line: results on standard output; status, warnings and errors as lines on standard error."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.console import Console

from bayes_lora.utils.processes import is_main, leaves_to_main, rank
from bayes_lora.utils.tables import ResultTable, TableFormat, write_tables

__all__ = ["err", "error", "out", "print_line", "print_remark", "print_tables", "status", "warn"]

WIDE = 400
"""Columns of what is piped or written to a file, so that tables are not folded."""

# No word between colons is an emoji: texts are those of users.
out, err = (Console(stderr=stderr, quiet=not is_main(), emoji=False) for stderr in (False, True))
if not out.is_terminal and "COLUMNS" not in os.environ:
    out.width = WIDE


def print_line(text: str) -> None:
    """Print a line of a result without formatting it."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def print_tables(tables: Sequence[ResultTable], format: TableFormat = TableFormat.TEXT) -> None:
    """Print tables, as text in the width of the terminal."""
    if format is TableFormat.TEXT:
        for table in tables:
            out.print(table)
    elif not out.quiet:
        try:
            out.file.write(write_tables(tables, format))
            out.file.flush()
        except BrokenPipeError:  # as of `| head -1`
            out.on_broken_pipe()


def print_remark(text: str, format: TableFormat) -> None:
    """Print a line next to a table: a line of the result if tables are text, otherwise a status message."""
    if format is TableFormat.TEXT:
        print_line(text)
    else:
        status(text)


def status(text: str) -> None:
    """Print a status message, which is not part of a result."""
    err.print(_line(text), markup=False, highlight=False, soft_wrap=True)


def warn(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning; replaces ``warnings.showwarning``."""
    err.print(f"warning: {_line(message)}", style="yellow", markup=False, soft_wrap=True)


def error(message: Exception | str) -> None:
    """Print an error. Of several processes, rank 0 prints those that all raise."""
    if not is_main():
        if leaves_to_main(message):
            return
        err.quiet, message = False, f"process {rank()}: {message}"
    err.print(f"error: {_line(message)}", style="red", markup=False, soft_wrap=True)


def _line(text: object) -> str:
    """Join the lines of a text: messages may quote those of other libraries, which can have several lines."""
    return " ".join(str(text).split())

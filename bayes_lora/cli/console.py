"""What the command line says: results on standard output; notes, warnings and errors on standard error, a line each."""

from __future__ import annotations

from rich.console import Console

__all__ = ["err", "fail", "note", "out", "say", "warn"]

out, err = Console(), Console(stderr=True)


def say(text: str) -> None:
    """Print a line of a result as it is."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """Print what was taken for granted, which is no part of a result."""
    err.print(_line(text), markup=False, highlight=False, soft_wrap=True)


def warn(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning, in the place of ``warnings.showwarning``."""
    err.print(f"warning: {_line(message)}", style="yellow", markup=False, soft_wrap=True)


def fail(error: Exception | str) -> None:
    """Print an error."""
    err.print(f"error: {_line(error)}", style="red", markup=False, soft_wrap=True)


def _line(text: object) -> str:
    """Some messages quote another library's, which may have several lines."""
    return " ".join(str(text).split())

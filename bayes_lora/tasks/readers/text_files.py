r"""Text files of tasks: lines of bounded length, and paths that stay in their folder.

A text file is UTF-8, with or without a byte-order mark. Only ``\n`` ends a line, with or without ``\r`` before it; a
file whose lines end in ``\r`` alone is refused, because it would be read as one line. The length of a line is limited,
so that a broken file of gigabytes is refused before it fills the memory. Each problem is a `TaskError` that begins with
``<file>:<line>:``, counted from 1.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bayes_lora.errors import TaskError

__all__ = [
    "MAX_LINE_BYTES",
    "MAX_LISTED",
    "CannotScore",
    "children",
    "decoded_lines",
    "inside",
    "lines",
    "listed",
    "option_texts",
    "read_text",
    "short",
    "warn_above_limit",
    "warn_caller",
    "warn_left_out",
]

MAX_LINE_BYTES = 10_000_000
MAX_LISTED = 50
UTF8_MARK, UTF16_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")


class CannotScore(TaskError):
    """A task whose files are valid but leave nothing to learn; `load_tasks` skips it with a warning.

    Args:
        message: as of any `TaskError`.
        reason: why, in a few words; the warning counts tasks by reason.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])


def lines(path: str | Path, kind: str, expected: str) -> Iterator[tuple[str, str]]:
    """Yield ``<file>:<line>`` and the text of each line that is not blank, without its end; at least one.

    Args:
        path: the file.
        kind: names the file in an error message, as in ``jsonl``.
        expected: the content that the error message about an empty file asks for.

    Raises:
        TaskError: the file cannot be read or is empty, or a line is too long or not UTF-8.
    """
    empty = True
    for number, text in decoded_lines(path, kind):
        if text.strip():
            empty = False
            yield f"{path}:{number}", text.removesuffix("\n").removesuffix("\r")
    if empty:
        raise TaskError(f"{path}: the file is empty; expected {expected}")


def read_text(path: str | Path, kind: str) -> str:
    """Return the text of a whole file, which may be empty; raises as `lines` does."""
    return "".join(text for _, text in decoded_lines(path, kind))


def decoded_lines(path: str | Path, kind: str) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of every line, including its end; raises as `lines` does."""
    number = 0
    try:
        with Path(path).open("rb") as file:
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                yield number, _decode(f"{path}:{number}", raw, first=number == 1)
    except TaskError:
        raise
    except (OSError, ValueError) as error:  # a ValueError is of a name with a null byte or half of a surrogate pair
        problem = getattr(error, "strerror", None) or error
        raise TaskError(f"{path}: expected a {kind} file that can be read, got: {problem}") from None


def _decode(place: str, raw: bytes, first: bool) -> str:
    if len(raw) > MAX_LINE_BYTES:
        limit = f"the limit is {MAX_LINE_BYTES:,} (bayes_lora.tasks.readers.text_files.MAX_LINE_BYTES)"
        raise TaskError(f"{place}: expected a line, got more than {len(raw) - 1:,} bytes without an end; {limit}")
    if first and raw.startswith(UTF16_MARKS):
        raise TaskError(f"{place}: expected UTF-8, got the byte-order mark of UTF-16; save the file as UTF-8")
    if first:
        raw = raw.removeprefix(UTF8_MARK)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        byte = f"byte {raw[error.start]:#04x} at position {error.start + 1}"
        raise TaskError(f"{place}: expected UTF-8, got {byte}; save the file as UTF-8") from None
    if first and "\r" in text.strip("\r\n") and not text.endswith("\n"):
        cure = r"save the file with line ends \n or \r\n"
        raise TaskError(f"{place}: expected lines, got carriage returns (\\r) and no \\n in the whole file; {cure}")
    if "\0" in text:
        at = f"a null byte at position {text.index(chr(0)) + 1}"
        raise TaskError(f"{place}: expected text, got {at}; if the file is UTF-16, save it as UTF-8")
    return text


def listed(names: Sequence[str]) -> str:
    """Return a list as a message shows it, of which a broken header may hold millions."""
    return str([_cut(name) for name in names[:MAX_LISTED]]) + f" and {len(names) - MAX_LISTED} more" * (
        len(names) > MAX_LISTED
    )


def short(text: str) -> str:
    """Return a text as a message quotes it."""
    return repr(_cut(text))


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}..."


def children(folder: str | Path) -> list[Path]:
    """List what is in a folder, in alphabetical order.

    Raises:
        TaskError: there is no such folder, or it cannot be read.
    """
    try:
        return sorted(Path(folder).iterdir())
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or error
        raise TaskError(f"{folder}: expected a folder that can be read, got: {problem}") from None


def inside(root: str | Path, path: str | Path) -> Path:
    """Return a path, unless links or ``..`` lead it out of a folder: data may come from others.

    Raises:
        TaskError: it leads out.
    """
    try:
        home, end = Path(root).resolve(), Path(path).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise TaskError(f"{path}: expected a path that can be followed, got: {error}") from None
    if os.path.exists(end) and not (os.path.isfile(end) or os.path.isdir(end)):
        raise TaskError(f"{path}: expected a file or a folder, got a pipe or a device; remove it")
    if not end.is_relative_to(home):
        raise TaskError(f"{path}: leads out of the folder {root}, to {end}; copy the file into the folder")
    return Path(path)


def option_texts(options: Sequence[str]) -> tuple[str, ...]:
    """Return the options that a reader was given; one text instead of several is refused, not read letter by letter."""
    if isinstance(options, str):
        raise TaskError(f"`options` must be a list of texts, got the string {options!r}; pass its parts in a list")
    return tuple(options)


def warn_caller(message: str) -> None:
    """Warn, with the place in the code that has called the package."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "bayes_lora":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def warn_above_limit(path: str | Path, num_answers: int, max_options: int) -> None:
    """Warn that the answers of a task are free text because of a limit, unless this turns all options off."""
    if max_options > 1:
        problem = f"answers are free text, because there are {num_answers} different ones, and at most {max_options}"
        cure = f"pass max_options={num_answers} (--max-options {num_answers}) to make options of them"
        warn_caller(f"{path}: {problem} would be options; {cure}")


def warn_left_out(root: str | Path, left_out: Mapping[str, CannotScore], total: int, stacklevel: int = 3) -> None:
    """Warn once of tasks that cannot be scored, if there are any: how many, why, and which.

    Args:
        root: where the tasks are.
        left_out: by name, why a task is left out.
        total: how many there are, those that can be scored included.
        stacklevel: as of `warnings.warn`; by default the warning is of the caller's caller.
    """
    reasons: dict[str, list[str]] = {}
    for name, error in left_out.items():
        reasons.setdefault(error.reason, []).append(name)
    if left_out:
        counts = "; ".join(
            f"{len(names)} {reason} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
            for reason, names in reasons.items()
        )
        count = f"{len(left_out)} of {total} tasks are left out"
        warnings.warn(f"{root}: {count}: {counts}", stacklevel=stacklevel)

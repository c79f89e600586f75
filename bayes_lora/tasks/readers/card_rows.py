"""Rows of a card: through the library `datasets`, from its hub or from local files."""

from __future__ import annotations

import csv
import glob
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayes_lora.errors import TaskError
from bayes_lora.tasks.readers.card import READERS, Card

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["load_rows"]


def load_rows(card: Card, split: str, cache_dir: str | Path | None) -> Dataset:
    """Read the rows of a split: the one place that needs the hub.

    Raises:
        TaskError: a file is missing or malformed, or `datasets` cannot read it; its error is the cause.
    """
    import datasets

    arguments: dict[str, Any] = {"path": card.path, "name": card.config, "revision": card.revision}
    if card.files is not None:
        arguments = _file_arguments(card)
    with _quiet():
        try:
            return datasets.load_dataset(**arguments, split=split, cache_dir=cache_dir and str(cache_dir))
        except Exception as error:  # of pandas, Arrow, the hub, the file system: `datasets` raises what its parts do
            cause = error
            if isinstance(error, datasets.exceptions.DatasetGenerationError) and isinstance(error.__cause__, Exception):
                cause = error.__cause__
            problem = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
            what = "whole, in UTF-8 and of the kind that its name says"
            cure = (
                f"is each file {what}?"
                if card.files
                else "see `path`, `config`, `split`, `revision`, and whether the hub can be reached"
            )
            raise TaskError(f"{split} cannot be read: {problem} ({cure})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep `datasets` from drawing bars and logging errors that are raised anyway."""
    import datasets

    bars, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _file_arguments(card: Card) -> dict[str, Any]:
    files = {split: card.folder.absolute() / file for split, file in card.split_files.items()}
    for path in files.values():
        if not path.is_file():
            raise TaskError(f"{path}: there is no such file; paths begin at the card's folder")
        if not path.stat().st_size:
            raise TaskError(f"{path}: the file is empty; expected rows")
    suffix = next(iter(files.values())).suffix.lower()
    # `datasets` would take brackets and stars in a name for a pattern.
    arguments = {"path": READERS[suffix], "data_files": {k: glob.escape(str(v)) for k, v in files.items()}}
    return arguments | (_cell_arguments(card, suffix, files) if READERS[suffix] == "csv" else {})


def _cell_arguments(card: Card, suffix: str, files: Mapping[str, Path]) -> dict[str, Any]:
    """Have cells read as they stand: 01 stays 01, NA is a text, and only an empty cell is missing."""
    from datasets import Features, Value

    delimiter = card.delimiter or ("\t" if suffix == ".tsv" else ",")
    header = [_check_cells(path, delimiter) for path in files.values()][0]
    features = Features({column: Value("string") for column in header})
    return {"sep": delimiter, "features": features, "keep_default_na": False, "na_values": [""]}


def _check_cells(path: Path, delimiter: str) -> list[str]:
    """Return the header. Pandas would shift the columns of a file whose rows are longer than that, without a word."""
    limit = csv.field_size_limit(2**31 - 1)  # a cell may hold a book
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter)
            header = next(reader, [])
            if not all(header) or len(set(header)) < max(1, len(header)):
                raise TaskError(f"{path}: the first line must name each column, differently; got {header}")
            for cells in reader:
                # A short row lacks its last cells, which is told if they are needed.
                if len(cells) > len(header):
                    problem = f"expected {len(header)} cells, got {len(cells)}"
                    raise TaskError(f"{path}:{reader.line_num}: {problem}; quote a cell that holds {delimiter!r}")
    except (OSError, UnicodeError, csv.Error) as error:
        raise TaskError(f"{path}: cannot be read: {error}; save the file as CSV in UTF-8") from error
    finally:
        csv.field_size_limit(limit)
    return header

"""Which formats a file may be a task of, judging by its name and its first line."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from bayes_lora.errors import ConfigError
from bayes_lora.tasks.readers.card import read_card
from bayes_lora.tasks.readers.molecules import SMILES_COLUMNS
from bayes_lora.tasks.readers.table_columns import LABELS
from bayes_lora.tasks.readers.table_rows import first_cells, first_record

__all__ = ["card_files", "file_formats"]

KINDS = {
    ".jsonl": ["metaicl", "table"],
    ".csv": ["molecules", "table"],
    ".tsv": ["table"],
    ".parquet": ["table"],
    ".yaml": ["card"],
    ".yml": ["card"],
}
# Of all YAML files those are cards that have this key.
CARD_KEY = re.compile(rb"(?:^|[{,][ \t]*)[\"']?input[\"']?[ \t]*:", re.MULTILINE)
LONGEST_CARD = 1_000_000


def file_formats(path: Path, format: str | None = None) -> list[str]:
    """Return the formats that a file may be a task of: the given one, if its name allows it, or what it looks like.

    A CSV file with a column of SMILES is one of molecules; other CSV and Parquet files are tables. A TSV file is a
    table where a column is named as one of answers: those of CrossFit and UnifiedQA have no header. A JSON-lines file
    is a table where its first object has not both ``input`` and ``options``.
    """
    suffix = path.suffix.lower()
    known = KINDS.get(suffix, [])
    if format is not None:
        return [format] * (format in known)
    if suffix == ".csv":
        return ["molecules" if _any_named(path, SMILES_COLUMNS) else "table"]
    if suffix == ".tsv":
        return known if _any_named(path, LABELS) else []
    if suffix == ".jsonl":
        record = first_record(path)
        return ["metaicl" if record is None or {"input", "options"} <= record.keys() else "table"]
    return known if known != ["card"] or _is_card(path) else []


def card_files(cards: Iterable[Path]) -> list[Path]:
    """List the local files that these cards read; a card that cannot be read has none."""
    files = []
    for path in cards:
        try:
            files += [path.parent / file for file in read_card(path).split_files.values()]
        except ConfigError:  # told when it is loaded
            continue
    return files


def _any_named(path: Path, names: Iterable[str]) -> bool:
    return any(cell.lower() in names for cell in first_cells(path))


def _is_card(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return CARD_KEY.search(file.read(LONGEST_CARD)) is not None
    except OSError:
        return False

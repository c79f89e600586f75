"""The format of a file or folder is recognised by its suffix or layout; otherwise the caller must name it.

If two formats share a suffix, the columns decide. A CSV file with a column of SMILES contains molecules; other CSV
files are tables. A TSV file is a table if a column is named as one of answers, because files of CrossFit and UnifiedQA
have no header. A JSON-lines file is a table unless its first object has both ``input`` and ``options``. A YAML file is
a card if it has the key ``input``. A file that is read for this purpose is not read again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bayes_lora.errors import ConfigError, TaskError, did_you_mean
from bayes_lora.tasks.readers.card import Card, card_of
from bayes_lora.tasks.readers.molecules import SMILES_COLUMNS
from bayes_lora.tasks.readers.table_columns import LABELS, plain
from bayes_lora.tasks.readers.table_rows import Table, scan_table
from bayes_lora.tasks.readers.text_files import children, inside
from bayes_lora.utils.yaml_files import read_yaml

__all__ = ["FORMATS", "Found", "Place", "find_tasks", "look_at"]

FORMATS = {  # and what a task is
    "metaicl": "<task>.jsonl or <task>/<task>_16_<seed>_train.jsonl",
    "crossfit": "<task>/<task>_16_<seed>_train.tsv",
    "unifiedqa": "<task>/train.tsv",
    "legalbench": "<task>/base_prompt.txt and <task>/train.tsv",
    "molecules": "<file>.csv with a column smiles",
    "card": "<card>.yaml",
    "table": "<task>.csv, .tsv, .parquet or .jsonl with a column named label or the like; save a spreadsheet as CSV",
}
KNOWN = "known formats: " + ", ".join(f"{format} ({layout})" for format, layout in FORMATS.items())
# Formats that `format` may name for a file of this suffix.
SUFFIXES = {
    ".jsonl": ["metaicl", "table"],
    ".csv": ["molecules", "table"],
    ".tsv": ["table"],
    ".parquet": ["table"],
    ".yaml": ["card"],
    ".yml": ["card"],
}


@dataclass(frozen=True)
class Place:
    """A file or a folder, and the formats that it may be a task of.

    Attributes:
        path: the file or the folder.
        formats: none if it is no task.
        content: what the file was found to hold, if it was read: a table, a card, or what is wrong with the card.
    """

    path: Path
    formats: list[str]
    content: Table | Card | ConfigError | None = None

    @property
    def name(self) -> str:
        """The task's name."""
        return self.path.name if self.path.is_dir() else self.path.stem


@dataclass(frozen=True)
class Found:
    """The tasks (of molecules: the files) of one format in a folder, by name."""

    path: Path
    format: str
    places: dict[str, Place]


def find_tasks(path: str | Path, format: str | None = None) -> Found:
    """Find the tasks that `load_tasks` loads from a file, a task's folder or a folder of tasks.

    Args:
        path: the file or the folder.
        format: one of :data:`FORMATS`; by default detected.

    Raises:
        TaskError: there is no such file, its format cannot be detected, a name occurs twice, or a path leads out of the
            folder.
    """
    path = Path(path).absolute()
    if format is not None and format not in FORMATS:
        raise TaskError(f"`format` {format!r} is unknown{did_you_mean(format, FORMATS)}; {KNOWN}")
    if not os.path.exists(path):
        raise TaskError(f"{path}: there is no such file or folder; check the path")
    place = look_at(path, format)
    if not path.is_dir():
        if format == "card" and not place.formats:
            place = _card(path, format)
        if not (format or place.formats):
            raise TaskError(f"{path}: cannot tell the format; pass `format`; {KNOWN}")
        return Found(path, format or place.formats[0], {path.stem: place})
    entries = [place] if place.formats else _entries(path, format)
    here = [known for known in FORMATS if any(known in entry.formats for entry in entries)]
    wanted = here if format is None else [format] * (format in here)
    if not wanted:
        problem = "no task of a format that is known" if format is None else f"no task of the format {format!r}"
        raise TaskError(f"{path}: {problem} here; {KNOWN}")
    if len(wanted) > 1:
        raise TaskError(f"{path}: holds tasks of several formats: {', '.join(here)}; pass one of them as `format`")
    places: dict[str, Place] = {}
    for entry in entries:
        if wanted[0] in entry.formats:
            if entry.name in places:
                both = f"{places[entry.name].path.name} and {entry.path.name}"
                raise TaskError(f"{path}: task {entry.name!r} is there twice, {both}; remove one")
            inside(path, entry.path)
            places[entry.name] = entry
    return Found(path, wanted[0], places)


def look_at(path: Path, format: str | None = None) -> Place:
    """Return the formats of a file or a folder; of a file only the given one, if its suffix allows it."""
    if path.is_dir():
        return Place(path, _folder_formats(path))
    suffix = path.suffix.lower()
    known = SUFFIXES.get(suffix, [])
    if format is not None and (format != "card" or format not in known):
        return Place(path, [format] * (format in known))
    if known == ["card"]:
        return _card(path, format)
    if suffix == ".parquet" or not known:
        return Place(path, known)
    table = scan_table(path)
    names = {plain(column) for column in table.columns}
    if suffix == ".jsonl":
        table_or_not = bool(table.rows) and not {"input", "options"} <= table.rows[0][1].keys()
        return Place(path, ["table" if table_or_not else "metaicl"], table)
    if suffix == ".tsv":
        return Place(path, ["table"], table) if names.intersection(LABELS) else Place(path, [])
    return Place(path, ["molecules" if names.intersection(SMILES_COLUMNS) else "table"], table)


def _card(path: Path, format: str | None) -> Place:
    try:
        values = read_yaml(path)
        if format is None and not (isinstance(values, Mapping) and "input" in values):
            return Place(path, [])  # a file of settings
        return Place(path, ["card"], card_of(path, values))
    except ConfigError as error:  # raised when the card is loaded
        return Place(path, ["card"], error)


def _entries(path: Path, format: str | None) -> list[Place]:
    """Look at each entry of a folder, except the local files that a card reads."""
    here = children(path)
    cards = {child: look_at(child, format) for child in here if SUFFIXES.get(child.suffix.lower()) == ["card"]}
    read = {
        place.path.parent / file
        for place in cards.values()
        if isinstance(place.content, Card)
        for file in place.content.split_files.values()
    }
    return [cards.get(child) or look_at(child, format) for child in here if child not in read]


def _folder_formats(path: Path) -> list[str]:
    names = {child.name for child in children(path)}
    if "base_prompt.txt" in names:
        return ["legalbench"]
    parts = "_[0-9]{1,9}_(train|dev|test)"
    seeded = {"metaicl": rf"_16{parts}\.jsonl", "crossfit": rf"_[0-9]{{1,9}}{parts}\.tsv"}
    formats = [
        known
        for known, pattern in seeded.items()
        if any(re.fullmatch(re.escape(path.name) + pattern, name) for name in names)
    ]
    return formats + ["unifiedqa"] * bool(names & {"train.tsv", "dev.tsv", "test.tsv"})

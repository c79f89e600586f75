"""Reader of CSV files of molecules with binary labels, such as MoleculeNet's.

The first row names the columns. One holds the molecules as SMILES; each column of labels is a task, named
``<file>/<column>``, as in ``Tox21/NR-AR``. A label is 0 or 1, ``0.0`` or ``1.0``, ``false`` or ``true``; a blank means
that the molecule was not measured, and leaves it out of this task. By default the columns of labels are those more than
half of whose filled cells are labels; in these, any other value is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from bayes_lora.errors import TaskError
from bayes_lora.tasks.readers.table_rows import Table, at, read_table
from bayes_lora.tasks.readers.text_files import CannotScore, listed, short
from bayes_lora.tasks.task import Example, Task

__all__ = ["SMILES_COLUMNS", "read_molecules"]

SMILES_COLUMNS = ("smiles", "mol")
LABELS = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}
TEMPLATE = "SMILES: {smiles}\n{label}?"


def read_molecules(
    path: str | Path | Table,
    *,
    smiles: str | None = None,
    labels: Sequence[str] | None = None,
    options: Sequence[str] = ("no", "yes"),
    template: str = TEMPLATE,
) -> dict[str, Task | CannotScore]:
    """Read the tasks of one file, one for each column of labels; support holds all their molecules, in order.

    Args:
        path: the file or its table.
        smiles: column of the molecules; by default the one named ``smiles`` or ``mol``, in any case.
        labels: columns of labels, in this order.
        options: the texts of the labels 0 and 1.
        template: the input, with ``{smiles}`` and optionally the column's name as ``{label}``.

    Returns:
        By name, the task, or an error for a column with one label only.

    Raises:
        TaskError: a column is missing, a cell is not a label, or a labelled molecule is blank.
        CannotScore: one of ``labels`` has one label only.
    """
    if isinstance(labels, str):
        raise TaskError(f"`labels` must be a list of column names, got the string {labels!r}; pass [{labels!r}]")
    if isinstance(options, str) or len(options) != 2:
        raise TaskError(f"`options` must be two texts, of the labels 0 and 1; got {options!r}")
    if "{smiles}" not in template:
        raise TaskError(f"`template` {template!r}: expected the placeholder {{smiles}} in it; add it")
    table = read_table(path, ".csv")
    molecules = _smiles_column(table, smiles)
    for column in labels or ():
        table.require(column, "`labels` names it")
    columns = list(labels) if labels is not None else _label_columns(table, molecules)
    found: dict[str, Task | CannotScore] = {}
    for column in columns:
        name = f"{table.path.stem}/{column}"
        if name in found:
            raise TaskError(f"`labels` names {column!r} twice; remove one of the two")
        found[name] = _task(name, table, molecules, column, tuple(options), template)
        if labels is not None and isinstance(error := found[name], CannotScore):
            raise error
    return found


def _smiles_column(table: Table, smiles: str | None) -> str:
    if smiles is not None:
        table.require(smiles, "`smiles` names it")
        return smiles
    named = [column for wanted in SMILES_COLUMNS for column in table.columns if column.lower() == wanted]
    if not named:
        problem = f"expected {' or '.join(map(repr, SMILES_COLUMNS))}, got {listed(table.columns)}"
        raise TaskError(f"{table.path}:1: no column of molecules: {problem}; name it as `smiles`")
    return named[0]


def _label_columns(table: Table, molecules: str) -> list[str]:
    columns = []
    for column in table.columns:
        cells = [cells[column].strip().lower() for _, cells in table.rows if cells[column].strip()]
        if column not in ("", molecules) and 2 * sum(cell in LABELS for cell in cells) > len(cells):
            columns.append(column)
    if not columns:
        got = [column for column in table.columns if column != molecules]
        raise TaskError(
            f"{table.path}: no column of labels 0 and 1 next to {molecules!r}, got {listed(got)}; name them as `labels`"
        )
    return columns


def _task(
    name: str, table: Table, molecules: str, column: str, options: tuple[str, ...], template: str
) -> Task | CannotScore:
    examples = []
    for place, cells in table.rows:
        cell, molecule = cells[column].strip(), cells[molecules].strip()
        if not cell:
            continue
        if cell.lower() not in LABELS:
            cure = "leave it blank if it was not measured, or name the columns that hold labels as `labels`"
            raise TaskError(f"{place}: column {column!r} must be 0, 1 or blank, got {short(cell)}; {cure}")
        if not molecule:
            raise TaskError(f"{place}: column {molecules!r} is empty, but {column!r} is {cell}; remove the row")
        texts = {"{smiles}": molecule, "{label}": column}
        text = re.sub(r"\{smiles\}|\{label\}", partial(_text, texts), template)
        with at(place):
            examples.append(Example(text, options, LABELS[cell.lower()]))
    if len({example.answer for example in examples}) < 2:
        held = f"only the label {examples[0].answer}" if examples else "no label"
        return CannotScore(f"{table.path}: column {column!r} holds {held}; leave it out of `labels`", "one label")
    return Task(name, tuple(examples))


def _text(texts: Mapping[str, str], match: re.Match[str]) -> str:
    return texts[match[0]]

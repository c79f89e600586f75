"""One line from data to tasks: `load_tasks` reads any format that it knows, `task_from` what Python holds.

=============  =========================================================================  ====================
format         what a task is                                                             its reader
=============  =========================================================================  ====================
metaicl        ``<task>.jsonl``, or ``<task>/<task>_16_<seed>_train.jsonl``               `load_task`
crossfit       ``<task>/<task>_16_<seed>_train.tsv``                                      `read_crossfit`
unifiedqa      ``<task>/train.tsv``                                                       `read_unifiedqa`
legalbench     ``<task>/base_prompt.txt`` with ``<task>/train.tsv``                       `read_legalbench`
molecules      a column of labels in ``<file>.csv``, named ``<file>/<column>``            `read_molecules`
card           ``<card>.yaml``, which says how a table is read                            `load_card`
table          ``<task>.csv``, ``.tsv``, ``.parquet`` or ``.jsonl``, whose columns tell   `load_table`
=============  =========================================================================  ====================
"""

from __future__ import annotations

import inspect
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bayes_lora.errors import ConfigError, TaskError, did_you_mean
from bayes_lora.tasks.readers.card import Card, read_card
from bayes_lora.tasks.readers.card_examples import load_card
from bayes_lora.tasks.readers.crossfit import read_crossfit
from bayes_lora.tasks.readers.folders import present_tasks, seeded_files
from bayes_lora.tasks.readers.formats import card_files, file_formats
from bayes_lora.tasks.readers.legalbench import read_legalbench
from bayes_lora.tasks.readers.metaicl import example_from, load_task
from bayes_lora.tasks.readers.molecules import molecule_tasks
from bayes_lora.tasks.readers.table import load_table
from bayes_lora.tasks.readers.text_files import CannotScore, children, inside, warn_left_out
from bayes_lora.tasks.readers.unifiedqa import read_unifiedqa
from bayes_lora.tasks.task import Example, Task
from bayes_lora.tasks.task_set import TaskSet

__all__ = ["format_options", "load_tasks", "task_format", "task_from"]

READERS: dict[str, Callable[..., Any]] = {
    "metaicl": load_task,
    "crossfit": read_crossfit,
    "unifiedqa": read_unifiedqa,
    "legalbench": read_legalbench,
    "molecules": molecule_tasks,
    "card": load_card,
    "table": load_table,
}
KNOWN = (
    "known formats: metaicl (<task>.jsonl or <task>/<task>_16_<seed>_train.jsonl), crossfit "
    "(<task>/<task>_16_<seed>_train.tsv), unifiedqa (<task>/train.tsv), legalbench (<task>/base_prompt.txt and "
    "<task>/train.tsv), molecules (<file>.csv with a column smiles), card (<card>.yaml), table (<task>.csv, .tsv, "
    ".parquet or .jsonl with a column named label or the like; save a spreadsheet as CSV)"
)


def task_from(name: str, examples: Iterable[Mapping[str, Any] | Example], *, merge_duplicates: bool = False) -> Task:
    """Make a task of what Python holds; all its examples are support.

    Args:
        name: the task's name.
        examples: each an `Example`, or a mapping with ``input``, ``options`` (a list or tuple of texts) and ``output``
            (one of them). Where the answer is free, ``options`` is empty or left out, and ``output`` is a text, or a
            list or tuple of texts that are all right, which may be called ``references``. Other fields are ignored.
        merge_duplicates: take an option that an example lists twice as one option, instead of refusing it.

    Raises:
        TaskError: there is no example, or one is malformed; the message names it, counted from 1.
    """
    if isinstance(examples, (str, bytes, Mapping)) or not isinstance(examples, Iterable):
        raise TaskError(f"task {name!r}: expected a list of examples, got {type(examples).__name__}; put it in a list")
    made = []
    for number, item in enumerate(examples, start=1):
        try:
            made.append(item if isinstance(item, Example) else _from_mapping(item, merge_duplicates))
        except TaskError as error:
            raise TaskError(f"task {name!r}, example {number}: {error}") from None
    return Task(name, tuple(made))


def _from_mapping(item: object, merge_duplicates: bool) -> Example:
    if not isinstance(item, Mapping):
        raise TaskError(f"expected an Example, or a mapping with `input`, `options`, `output`; got {item!r}")
    fields = {"options": []} | {
        str(key): list(value) if isinstance(value, tuple) else value for key, value in item.items()
    }
    references, options = fields.pop("references", []), fields["options"]
    if not isinstance(references, list) or references:
        if "output" in fields or not isinstance(options, list) or options:
            problem = f"`references` {reprlib.repr(references)} stand in place of `output` and `options`"
            raise TaskError(f"{problem}, but one of these is given, too; leave one or other out")
        fields["output"] = references
    example = example_from(fields, merge_duplicates, True)
    assert isinstance(example, Example)
    return example


def load_tasks(
    path: str | Path,
    *,
    format: str | None = None,
    names: Iterable[str] | None = None,
    allow_missing: bool = False,
    free_form: bool = True,
    **options: Any,
) -> TaskSet:
    """Load the tasks of a file, of a task's folder, or of a folder of tasks.

    Args:
        path: the file or the folder.
        format: one of ``metaicl``, ``crossfit``, ``unifiedqa``, ``legalbench``, ``molecules``, ``card`` and ``table``;
            by default told from the names of the files, and from their first lines.
        names: which tasks, in this order. None takes all that can be scored; one warning counts the others (those with
            one label only, or without rows). A task that is named must be one that can be scored.
        allow_missing: leave out names that are not there, with one warning, instead of raising.
        free_form: whether to load free-form tasks, too. False leaves them out; the same warning counts them.
        options: of the format's reader, such as ``seed`` or ``demonstrations``.

    Raises:
        TaskError: the format cannot be told, names are missing (all are listed, with near names), a path leads out of
            the folder, no task is left, or one is malformed.
    """
    path = Path(path).absolute()
    if isinstance(names, str):
        raise TaskError(f"`names` must be a list of task names, got the string {names!r}; pass [{names!r}]")
    chosen = None if names is None else list(names)
    format, places = _find(path, format, chosen)
    _check_options(format, options)
    if format == "molecules":
        found = _molecules(places, chosen, options)
    elif format == "card":
        found = _cards(places, options)
    else:
        read = _metaicl if format == "metaicl" else READERS[format]
        found = {name: partial(read, place, **options) for name, place in places.items()}
    kept = list(found) if chosen is None else present_tasks(path, chosen, found, allow_missing)
    tasks, left_out = [], {}
    for name in kept:
        try:
            task = found[name]()
        except CannotScore as error:
            if chosen is not None:
                raise
            left_out[name] = error
        else:
            if task.free_form and not free_form:
                left_out[name] = CannotScore(f"task {name!r} is free-form; pass free_form=True to load it", "free-form")
            else:
                tasks.append(task)
    if not tasks:
        reason = "".join(f"; {error}" for error in list(left_out.values())[:1])
        raise TaskError(f"{path}: no task to load, of {len(kept)} in the format {format!r}{reason}")
    warn_left_out(path, left_out, len(kept))
    return TaskSet(tasks)


def task_format(path: str | Path, format: str | None = None) -> str:
    """Return the format that `load_tasks` would read; raises as it does where this cannot be told."""
    return _find(Path(path).absolute(), format, None)[0]


def format_options(format: str) -> list[str]:
    """List the options that a format's reader has."""
    parameters = inspect.signature(READERS[format]).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def _find(path: Path, format: str | None, names: list[str] | None) -> tuple[str, dict[str, Path]]:
    """Return the format, and the file or the folder of each task (of molecules: each file)."""
    if format is not None and format not in READERS:
        raise TaskError(f"`format` {format!r} is unknown{did_you_mean(format, READERS)}; {KNOWN}")
    for name in names or ():
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
            raise TaskError(f"`names` holds {name!r}, which leads out of {path}; expected the name of a task in it")
    if not os.path.exists(path):
        raise TaskError(f"{path}: there is no such file or folder; check the path")
    if not path.is_dir():
        formats = _formats(path, format)
        if format is None and not formats:
            raise TaskError(f"{path}: cannot tell the format; pass `format`; {KNOWN}")
        return format or formats[0], {path.stem: path}
    entries = {path: _formats(path, format)}
    if not entries[path]:
        entries = {child: _formats(child, format) for child in children(path)}
        for file in card_files(place for place, formats in entries.items() if "card" in formats):
            entries.pop(file, None)  # a card's table is no task beside it
    here = [known for known in READERS if any(known in formats for formats in entries.values())]
    wanted = here if format is None else [format] * (format in here)
    if not wanted:
        problem = "no task of a format that is known" if format is None else f"no task of the format {format!r}"
        raise TaskError(f"{path}: {problem} here; {KNOWN}")
    if len(wanted) > 1:
        raise TaskError(f"{path}: holds tasks of several formats: {', '.join(here)}; pass one of them as `format`")
    places: dict[str, Path] = {}
    for place, formats in entries.items():
        name = place.name if place.is_dir() else place.stem
        if wanted[0] in formats:
            if name in places:
                raise TaskError(
                    f"{path}: task {name!r} is there twice, {places[name].name} and {place.name}; remove one"
                )
            places[name] = inside(path, place)
    return wanted[0], places


def _formats(path: Path, format: str | None) -> list[str]:
    """Return the formats that a file or a folder may be a task of, judging by names, and by a file's first line."""
    if not path.is_dir():
        return file_formats(path, format)
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


def _check_options(format: str, options: Mapping[str, Any]) -> None:
    known = format_options(format)
    for name in options:
        if name not in known:
            near = did_you_mean(name, known)
            raise TaskError(f"the format {format!r} has no option `{name}`{near}; it has {', '.join(known)}")


def _metaicl(place: Path, **options: Any) -> Task:
    if place.is_dir():
        for part in seeded_files(place).values():
            for file in part.values():
                inside(place, file)
    return load_task(place, **options)


def _molecules(
    places: Mapping[str, Path], names: list[str] | None, options: Mapping[str, Any]
) -> dict[str, Callable[[], Task]]:
    """Read the files that hold the tasks of these names, or all of them."""
    files = {name.partition("/")[0] for name in names or places}
    if not files <= places.keys():
        files = set(places)  # the message lists the names near those that are missing
    found: dict[str, Task | CannotScore] = {}
    for stem, place in places.items():
        if stem in files:
            found |= molecule_tasks(place, **options)
    return {name: partial(_raised, task) for name, task in found.items()}


def _cards(places: Mapping[str, Path], options: Mapping[str, Any]) -> dict[str, Callable[[], Task]]:
    """Read cards, by the names that they give their tasks."""
    found: dict[str, Callable[[], Task]] = {}
    for place in places.values():
        try:
            card = read_card(place)
        except ConfigError as error:
            raise TaskError(" ".join(str(error).split())) from None  # that of YAML has several lines
        if card.name in found:
            raise TaskError(f"{place}: the name {card.name!r} is that of another card here; change one")
        found[card.name] = partial(_load_card, place, card, options)
    return found


def _load_card(place: Path, card: Card, options: Mapping[str, Any]) -> Task:
    try:
        return load_card(card, **options)
    except TaskError as error:
        raise TaskError(f"{place}: {error}") from error.__cause__


def _raised(task: Task | CannotScore) -> Task:
    if isinstance(task, CannotScore):
        raise task
    return task

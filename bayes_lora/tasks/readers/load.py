"""From data to tasks in one line: `load_tasks` reads files of any known format, `task_from` Python objects."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bayes_lora.errors import TaskError, did_you_mean
from bayes_lora.tasks.readers.card import Card
from bayes_lora.tasks.readers.card_examples import load_card
from bayes_lora.tasks.readers.crossfit import read_crossfit
from bayes_lora.tasks.readers.folders import present_tasks
from bayes_lora.tasks.readers.formats import Found, find_tasks
from bayes_lora.tasks.readers.legalbench import read_legalbench
from bayes_lora.tasks.readers.metaicl import example_from, read_metaicl
from bayes_lora.tasks.readers.molecules import read_molecules
from bayes_lora.tasks.readers.table import load_table
from bayes_lora.tasks.readers.table_rows import Table, at
from bayes_lora.tasks.readers.text_files import CannotScore, warn_left_out
from bayes_lora.tasks.readers.unifiedqa import read_unifiedqa
from bayes_lora.tasks.task import Example, Task
from bayes_lora.tasks.task_set import TaskSet

__all__ = ["format_options", "load_tasks", "task_format", "task_from"]

READERS: dict[str, Callable[..., Any]] = {
    "metaicl": read_metaicl,
    "crossfit": read_crossfit,
    "unifiedqa": read_unifiedqa,
    "legalbench": read_legalbench,
    "molecules": read_molecules,
    "card": load_card,
    "table": load_table,
}


def task_from(name: str, examples: Iterable[Mapping[str, Any] | Example], *, merge_duplicates: bool = False) -> Task:
    """Make a task of Python objects; all its examples are support.

    Args:
        name: the task's name.
        examples: each an `Example`, or a mapping with ``input``, ``options`` (a list or tuple of texts) and ``output``
            (one of them). If the answer is free, ``options`` is empty or left out, and ``output`` is a text, or a
            list or tuple of texts that are all right, which may be called ``references``. Other fields are ignored.
        merge_duplicates: take an option that an example lists twice as one option, instead of refusing it.

    Raises:
        TaskError: there is no example, or one is malformed; the message names it, counted from 1.
    """
    if isinstance(examples, (str, bytes, Mapping)) or not isinstance(examples, Iterable):
        raise TaskError(f"task {name!r}: expected a list of examples, got {type(examples).__name__}; put it in a list")
    made = []
    for number, item in enumerate(examples, start=1):
        with at(f"task {name!r}, example {number}"):
            made.append(item if isinstance(item, Example) else _from_mapping(item, merge_duplicates))
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
            problem = f"`references` {reprlib.repr(references)} replace `output` and `options`"
            raise TaskError(f"{problem}, but one of these is given, too; leave one or other out")
        fields["output"] = references
    example = example_from(fields, merge_duplicates, True)
    assert isinstance(example, Example)
    return example


def load_tasks(
    path: str | Path | Found,
    *,
    format: str | None = None,
    names: Iterable[str] | None = None,
    allow_missing: bool = False,
    free_form: bool = True,
    **options: Any,
) -> TaskSet:
    """Load the tasks of a file, of a task's folder, or of a folder of tasks.

    Args:
        path: the file or the folder, or what `find_tasks` has found there.
        format: one of ``metaicl``, ``crossfit``, ``unifiedqa``, ``legalbench``, ``molecules``, ``card`` and ``table``;
            by default detected from suffixes and folder layout.
        names: which tasks, in this order. None takes all that can be scored; one warning counts the others (those with
            one label only, or without rows). A task that is named must be one that can be scored.
        allow_missing: skip names that do not exist, with one warning, instead of raising.
        free_form: whether to load free-form tasks as well. False skips them; the same warning counts them.
        options: of the format's reader, such as ``seed`` or ``demonstrations``.

    Warns:
        UserWarning: of a table, something was decided that names of columns and files do not say, such as columns that
            are left out (see `load_table`); or of CrossFit and LegalBench, answers are free text because they are more
            than ``max_options``.

    Raises:
        TaskError: the format cannot be detected, names are missing (all are listed, with near names), a path leads out
            of the folder, no task is left, or one is malformed.
    """
    if isinstance(names, str):
        raise TaskError(f"`names` must be a list of task names, got the string {names!r}; pass [{names!r}]")
    chosen = None if names is None else list(names)
    where = path if isinstance(path, Found) else find_tasks(path, format)
    for name in chosen or ():
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
            expected = "expected the name of a task in it"
            raise TaskError(f"`names` holds {name!r}, which leads out of {where.path}; {expected}")
    _check_options(where.format, options)
    found = _readers(where, chosen, options)
    kept = list(found) if chosen is None else present_tasks(where.path, chosen, found, allow_missing)
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
        raise TaskError(f"{where.path}: no task to load, of {len(kept)} in the format {where.format!r}{reason}")
    warn_left_out(where.path, left_out, len(kept))
    return TaskSet(tasks)


def task_format(path: str | Path, format: str | None = None) -> str:
    """Return the format in which `load_tasks` would read a path; raises as it does if this cannot be detected."""
    return find_tasks(path, format).format


def format_options(format: str) -> list[str]:
    """List the options of a format's reader."""
    parameters = inspect.signature(READERS[format]).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def _check_options(format: str, options: Mapping[str, Any]) -> None:
    known = format_options(format)
    for name in options:
        if name not in known:
            near = did_you_mean(name, known)
            raise TaskError(f"the format {format!r} has no option `{name}`{near}; it has {', '.join(known)}")


def _readers(found: Found, names: list[str] | None, options: Mapping[str, Any]) -> dict[str, Callable[[], Task]]:
    """Return what reads each task, by name."""
    if found.format == "card":
        return _cards(found, options)
    sources = {
        name: place.content if isinstance(place.content, Table) else place.path for name, place in found.places.items()
    }
    if found.format != "molecules":
        return {name: partial(READERS[found.format], source, **options) for name, source in sources.items()}
    files = {name.partition("/")[0] for name in names or sources}
    if not files <= sources.keys():
        files = set(sources)  # the message lists names near those that are missing
    columns: dict[str, Task | CannotScore] = {}
    for name, source in sources.items():
        if name in files:
            columns |= read_molecules(source, **options)
    return {name: partial(_raised, task) for name, task in columns.items()}


def _cards(found: Found, options: Mapping[str, Any]) -> dict[str, Callable[[], Task]]:
    readers: dict[str, Callable[[], Task]] = {}
    for place in found.places.values():
        card = place.content
        if not isinstance(card, Card):
            raise TaskError(" ".join(str(card).split()))  # an error of YAML has several lines
        if card.name in readers:
            raise TaskError(f"{place.path}: the name {card.name!r} is that of another card here; change one")
        readers[card.name] = partial(_load_card, place.path, card, options)
    return readers


def _load_card(path: Path, card: Card, options: Mapping[str, Any]) -> Task:
    with at(str(path)):
        return load_card(card, **options)


def _raised(task: Task | CannotScore) -> Task:
    if isinstance(task, CannotScore):
        raise task
    return task

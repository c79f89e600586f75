"""Reader of the MetaICL file layout.

A task is either one file ``<task>.jsonl`` or a folder of files ``<task>/<task>_16_<seed>_<part>.jsonl``,
where part is ``train``, ``dev`` or ``test``. Each line is an object
``{"input": ..., "output": ..., "options": [...]}`` whose output is one of its options; or, where the answer is free,
``{"input": ..., "output": ..., "options": []}`` whose output is a text, or a list of texts that are all right, of which
the first is learnt from. All lines of a task are of one kind. Other fields are ignored, and so are blank lines.
"""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bayes_lora.errors import TaskError
from bayes_lora.tasks.readers.folders import present_tasks, seeded_files, seeded_task, task_places
from bayes_lora.tasks.readers.text_files import json_object, lines, listed, short
from bayes_lora.tasks.task import Example, Task
from bayes_lora.tasks.task_set import TaskSet

__all__ = ["has_options", "load_task", "load_taskset", "read_examples", "read_questions"]


def read_examples(path: str | Path, *, merge_duplicates: bool = False) -> list[Example]:
    """Read all examples of one UTF-8 jsonl file, in order.

    Args:
        path: The file.
        merge_duplicates: Take an option that a line lists twice as one option, instead of refusing the line
            (a duplicate would count its probability twice).

    Raises:
        TaskError: The file cannot be read or is empty, a line is malformed, or one has options and another has none
            (the message begins with ``<file>:<line>:``).
    """
    return _examples(path, merge_duplicates, {})


def read_questions(path: str | Path, *, merge_duplicates: bool = False) -> list[Example | str]:
    """Read all questions to predict of one UTF-8 jsonl file, in order; each may, but need not have an ``output``.

    Args:
        path: The file.
        merge_duplicates: As in `read_examples`.

    Returns:
        Of a multiple-choice question an `Example`, whose `answer` is 0 where there is no ``output``. Of a free-form
        one an `Example`, or the text of its ``input`` where there is no ``output``.

    Raises:
        TaskError: As `read_examples`.
    """
    return [question for _, question in _questions(path, merge_duplicates, {}, labelled=False)]


def has_options(path: str | Path) -> bool:
    """Tell whether a task (a file or a folder) is multiple choice, judging by its first line.

    Raises:
        TaskError: There is no such task, or its first line is malformed.
    """
    path = Path(path).absolute()
    if path.is_dir():
        files = [file for part in seeded_files(path).values() for file in part.values()]
        if not files:
            raise TaskError(f"{path}: no task files here; expected {path.name}_16_<seed>_train.jsonl")
        path = files[0]
    place, line = next(_lines(path))
    try:
        return bool(_field(_record(line), "options", list))
    except TaskError as error:
        raise TaskError(f"{place}: {error}") from None


def load_task(path: str | Path, *, seed: int | None = None, merge_duplicates: bool = False) -> Task:
    """Load one task, named after its file or folder.

    A file gives a task whose support holds all its lines (divide it with `Task.split`). A folder without a
    `seed` pools all train files as support and all dev files as query, taking equal inputs once and leaving
    the test file out. With a `seed`, support is that seed's train file; query is the test file (the seed's
    own, or the first there is), or else the union of the dev files of the *other* seeds, without the inputs
    of support.

    Args:
        path: The file or the folder.
        seed: Which of the folder's seeds to read.
        merge_duplicates: As in `read_examples`.

    Raises:
        TaskError: There is no such task or seed, a line is malformed, or one has options and another has none.
    """
    path = Path(path).absolute()
    if path.is_dir():
        read = partial(_examples, merge_duplicates=merge_duplicates, kinds={})
        return seeded_task(path, seeded_files(path), seed, read)
    if seed is not None and path.is_file():
        raise TaskError(f"{path}: a file has no seeds, got seed={seed}; use `Task.split(..., seed={seed})`")
    return Task(path.stem, tuple(read_examples(path, merge_duplicates=merge_duplicates)))


def load_taskset(
    root: str | Path,
    names: Iterable[str] | None = None,
    *,
    seed: int | None = None,
    allow_missing: bool = False,
    merge_duplicates: bool = False,
    free_form: bool = True,
) -> TaskSet:
    """Load several tasks from a folder of tasks.

    Args:
        root: Folder that holds the tasks.
        names: Which tasks, in this order. None takes all of `root` in alphabetical order.
        seed: As in `load_task`.
        allow_missing: Leave out names that are not in `root`, with one warning, instead of raising.
        merge_duplicates: As in `read_examples`.
        free_form: Whether to load free-form tasks, too. False leaves them out (one warning counts them).

    Raises:
        TaskError: Names are missing (all are listed, with near names), no task is left, or one is malformed.
    """
    places = task_places(root)
    if isinstance(names, str):
        raise TaskError(f"`names` must be a list of task names, got the string {names!r}; pass [{names!r}]")
    chosen = _with_files(places) if names is None else present_tasks(root, list(names), places, allow_missing)
    if not free_form:
        chosen = _multiple_choice(root, {name: places[name] for name in chosen})
    if not chosen:
        kind = "" if free_form else "multiple-choice "
        raise TaskError(f"{root}: no {kind}task to load; expected <task>.jsonl or <task>/ in it")
    return TaskSet(load_task(places[name], seed=seed, merge_duplicates=merge_duplicates) for name in chosen)


def _examples(path: str | Path, merge_duplicates: bool, kinds: dict[bool, str]) -> list[Example]:
    found = (question for _, question in _questions(path, merge_duplicates, kinds, labelled=True))
    return [question for question in found if isinstance(question, Example)]  # as all are that have an answer


def _questions(
    path: str | Path, merge_duplicates: bool, kinds: dict[bool, str], labelled: bool
) -> Iterator[tuple[str, Example | str]]:
    """Yield each line's place and what it holds; ``kinds`` holds where the first line with and without options is."""
    for place, line in _lines(path):
        try:
            question = example_from(_record(line), merge_duplicates, labelled)
        except TaskError as error:
            raise TaskError(f"{place}: {error}") from None
        free = isinstance(question, str) or question.free_form
        kinds.setdefault(free, place)
        if len(kinds) > 1:
            problem = "`options` is empty, but is not in" if free else "`options` is not empty, but is in"
            cure = "a task is all multiple choice or all free-form; make two tasks of them, or mend this line"
            raise TaskError(f"{place}: {problem} {kinds[not free]}; {cure}")
        yield place, question


def _lines(path: str | Path) -> Iterator[tuple[str, str]]:
    return lines(path, "jsonl", "one JSON object a line")


def _record(line: str) -> dict[str, Any]:
    return json_object(line, "an object with `input`, `output`, `options`")


def _field(record: dict[str, Any], field: str, kind: type) -> Any:
    if field not in record:
        cure = "; write [] where the answer is free" * (field == "options")
        raise TaskError(f"field `{field}` is missing; got only {listed(sorted(record))}{cure}")
    if not isinstance(record[field], kind):
        raise TaskError(f"field `{field}` must be a {kind.__name__}, got {reprlib.repr(record[field])}")
    return record[field]


def example_from(record: dict[str, Any], merge_duplicates: bool, labelled: bool) -> Example | str:
    """Make an example of the fields of a line; of a free-form question without output, its text."""
    text, options = _field(record, "input", str), _field(record, "options", list)
    if not options:
        known = labelled or "output" in record
        example = Example(text, references=_references(record) if known else ("unknown",))
        return example if known else example.input
    output = _field(record, "output", str) if labelled or "output" in record else options[0]
    if output not in options:
        raise TaskError(
            f"`output` must be one of `options`: got {short(output)}, options are {listed(list(map(str, options)))}"
        )
    if merge_duplicates:
        options = [option for index, option in enumerate(options) if option not in options[:index]]
    return Example(text, tuple(options), options.index(output))


def _references(record: dict[str, Any]) -> tuple[str, ...]:
    output = _field(record, "output", object)
    texts = [output] if isinstance(output, str) else output
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        expected = "a str, or a list of them that is not empty"
        raise TaskError(f"field `output` must be {expected}, where `options` is empty; got {reprlib.repr(output)}")
    return tuple(dict.fromkeys(texts))


def _with_files(places: dict[str, Path]) -> list[str]:
    """Return the names of the tasks; other folders may lie beside them."""
    return [name for name, path in places.items() if path.is_file() or any(seeded_files(path).values())]


def _multiple_choice(root: str | Path, places: dict[str, Path]) -> list[str]:
    """Return the names of the multiple-choice tasks, with one warning that counts the free-form ones."""
    chosen = [name for name, path in places.items() if has_options(path)]
    if len(chosen) < len(places):
        count = f"{len(places) - len(chosen)} of {len(places)} tasks"
        warnings.warn(f"{root}: {count} are free-form (no options to score) and left out", stacklevel=3)
    return chosen

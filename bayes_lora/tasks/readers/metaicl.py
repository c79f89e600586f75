"""Reader of the MetaICL file layout.

A task is either one file ``<task>.jsonl`` or a folder of files ``<task>/<task>_16_<seed>_<part>.jsonl``,
where part is ``train``, ``dev`` or ``test``. Each line is an object
``{"input": ..., "output": ..., "options": [...]}`` whose output is one of its options or, if the answer is free,
``{"input": ..., "output": ..., "options": []}`` whose output is a text, or a list of texts that are all right. The
first of them is the target of training. All lines of a task are of one kind. Other fields and blank lines are ignored.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bayes_lora.errors import TaskError
from bayes_lora.tasks.appearance import merge_alike
from bayes_lora.tasks.readers.folders import seeded_files, seeded_task
from bayes_lora.tasks.readers.table_rows import Table, at, read_table
from bayes_lora.tasks.readers.text_files import inside, listed, short
from bayes_lora.tasks.task import Example, Task

__all__ = ["example_from", "read_examples", "read_metaicl", "read_questions"]


def read_examples(path: str | Path, *, merge_duplicates: bool = False) -> list[Example]:
    """Read all examples of one UTF-8 jsonl file, in order.

    Args:
        path: The file.
        merge_duplicates: Take options of a line that look the same as one option, instead of refusing the line
            (a duplicate would count its probability twice).

    Raises:
        TaskError: The file cannot be read or is empty, a line is malformed, or one has options and another has none
            (the message begins with ``<file>:<line>:``).
    """
    return _examples(path, merge_duplicates, {})


def read_questions(path: str | Path | Table, *, merge_duplicates: bool = False) -> list[Example | str]:
    """Read all questions to predict of one UTF-8 jsonl file, in order; each may, but need not have an ``output``.

    Args:
        path: The file.
        merge_duplicates: As in `read_examples`.

    Returns:
        For a multiple-choice question an `Example`, whose `answer` is 0 if there is no ``output``. For a free-form
        one an `Example`, or the text of its ``input`` if there is no ``output``.

    Raises:
        TaskError: As `read_examples`.
    """
    return [question for _, question in _questions(path, merge_duplicates, {}, labelled=False)]


def read_metaicl(path: str | Path | Table, *, seed: int | None = None, merge_duplicates: bool = False) -> Task:
    """Read one task, named after its file or folder.

    The support of a file's task holds all its lines (divide it with `Task.split`). For a folder without a `seed`,
    support pools all train files and query all dev files; equal inputs count once, and test files are not read. With a
    `seed`, support is that seed's train file; query is the test file (the seed's own, or the first there is), or else
    the union of the dev files of the *other* seeds, without the inputs of support.

    Args:
        path: the file, its table or the folder.
        seed: which of the folder's seeds to read.
        merge_duplicates: as in `read_examples`.

    Raises:
        TaskError: there is no such task or seed, a file leads out of the folder, a line is malformed, or one line has
            options and another has none.
    """
    place = path.path if isinstance(path, Table) else Path(path).absolute()
    if place.is_dir():
        files = seeded_files(place)
        for file in (file for part in files.values() for file in part.values()):
            inside(place, file)
        return seeded_task(place, files, seed, partial(_examples, merge_duplicates=merge_duplicates, kinds={}))
    if seed is not None and place.is_file():
        raise TaskError(f"{place}: a file has no seeds, got seed={seed}; use `Task.split(..., seed={seed})`")
    return Task(place.stem, tuple(_examples(path, merge_duplicates, {})))


def _examples(path: str | Path | Table, merge_duplicates: bool, kinds: dict[bool, str]) -> list[Example]:
    found = (question for _, question in _questions(path, merge_duplicates, kinds, labelled=True))
    return [question for question in found if isinstance(question, Example)]  # as all are that have an answer


def _questions(
    path: str | Path | Table, merge_duplicates: bool, kinds: dict[bool, str], labelled: bool
) -> Iterator[tuple[str, Example | str]]:
    """Yield each line's place and what it holds; ``kinds`` keeps the first place with and without options."""
    for place, record in read_table(path, ".jsonl").rows:
        with at(place):
            question = example_from(record, merge_duplicates, labelled)
        free = isinstance(question, str) or question.free_form
        kinds.setdefault(free, place)
        if len(kinds) > 1:
            problem = "`options` is empty, but is not in" if free else "`options` is not empty, but is in"
            cure = "a task is all multiple choice or all free-form; make two tasks of them, or fix this line"
            raise TaskError(f"{place}: {problem} {kinds[not free]}; {cure}")
        yield place, question


def _field(record: dict[str, Any], field: str, kind: type) -> Any:
    if field not in record:
        cure = "; write [] if the answer is free" if field == "options" else "; add it"
        raise TaskError(f"field `{field}` is missing; got only {listed(sorted(record))}{cure}")
    if not isinstance(record[field], kind):
        cure = "write it in brackets" if kind is list else "write it in quotes"
        raise TaskError(f"field `{field}` must be a {kind.__name__}, got {reprlib.repr(record[field])}; {cure}")
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
        problem = (
            f"`output` must be one of `options`: got {short(output)}, options are {listed(list(map(str, options)))}"
        )
        raise TaskError(f"{problem}; spell it as the option, or add it to `options`")
    answer = options.index(output)
    if merge_duplicates and all(isinstance(option, str) for option in options):
        return Example(text, *merge_alike(options, answer))
    return Example(text, tuple(options), answer)


def _references(record: dict[str, Any]) -> tuple[str, ...]:
    output = _field(record, "output", object)
    texts = [output] if isinstance(output, str) else output
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        expected = "a str, or a list of them that is not empty"
        raise TaskError(f"field `output` must be {expected}, where `options` is empty; got {reprlib.repr(output)}")
    return tuple(dict.fromkeys(texts))

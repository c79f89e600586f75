"""Reader of the MetaICL file layout.

A task is either one file ``<task>.jsonl`` or a folder of files ``<task>/<task>_16_<seed>_<part>.jsonl``,
where part is ``train``, ``dev`` or ``test``. Each line is an object
``{"input": ..., "output": ..., "options": [...]}`` whose output is one of its options; other fields are
ignored, and so are blank lines.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bayes_lora.errors import TaskError, did_you_mean
from bayes_lora.tasks.task import Example, Task, TaskSet
from bayes_lora.tasks.text_files import children, lines

__all__ = ["has_options", "load_task", "load_taskset", "read_examples"]


def read_examples(path: str | Path, *, merge_duplicates: bool = False, labelled: bool = True) -> list[Example]:
    """Read all examples of one UTF-8 jsonl file, in order.

    Args:
        path: The file.
        merge_duplicates: Take an option that a line lists twice as one option, instead of refusing the line
            (a duplicate would count its probability twice).
        labelled: Whether lines must have an ``output``. False reads questions to predict: `answer` is then 0 where
            there is no ``output``.

    Raises:
        TaskError: The file cannot be read or is empty, or a line is malformed (the message begins with
            ``<file>:<line>:``) or free-form (its options are empty).
    """
    examples = []
    for place, line in _lines(path):
        try:
            examples.append(example_from(_record(line), merge_duplicates, labelled))
        except TaskError as error:
            raise TaskError(f"{place}: {error}") from None
    return examples


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
        TaskError: There is no such task or seed, or a line is malformed.
    """
    path = Path(path).absolute()
    if path.is_dir():
        read = partial(read_examples, merge_duplicates=merge_duplicates)
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
) -> TaskSet:
    """Load several tasks from a folder of tasks.

    Args:
        root: Folder that holds the tasks.
        names: Which tasks, in this order. None takes all of `root` in alphabetical order, except free-form
            tasks, which have no options to score (one warning counts them).
        seed: As in `load_task`.
        allow_missing: Leave out names that are not in `root`, with one warning, instead of raising.
        merge_duplicates: As in `read_examples`.

    Raises:
        TaskError: Names are missing (all are listed, with near names), no task is left, or one is malformed.
    """
    places = task_places(root)
    if isinstance(names, str):
        raise TaskError(f"`names` must be a list of task names, got the string {names!r}; pass [{names!r}]")
    chosen = _scorable(root, places) if names is None else present_tasks(root, list(names), places, allow_missing)
    if not chosen:
        raise TaskError(f"{root}: no multiple-choice task to load; expected <task>.jsonl or <task>/ in it")
    return TaskSet(load_task(places[name], seed=seed, merge_duplicates=merge_duplicates) for name in chosen)


def _lines(path: str | Path) -> Iterator[tuple[str, str]]:
    return lines(path, "jsonl", "one JSON object a line")


def _record(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TaskError(f"broken JSON ({error}); expected one whole object on this line") from None
    if not isinstance(record, dict):
        raise TaskError(f"expected an object with `input`, `output`, `options`; got {type(record).__name__}")
    return record


def _field(record: dict[str, Any], field: str, kind: type) -> Any:
    if field not in record:
        raise TaskError(f"field `{field}` is missing; got only {sorted(record)}")
    if not isinstance(record[field], kind):
        raise TaskError(f"field `{field}` must be a {kind.__name__}, got {record[field]!r}")
    return record[field]


def example_from(record: dict[str, Any], merge_duplicates: bool, labelled: bool) -> Example:
    """Make an example of the fields of a line."""
    text, options = _field(record, "input", str), _field(record, "options", list)
    if not options:
        raise TaskError("`options` is empty: free-form tasks have no options to score; leave this task out")
    output = _field(record, "output", str) if labelled or "output" in record else options[0]
    if output not in options:
        raise TaskError(f"`output` must be one of `options`: got {output!r}, options are {options}")
    if merge_duplicates:
        options = [option for index, option in enumerate(options) if option not in options[:index]]
    return Example(text, tuple(options), options.index(output))


def seeded_files(folder: Path, suffix: str = ".jsonl", shots: str = "16") -> dict[str, dict[int, Path]]:
    """Map part (train, dev, test) and seed, ascending, to the file ``<task>_<shots>_<seed>_<part>`` in a task's folder.

    Args:
        folder: the task's folder, of which it has its name.
        suffix: of the files, with the dot.
        shots: pattern of the number of shots.
    """
    files: dict[str, dict[int, Path]] = {"train": {}, "dev": {}, "test": {}}
    pattern = re.compile(rf"{re.escape(folder.name)}_(?:{shots})_([0-9]{{1,9}})_(train|dev|test){re.escape(suffix)}")
    matches = [match for file in children(folder) if (match := pattern.fullmatch(file.name))]
    for match in sorted(matches, key=lambda match: int(match[1])):
        same = files[match[2]].setdefault(int(match[1]), folder / match[0])
        if same.name != match[0]:
            raise TaskError(f"{folder}: {same.name} and {match[0]} are of one seed; keep one of the two")
    return files


def seeded_task(
    folder: Path, files: dict[str, dict[int, Path]], seed: int | None, read: Callable[[Path], list[Example]]
) -> Task:
    """Make a task of files by seed; see `load_task` for what is support and what query.

    Args:
        folder: the task's folder, of which it has its name.
        files: as `seeded_files` gives them.
        seed: which seed; None pools all.
        read: reads the examples of a file.

    Raises:
        TaskError: there is no train file (of this seed), or a file is malformed.
    """
    train, dev, test = files.values()
    if not train:
        suffix = next((file.suffix for part in (dev, test) for file in part.values()), ".jsonl")
        raise TaskError(f"{folder}: no train file here; expected {folder.name}_16_<seed>_train{suffix}")
    if seed is not None and seed not in train:
        raise TaskError(f"{folder}: no train file of seed {seed}; seeds here: {', '.join(map(str, train))}")

    def pool(paths: Iterable[Path]) -> list[Example]:
        first: dict[str, Example] = {}
        for path in paths:
            for example in read(path):
                first.setdefault(example.input, example)
        return list(first.values())

    if seed is None:
        support, query = pool(train.values()), pool(dev.values())
    else:
        support = read(train[seed])
        others = [file for other, file in dev.items() if other != seed]
        one = test.get(seed) or next(iter(test.values()), None)
        query = read(one) if one else pool(others)
    seen = {example.input for example in support}
    return Task(folder.name, tuple(support), tuple(e for e in query if e.input not in seen))


def task_places(root: str | Path) -> dict[str, Path]:
    """Map the name of each task in `root` to its file or folder, in alphabetical order."""
    if not Path(root).is_dir():
        raise TaskError(f"{root}: expected a folder of tasks, but there is none; check the path")
    places: dict[str, Path] = {}
    for child in sorted(Path(root).iterdir()):
        if child.is_dir() or child.suffix == ".jsonl":
            name = child.name if child.is_dir() else child.stem
            if name in places:
                raise TaskError(f"{root}: task {name!r} is there as a folder and as a file; remove one")
            places[name] = child
    return places


def present_tasks(root: str | Path, names: list[str], places: Collection[str], allow_missing: bool) -> list[str]:
    """Return the names that are in `root`; raise, or warn once, when others are not."""
    missing = [name for name in names if name not in places]
    if missing:
        count = f"{root}: {len(missing)} of {len(names)} tasks are missing"
        if not allow_missing:
            listed = ", ".join(f"{name!r}{did_you_mean(name, places)}" for name in missing)
            raise TaskError(f"{count}: {listed}; add their files, or pass allow_missing=True to do without")
        warnings.warn(f"{count} and left out: {', '.join(missing)}", stacklevel=3)
    return [name for name in names if name in places]


def _scorable(root: str | Path, places: dict[str, Path]) -> list[str]:
    """Return the names of the multiple-choice tasks, with one warning that counts the free-form ones."""
    tasks = [name for name, path in places.items() if path.is_file() or any(seeded_files(path).values())]
    chosen = [name for name in tasks if has_options(places[name])]
    if len(chosen) < len(tasks):
        count = f"{len(tasks) - len(chosen)} of {len(tasks)} tasks"
        warnings.warn(f"{root}: {count} are free-form (no options to score) and left out", stacklevel=3)
    return chosen

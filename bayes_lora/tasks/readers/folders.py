"""Folders of tasks: which tasks are there, and the files of a task by part and seed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from bayes_lora.errors import TaskError, did_you_mean
from bayes_lora.tasks.readers.text_files import children
from bayes_lora.tasks.task import Example, Task

__all__ = ["present_tasks", "seeded_files", "seeded_task"]


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
    """Make a task of files by seed; see `read_metaicl` for what is support and what query.

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

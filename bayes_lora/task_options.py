"""Which tasks the command line's options mean."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path

from bayes_lora.errors import TaskError
from bayes_lora.tasks import Task, TaskSet, load_split, load_task, load_taskset

__all__ = ["training_tasks", "unseen_tasks"]


def training_tasks(folder: Path, split: str | None, names: str | None) -> TaskSet:
    """The tasks of these names (commas between), or a split's training tasks, or all tasks of a folder."""
    wanted = None if split is None else load_split(folder, split, allow_missing=True)[0]
    wanted = _names(names) if names else wanted
    return load_taskset(folder, wanted, merge_duplicates=True)


def unseen_tasks(
    folder: Path,
    split: str | None,
    names: str | None,
    seed: int,
    shots: int,
    queries: int,
    fitted: Collection[str] = (),
) -> tuple[TaskSet, list[str]]:
    """The tasks of these names, or a split's unseen tasks, or all tasks of a folder but those of ``fitted``.

    Args:
        folder: of the tasks.
        split: of the folder's splits.
        names: commas between.
        seed: which support set, or how to draw one.
        shots: support examples per task.
        queries: at most this many query examples per task.
        fitted: tasks that a posterior was fitted on. Those asked for by name or split are taken, with a warning.

    Returns:
        The tasks, and the names of those left out.

    Raises:
        TaskError: no task is left, or one is too small.
    """
    wanted = None if split is None else load_split(folder, split, allow_missing=True)[1]
    wanted = _names(names) if names else wanted
    loaded = load_taskset(folder, wanted, merge_duplicates=True)
    known = [name for name in loaded if name in fitted]
    if wanted is None and len(known) == len(loaded):
        raise TaskError(
            f"{folder}: the posterior was fitted on all {len(loaded)} tasks here, so none is unseen. Give another "
            "--tasks, or name with --names those to evaluate on all the same."
        )
    if wanted is None:
        loaded = loaded.select([name for name in loaded if name not in known])
    elif known:
        warnings.warn(f"not unseen, for the posterior was fitted on them: {', '.join(known)}", stacklevel=2)
    tasks = TaskSet(_unseen_task(folder, task, seed, shots, queries) for task in loaded.values())
    return tasks, known if wanted is None else []


def _unseen_task(folder: Path, task: Task, seed: int, shots: int, queries: int) -> Task:
    """The support and query files of a seed (MetaICL layout), or a split of the one file; cut to size."""
    if (folder / task.name).is_dir():
        task = load_task(folder / task.name, seed=seed, merge_duplicates=True)
    if not task.query:
        task = task.split(shots, seed=seed)
    if not task.query:
        raise TaskError(
            f"task {task.name!r} has {len(task)} examples, and --shots {shots} leaves none to predict. Ask for fewer."
        )
    return task.subset(shots, min(queries, len(task.query)), seed=seed)


def _names(text: str) -> list[str]:
    return [name for part in text.split(",") if (name := part.strip())]

"""Which tasks the command line's options mean."""

from __future__ import annotations

from pathlib import Path

from bayes_lora.errors import TaskError
from bayes_lora.tasks import Task, TaskSet, load_split, load_task, load_taskset

__all__ = ["training_tasks", "unseen_tasks"]


def training_tasks(folder: Path, split: str | None, names: str | None) -> TaskSet:
    """The tasks of these names (commas between), or a split's training tasks, or all tasks of a folder."""
    wanted = None if split is None else load_split(folder, split, allow_missing=True)[0]
    wanted = _names(names) if names else wanted
    return load_taskset(folder, wanted, merge_duplicates=True)


def unseen_tasks(folder: Path, split: str | None, names: str | None, seed: int, shots: int, queries: int) -> TaskSet:
    """The same for a split's unseen tasks, each with ``shots`` support and at most ``queries`` query examples."""
    wanted = None if split is None else load_split(folder, split, allow_missing=True)[1]
    wanted = _names(names) if names else wanted
    loaded = load_taskset(folder, wanted, merge_duplicates=True)
    return TaskSet(_unseen_task(folder, task, seed, shots, queries) for task in loaded.values())


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

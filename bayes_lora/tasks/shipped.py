"""The tasks that ship with the package."""

from __future__ import annotations

from importlib import resources

from bayes_lora.tasks.readers.load import load_tasks
from bayes_lora.tasks.splits import load_split
from bayes_lora.tasks.task import Task
from bayes_lora.tasks.task_set import TaskSet

__all__ = ["demo_spreadsheet", "demo_tasks"]


def demo_tasks(shots: int = 16, seed: int = 0) -> tuple[TaskSet, TaskSet]:
    """The shipped training tasks, and the unseen ones split into ``shots`` support examples and the rest."""
    with resources.as_file(resources.files("bayes_lora.tasks") / "demo") as folder:
        training, unseen = load_split(folder, "demo")
        tasks = load_tasks(folder, names=[*training, *unseen])
    return tasks.select(training), TaskSet(task.split(shots, seed=seed) for task in tasks.select(unseen).values())


def demo_spreadsheet(shots: int = 16, seed: int = 0) -> Task:
    """The shipped spreadsheet, tickets of a help desk, split into ``shots`` support examples and the rest."""
    with resources.as_file(resources.files("bayes_lora.tasks") / "spreadsheet" / "tickets.csv") as path:
        [task] = load_tasks(path).values()
    return task.split(shots, seed=seed)

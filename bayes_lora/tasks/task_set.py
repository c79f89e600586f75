"""A collection of tasks by name."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping

from bayes_lora.errors import TaskError, did_you_mean
from bayes_lora.tasks.task import Task

__all__ = ["TaskSet"]


class TaskSet(Mapping[str, Task]):
    """An ordered, read-only collection of tasks by name.

    Args:
        tasks: The tasks, in order; no two of the same name.

    Raises:
        TaskError: A name occurs twice.
    """

    def __init__(self, tasks: Iterable[Task]) -> None:
        """Collect the tasks."""
        self._tasks: dict[str, Task] = {}
        for task in tasks:
            if task.name in self._tasks:
                raise TaskError(f"task {task.name!r} occurs twice; rename or remove one of the two")
            self._tasks[task.name] = task

    def __getitem__(self, name: str) -> Task:
        """Return the task of that name; an unknown name is a `KeyError`, as in any mapping."""
        try:
            return self._tasks[name]
        except KeyError:
            raise KeyError(f"no task {name!r}{did_you_mean(str(name), self._tasks)}") from None

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, in order."""
        return iter(self._tasks)

    def __len__(self) -> int:
        """Number of tasks."""
        return len(self._tasks)

    def __repr__(self) -> str:
        """Return the counts only: a task set may hold a million words."""
        support = sum(len(task.support) for task in self.values())
        query = sum(len(task.query) for task in self.values())
        return f"TaskSet({len(self)} tasks: {support} support and {query} query examples)"

    def select(self, names: Iterable[str]) -> TaskSet:
        """Return the tasks of these names, in the order of `names`.

        Raises:
            TaskError: A name is unknown (all unknown names are listed, with the nearest known ones).
        """
        names = list(names)
        unknown = [f"{name!r}{did_you_mean(name, self._tasks)}" for name in names if name not in self._tasks]
        if unknown:
            raise TaskError(f"no such task among the {len(self)} at hand: {', '.join(unknown)}")
        return TaskSet(self._tasks[name] for name in names)

    def split(self, held_out: float | int, *, seed: int) -> tuple[TaskSet, TaskSet]:
        """Hold out whole tasks at random, for instance to validate on tasks not trained on.

        Args:
            held_out: Number of tasks to hold out (an int), or their fraction (a float in (0, 1), rounded to
                the nearest whole number of tasks).
            seed: Seed of the draw.

        Returns:
            The tasks that are kept and those held out, neither empty, both in the present order.

        Raises:
            TaskError: The request would leave either part empty.
        """
        count = held_out if isinstance(held_out, int) else round(held_out * len(self))
        if not 0 < count < len(self):
            raise TaskError(
                f"`held_out`={held_out} would hold out {count} of {len(self)} tasks, but both "
                "parts need at least one; pass a whole number of tasks, or a fraction in (0, 1)"
            )
        held = set(random.Random(seed).sample(list(self._tasks), count))
        kept = TaskSet(task for name, task in self.items() if name not in held)
        return kept, TaskSet(task for name, task in self.items() if name in held)

"""Load the tasks that the options of the command line select."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bayes_lora.cli.console import status
from bayes_lora.errors import TaskError
from bayes_lora.tasks import Card, Example, Task, TaskSet, load_split, load_tasks, read_questions
from bayes_lora.tasks.readers.card_examples import load_card
from bayes_lora.tasks.readers.formats import Found, find_tasks, look_at
from bayes_lora.tasks.readers.load import format_options
from bayes_lora.tasks.readers.questions import question_card, read_table_questions
from bayes_lora.tasks.readers.table_rows import TABLES, Table

__all__ = ["TaskSource", "labelled", "one_task", "questions", "support_of", "training_tasks", "unseen_tasks"]

MANY_ROWS = 1_000
"""Maximum number of support examples by default; a gradient step uses all of them, so more must be requested."""


@dataclass
class TaskSource:
    """Location and format of tasks. Prints which columns of a table are used.

    Attributes:
        path: a file, the folder of a task, or a folder of tasks.
        format: a format of `load_tasks`; None detects it, or means ``table`` if columns are given.
        input: input column of a table, or a template; None detects it.
        label: answer column of a table; None detects it.
        max_options: maximum number of different answers that become options; None takes the reader's default.
        cards: cards of the loaded tasks, by task name.
    """

    path: Path
    format: str | None = None
    input: str | None = None
    label: str | None = None
    max_options: int | None = None
    cards: dict[str, Card] = field(default_factory=dict)

    def __post_init__(self) -> None:
        r"""Replace ``\n`` in a template by a newline, which is hard to type in a shell."""
        self.input = self.input and self.input.replace("\\n", "\n")
        if self.format is None and (self.input or self.label):
            self.format = "table"

    @cached_property
    def found(self) -> Found:
        """The tasks at ``path``, of one format."""
        return find_tasks(self.path, self.format)

    def load(self, names: list[str] | None = None, seed: int | None = None) -> TaskSet:
        """Load tasks. ``seed`` selects the support set of tasks that have one per seed.

        Raises:
            TaskError: see `load_tasks`.
        """
        loaded = self._load(self.found, names)
        if seed is None or "seed" not in format_options(self.found.format):
            return loaded
        return TaskSet(self._seeded(task, seed) for task in loaded.values())

    def card(self, task: Task) -> Card:
        """Return the card that reads questions of a loaded task from a table."""
        cards = {one.content.name: one.content for one in self.found.places.values() if isinstance(one.content, Card)}
        return (cards | self.cards).get(task.name) or question_card(task)

    def _load(self, found: Found, names: list[str] | None, **options: Any) -> TaskSet:
        known = format_options(found.format)
        if "merge_duplicates" in known:
            options["merge_duplicates"] = True
        if "on_card" in known:
            options["on_card"] = self._record_card
        given = {"input": self.input, "label": self.label, "max_options": self.max_options}
        options |= {name: value for name, value in given.items() if value}
        return load_tasks(found, names=names, **options)

    def _seeded(self, task: Task, seed: int) -> Task:
        folder = self.found.places[task.name].path
        return self._load(find_tasks(folder, self.format), None, seed=seed)[task.name] if folder.is_dir() else task

    def _record_card(self, card: Card, description: str) -> None:
        self.cards[card.name] = card
        status(f"{card.files}: {description}")


def training_tasks(source: TaskSource, split: str | None, names: str | None) -> TaskSet:
    """Return the tasks of these comma-separated names, or the training tasks of a split, or all tasks."""
    wanted = None if split is None else load_split(source.path, split, allow_missing=True)[0]
    return source.load(_names(names) if names else wanted)


def unseen_tasks(
    source: TaskSource,
    split: str | None,
    names: str | None,
    seed: int,
    shots: int,
    queries: int,
    fitted: Collection[str] = (),
) -> tuple[TaskSet, list[str]]:
    """Return the tasks of these names, or the unseen tasks of a split, or all tasks except those of ``fitted``.

    Args:
        source: location of the tasks.
        split: name of a split of the folder.
        names: comma-separated names.
        seed: seed of the support set, or of its sample.
        shots: support examples per task.
        queries: maximum number of query examples per task.
        fitted: tasks that a posterior was fitted on. If selected by name or split, they are used, with a warning.

    Returns:
        The tasks, and the names of those left out.

    Raises:
        TaskError: no task is left, or a task is too small.
    """
    wanted = None if split is None else load_split(source.path, split, allow_missing=True)[1]
    wanted = _names(names) if names else wanted
    loaded = source.load(wanted, seed)
    known = [name for name in loaded if name in fitted]
    if wanted is None and len(known) == len(loaded):
        raise TaskError(
            f"{source.path}: the posterior was fitted on all {len(loaded)} tasks here, so none is unseen. Use another "
            "--tasks, or select tasks with --names to evaluate on them anyway."
        )
    if wanted is None:
        loaded = loaded.select([name for name in loaded if name not in known])
    elif known:
        warnings.warn(f"not unseen, because the posterior was fitted on them: {', '.join(known)}", stacklevel=2)
    tasks = TaskSet(_unseen_task(task, seed, shots, queries) for task in loaded.values())
    return tasks, known if wanted is None else []


def one_task(source: TaskSource, name: str | None, seed: int | None = None) -> Task:
    """Return the task of this name, or the only one.

    Raises:
        TaskError: there are several tasks and no name.
    """
    loaded = source.load(None if name is None else [name], seed)
    if name is None and len(loaded) > 1:
        some = ", ".join(list(loaded)[:5])
        raise TaskError(f"{source.path}: has {len(loaded)} tasks, such as {some}. Choose one with --task.")
    return next(iter(loaded.values()))


def support_of(task: Task, seed: int, shots: int | None) -> Task:
    """Return the support to adapt to: all of it, or the sample of :func:`unseen_tasks` with the same seed.

    Raises:
        TaskError: there are fewer examples than ``shots``, or more than ``MANY_ROWS`` without ``shots``.
    """
    if shots is None and len(task.support) > MANY_ROWS:
        raise TaskError(
            f"task {task.name!r} has {len(task.support):,} examples, and a gradient step uses all of them. Choose a "
            f"number with --shots, such as --shots 64, or --shots {len(task.support)} for all."
        )
    if shots is None:
        return Task(task.name, task.support)
    return Task(task.name, _drawn(task, seed, shots).subset(shots, 0, seed=seed).support)


def questions(path: Path, card: Card) -> Sequence[Example | str]:
    """Read questions to predict: lines in the MetaICL format, or a table with the card of the task.

    Raises:
        TaskError: the file cannot be read, or a line or a row is malformed.
    """
    place = look_at(path)
    source = place.content if isinstance(place.content, Table) else path
    if path.suffix.lower() in TABLES and place.formats != ["metaicl"]:
        return read_table_questions(source, card)
    return read_questions(source)


def labelled(path: Path, card: Card) -> list[Example]:
    """Read labelled rows of the task that was adapted to, with its options in its order.

    Raises:
        TaskError: the file cannot be read, answers are free text, or one is not among the options.
    """
    if card.label and card.options is not None:
        return list(load_card(replace(card, files=path.name, folder=path.parent, split="train")).examples)
    task = one_task(TaskSource(path), None)
    if task.free_form:
        raise TaskError(f"{path}: expected rows whose answers are options, got free text. Leave out --labelled.")
    if not isinstance(card.options, tuple):
        return list(task.examples)
    unknown = {row.output for row in task.examples} - {*card.options}
    if unknown:
        raise TaskError(
            f"{path}: expected answers among the options that were adapted to, {', '.join(card.options)}; got "
            f"{min(unknown)!r}. Correct the row or leave it out."
        )
    return [Example(row.input, card.options, card.options.index(row.output)) for row in task.examples]


def _drawn(task: Task, seed: int, shots: int) -> Task:
    """Return the task with its own support and query, or with a random split if it has no query."""
    return task if task.query else task.split(shots, seed=seed)


def _unseen_task(task: Task, seed: int, shots: int, queries: int) -> Task:
    task = _drawn(task, seed, shots)
    if not task.query:
        raise TaskError(
            f"task {task.name!r} has {len(task)} examples, and --shots {shots} leaves none to predict. Lower --shots."
        )
    return task.subset(shots, min(queries, len(task.query)), seed=seed)


def _names(text: str) -> list[str]:
    return [name for part in text.split(",") if (name := part.strip())]

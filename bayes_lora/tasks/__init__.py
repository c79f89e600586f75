"""Tasks: labelled multiple-choice examples, and the readers that make them from files."""

from __future__ import annotations

from bayes_lora.tasks.metaicl import has_options, load_split, load_task, load_taskset, read_examples
from bayes_lora.tasks.task import Example, Task, TaskSet

__all__ = [
    "Example",
    "Task",
    "TaskSet",
    "has_options",
    "load_split",
    "load_task",
    "load_taskset",
    "read_examples",
]

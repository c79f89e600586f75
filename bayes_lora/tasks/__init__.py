"""Tasks: labelled examples, and the readers that make them from files."""

from __future__ import annotations

from bayes_lora.tasks.overlap import Overlap, find_overlaps, overlap_table
from bayes_lora.tasks.readers.card import Card, RowOptions, gallery, read_card
from bayes_lora.tasks.readers.card_examples import load_card
from bayes_lora.tasks.readers.load import load_tasks, task_format, task_from
from bayes_lora.tasks.readers.metaicl import read_examples, read_questions
from bayes_lora.tasks.readers.table import load_table
from bayes_lora.tasks.splits import load_split, shipped_splits
from bayes_lora.tasks.statistics import statistics_table, task_statistics
from bayes_lora.tasks.task import Example, Task
from bayes_lora.tasks.task_set import TaskSet

__all__ = [
    "Card",
    "Example",
    "Overlap",
    "RowOptions",
    "Task",
    "TaskSet",
    "find_overlaps",
    "gallery",
    "load_card",
    "load_split",
    "load_table",
    "load_tasks",
    "overlap_table",
    "read_card",
    "read_examples",
    "read_questions",
    "shipped_splits",
    "statistics_table",
    "task_format",
    "task_from",
    "task_statistics",
]

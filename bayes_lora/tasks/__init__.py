"""Tasks: labelled examples, the readers that make them from files, and episodes of them."""

from __future__ import annotations

from bayes_lora.tasks.card_file import Card, RowOptions, gallery, read_card
from bayes_lora.tasks.cards import load_card
from bayes_lora.tasks.episode import Episode, collate
from bayes_lora.tasks.metaicl import has_options, load_task, load_taskset, read_examples, read_questions
from bayes_lora.tasks.overlap import Overlap, find_overlaps, overlap_table
from bayes_lora.tasks.packing import EncodedExample
from bayes_lora.tasks.prompts import Encoder
from bayes_lora.tasks.sampler import EpisodeSampler
from bayes_lora.tasks.sources import load_tasks, task_format, task_from
from bayes_lora.tasks.splits import load_split, shipped_splits
from bayes_lora.tasks.statistics import TaskStatistics, statistics_table, task_statistics, token_counter
from bayes_lora.tasks.tables import load_table
from bayes_lora.tasks.task import Example, Task
from bayes_lora.tasks.task_set import TaskSet
from bayes_lora.tasks.templates import TEMPLATES, PromptTemplate

__all__ = [
    "TEMPLATES",
    "Card",
    "EncodedExample",
    "Encoder",
    "Episode",
    "EpisodeSampler",
    "Example",
    "Overlap",
    "PromptTemplate",
    "RowOptions",
    "Task",
    "TaskSet",
    "TaskStatistics",
    "collate",
    "find_overlaps",
    "gallery",
    "has_options",
    "load_card",
    "load_split",
    "load_table",
    "load_task",
    "load_tasks",
    "load_taskset",
    "overlap_table",
    "read_card",
    "read_examples",
    "read_questions",
    "shipped_splits",
    "statistics_table",
    "task_format",
    "task_from",
    "task_statistics",
    "token_counter",
]

"""Tasks: labelled multiple-choice examples, the readers that make them from files, and episodes of them."""

from __future__ import annotations

from bayes_lora.tasks.card_file import Card, RowOptions, gallery, read_card
from bayes_lora.tasks.cards import load_card
from bayes_lora.tasks.episode import Episode, collate
from bayes_lora.tasks.metaicl import has_options, load_task, load_taskset, read_examples
from bayes_lora.tasks.packing import EncodedExample
from bayes_lora.tasks.prompts import Encoder, PromptTemplate
from bayes_lora.tasks.sampler import EpisodeSampler
from bayes_lora.tasks.splits import load_split
from bayes_lora.tasks.task import Example, Task, TaskSet

__all__ = [
    "Card",
    "EncodedExample",
    "Encoder",
    "Episode",
    "EpisodeSampler",
    "Example",
    "PromptTemplate",
    "RowOptions",
    "Task",
    "TaskSet",
    "collate",
    "gallery",
    "has_options",
    "load_card",
    "load_split",
    "load_task",
    "load_taskset",
    "read_card",
    "read_examples",
]

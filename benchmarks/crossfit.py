"""Tasks of CrossFit for the shipped prior and its benchmarks: which are for training, which are unseen.

Development tasks were looked at while choosing settings. They are neither training tasks nor reported with the unseen
ones.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bayes_lora.errors import TaskError
from bayes_lora.tasks import Example
from bayes_lora.utils.storage import read_json

DEVELOPMENT = ["ag_news", "tweet_eval-stance_atheism", "climate_fever", "emo"]
SEEDS = (13, 21, 42)


def unseen_names(folder: Path) -> set[str]:
    """Names of the unseen tasks: those of the splits cls-45 and mcqa."""
    splits = read_json(folder / "splits.json")["abmll"]
    return {name for split in ("cls-45", "mcqa") for name in splits[split]["test"]}


def lines(folder: Path, task: str, seed: int, part: str) -> list[dict[str, Any]]:
    path = folder / task / f"{task}_16_{seed}_{part}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def examples(rows: Sequence[Mapping[str, Any]]) -> list[Example]:
    """Examples with 2 to 8 options of at most 70 words in all; others do not fit into 128 tokens."""
    found = []
    for row in rows:
        options = tuple(dict.fromkeys(row["options"]))
        if not 2 <= len(options) <= 8 or row["output"] not in options or sum(len(o.split()) for o in options) > 70:
            continue
        try:
            found.append(Example(row["input"], options, options.index(row["output"])))
        except TaskError:  # options that look the same
            continue
    return found


def training_tasks(folder: Path, unseen: set[str], count: int = 48) -> Iterator[tuple[str, list[Example]]]:
    """Yield ``count`` examples of every task with as many that is neither unseen nor a development task."""
    for path in sorted(one for one in folder.iterdir() if one.is_dir()):
        name = path.name
        if name in unseen or name in DEVELOPMENT:
            continue
        parts = [(seed, part) for seed in (13, 21, 42, 87, 100) for part in ("train", "dev")]
        rows = [row for seed, part in parts for row in lines(folder, name, seed, part)]
        rows += lines(folder, name, 100, "test")[:200]
        first: dict[str, Example] = {}
        for example in examples(rows):
            first.setdefault(example.input, example)
        distinct = list(first.values())
        random.Random(name).shuffle(distinct)
        if len(distinct) >= count:
            yield name, distinct[:count]


def unseen_tasks(folder: Path, unseen: set[str]) -> Iterator[tuple[str, list[list[Example]], list[Example]]]:
    """Yield the support sets and the queries of each test or development task."""
    for name in sorted(unseen | set(DEVELOPMENT)):
        if not (folder / name).is_dir():
            continue
        sets = [examples(lines(folder, name, seed, "train")) for seed in SEEDS]
        queries = examples(lines(folder, name, 100, "test"))
        if not queries:
            queries = examples([row for seed in (87, 100, *SEEDS) for row in lines(folder, name, seed, "dev")])
        seen = {example.input for one in sets for example in one}
        queries = [example for example in queries if example.input not in seen]
        random.Random(0).shuffle(queries)
        own = len({example.options for example in queries}) > 1
        yield name, sets, queries[: 50 if own else 100]

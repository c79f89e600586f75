"""The reading cases: hidden states and features of new examples, and of examples that an earlier run has read."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from flops import flops
from harness import Result, interleave, product, ratio, spread
from workload import Setup

from bayes_lora.episodes import Episode, collate
from bayes_lora.episodes.batching import by_tokens
from bayes_lora.episodes.packing import EncodedExample
from bayes_lora.lm.language_model import LanguageModel

ROUNDS = 3


@torch.no_grad()
def reading(setup: Setup) -> list[Result]:
    """Read new examples, then read them as a later run does, next to the rate of a large matrix product.

    Each round reads different examples. The later run is a new language model with the same cache folder. Its
    self-check and the hash of its weights, which happen once per run, are not timed.
    """
    sizes, count = setup.sizes, min(ROUNDS, setup.sizes.rounds[1])
    layers = setup.shape.layers // 3
    size = 64 if setup.shape.hidden < 64 else 2048
    with tempfile.TemporaryDirectory() as folder:
        # One more than rounds, because a GPU is warmed up.
        first, *later = [setup.language_model(layers, cache_folder=folder) for _ in range(2 + count)]
        collections = [_examples(setup, first, index) for index in range(1 + count)]
        for lm in (first, *later):
            lm.forward  # noqa: B018, chosen on first use, with a self-check
        new, known = (itertools.count() for _ in range(2))

        def read_first() -> None:
            first.features(collections[next(new)])

        def read_again() -> None:
            index = next(known)
            later[index].features(collections[index])

        sides = {
            "first run": read_first,
            "later run": read_again,
            "matrix product": product(setup.device, setup.arithmetic, size),
        }
        seconds = interleave(sides, setup.device, budget=sizes.budget, rounds=(min(count, sizes.rounds[0]), count))
    tokens = sum(len(e) for episode in collections for task in episode.examples for e in task if e) / len(collections)
    work = sum(_operations(setup, first, episode) for episode in collections) / len(collections)
    reached = {
        name: done / median(seconds[name]) for name, done in (("first run", work), ("matrix product", 2 * size**3))
    }
    details: dict[str, Any] = {
        "tokens": tokens,
        "tokens_per_second": tokens / median(seconds["first run"]),
        "flops_per_second": reached,
        "examples": int(collections[0].mask.sum()),
    }
    share = reached["first run"] / reached["matrix product"]
    what = "reading new examples, share of the rate of a 2048 x 2048 matrix product"
    pair = ("later run", "first run")
    again = f"reading {details['examples']} examples that an earlier run has read, against reading them first"
    return [
        Result("reading", what, share, "x", ">=", 0.5, 1.0, seconds, details),
        Result(
            "reading_again",
            again,
            ratio(seconds, *pair),
            "x",
            "<=",
            0.05,
            0.0,
            seconds,
            {"range": spread(seconds, *pair)},
        ),
    ]


def _examples(setup: Setup, lm: LanguageModel, index: int) -> Episode:
    """Examples of as many tasks as a training step has, 16 for each."""
    sizes = setup.sizes
    counts = [sizes.options[i % len(sizes.options)] for i in range(sizes.tasks)]
    tasks = [setup.task(5000 + 100 * index + i, sizes.support, options=count) for i, count in enumerate(counts)]
    return collate([lm.encoder(task.support) for task in tasks]).to(setup.device)


def _operations(setup: Setup, lm: LanguageModel, episode: Episode) -> float:
    """Operations of the forwards in which a feature reader reads an episode."""
    examples: Sequence[EncodedExample] = [e for task in episode.examples for e in task if e is not None]
    total = 0.0
    for batch in by_tokens([len(e) for e in examples], lm.budget.per_item(1)):
        rows = collate([[examples[i] for i in batch]])
        total += flops(setup.shape, rows.input_ids.numel(), rows.input_ids.shape[1], len(rows.sources), lora_layers=0)
    return total

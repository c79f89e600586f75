"""Costs and savings of packing episodes: time of collation, share of padding, time of a training step.

python benchmarks/collation.py --quick            # the shipped tasks, a word a token, a tiny model
python benchmarks/collation.py --tasks data/crossfit --split cls-45 --tokenizer \\
    HuggingFaceTB/SmolLM2-135M-Instruct           # results/collation-cpu.json: four minutes on one core

Each episode is packed twice from the same examples: as usual, and with one row per example. The step is that of the
default recipe on SmolLM2-135M's shape with random weights, adapters in the top third of the layers, trunk and features
cached.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from cases import TrainingStep
from harness import interleave, machine, ratio, ratio_of_fastest, spread
from workload import FLOAT32, SHAPES, Setup, Sizes, build_setup, word_tokenizer

from bayes_lora.cli.show import load_encoder
from bayes_lora.episodes import Encoder, Episode, EpisodeSampler, collate, packing
from bayes_lora.recipes.config import RunConfig
from bayes_lora.recipes.recipes import build_objective
from bayes_lora.tasks import TaskSet, load_split, load_tasks
from bayes_lora.tasks.shipped import demo_tasks
from bayes_lora.utils.storage import write_json

SHARED, ALONE = "examples share rows", "a row per example"


@contextmanager
def sharing(on: bool) -> Iterator[None]:
    """Whether examples may share rows inside the block."""
    before = packing.ROW_TOKENS
    packing.ROW_TOKENS = before if on else 1
    try:
        yield
    finally:
        packing.ROW_TOKENS = before


def both(make: Callable[[], Episode]) -> dict[str, Episode]:
    """The same episode packed in two ways."""
    found = {}
    for name in (SHARED, ALONE):
        with sharing(name == SHARED):
            found[name] = make()
    return found


def padding(tasks: TaskSet, encoder: Encoder, num_tasks: int, episodes: int) -> dict[str, Any]:
    """Share of padding in the scored rows of several episodes, and milliseconds of collation per example."""
    sampler = EpisodeSampler(
        tasks, encoder, tasks_per_episode=num_tasks, num_support=16, num_query=8, score_support=False
    )
    line: dict[str, Any] = {"tasks": num_tasks, "max_length": encoder.max_length, "episodes": episodes}
    seconds: list[float] = []
    drawn = [both(lambda i=i: sampler[i]) for i in range(episodes)]  # type: ignore[misc]
    for name in (SHARED, ALONE):
        some = [one[name] for one in drawn]
        tokens = sum(one.input_ids.numel() for one in some)
        padded = sum(int((one.segments < 0).sum()) for one in some)
        length = fmean(one.input_ids.shape[1] for one in some)
        line[name] = {"tokens": tokens / episodes, "padding": padded / tokens, "row_tokens": length}
    for one in drawn:
        examples = [[e for e in task if e is not None] for task in one[SHARED].examples]
        started = time.perf_counter()
        collate(examples)
        seconds.append((time.perf_counter() - started) / sum(map(len, examples)))
    return line | {"milliseconds": 1e3 * median(seconds)}


def training_steps(setup: Setup, tasks: TaskSet, encoder: Encoder, count: int) -> dict[str, Any]:
    """Seconds of a training step on several episodes of four tasks, in turn with and without sharing rows."""
    lm = setup.language_model(layers=max(1, setup.shape.layers // 3))
    sampler = EpisodeSampler(tasks, encoder, tasks_per_episode=4, num_support=16, num_query=8, score_support=False)
    drawn = [both(lambda i=i: sampler[i]) for i in range(count)]  # type: ignore[misc]
    step = TrainingStep(build_objective(lm, RunConfig(recipe="abmll-network")))

    def side(name: str) -> Callable[[], None]:
        return lambda: [step(one[name]) for one in drawn] and None

    sides = {name: side(name) for name in (SHARED, ALONE)}
    budget, rounds = 4 * setup.sizes.budget, setup.sizes.rounds
    seconds = interleave(sides, setup.device, budget=budget, rounds=rounds, warm_up=True)
    pair = (ALONE, SHARED)
    tokens = {name: sum(one[name].input_ids.numel() for one in drawn) for name in pair}
    return {
        "ratio": ratio(seconds, *pair),
        "range": spread(seconds, *pair),
        "ratio_of_fastest": ratio_of_fastest(seconds, *pair),
        "ratio_of_tokens": tokens[ALONE] / tokens[SHARED],
        "seconds": {name: [s / count for s in times] for name, times in seconds.items()},
        "tokens": {name: total / count for name, total in tokens.items()},
    }


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few episodes and a tiny model, to test that it runs")
    parser.add_argument("--tasks", type=Path, help="a folder in the MetaICL layout; by default the shipped tasks")
    parser.add_argument("--split", default="cls-45", help="the split whose training tasks are used")
    parser.add_argument("--tokenizer", help="hub id or path of a model with a tokenizer; by default a token is a word")
    parser.add_argument("--no-step", action="store_true", help="do not measure the training step")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "collation-cpu.json")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    args = arguments(given)
    args.output.parent.mkdir(parents=True, exist_ok=True)  # fails now, not after minutes of measuring
    torch.set_num_threads(1)
    if args.tasks is None:
        tasks, _ = demo_tasks()
    else:
        names, _ = load_split(args.tasks, args.split, allow_missing=True)
        tasks = load_tasks(args.tasks, names=names, merge_duplicates=True)
    texts = {text for task in tasks.values() for one in task.examples for text in (one.input, *one.options)}
    vocabulary = sorted({word for text in texts for word in text.split()})
    shape, sizes = SHAPES["smollm2-135m"], Sizes()
    if args.quick:
        shape, sizes = replace(shape.tiny(), vocab=len(vocabulary) + 1), Sizes.quick()
    words = word_tokenizer(shape.vocab, vocabulary)
    encoders = [
        load_encoder(args.tokenizer, None, n) if args.tokenizer else Encoder(words, None, n) for n in (128, 256)
    ]
    lines = []
    for encoder in encoders:
        for count in (1, 4, 8):
            line = padding(tasks, encoder, min(count, len(tasks)), 2 if args.quick else 100)
            lines.append(line)
            shared, alone = line[SHARED], line[ALONE]
            print(
                f"T = {line['tasks']}, max_length {encoder.max_length}: {shared['padding']:.1%} padding, "
                f"{alone['padding']:.1%} with {ALONE}; {line['milliseconds']:.3f} ms an example"
            )
    result: dict[str, Any] = {"machine": machine(torch.device("cpu")), "tokenizer": args.tokenizer or "words"}
    result |= {"tasks": len(tasks), "lines": lines}
    if not args.no_step:
        setup = build_setup(shape, sizes, torch.device("cpu"), FLOAT32, 1.0)
        result["step"] = training_steps(setup, tasks, encoders[0], 1 if args.quick else 4)
        print(f"training step: {ALONE} takes {result['step']['ratio']:.2f} times as long")
    write_json(args.output, result)


if __name__ == "__main__":
    main()

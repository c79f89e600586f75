"""Few-shot adaptation to unseen tasks: a fitted posterior against a LoRA fine-tuned from scratch, over several seeds.

    bayes-lora fit --tasks data/crossfit --split cls-45 --run runs/cls-45 --recipe abmll-network
    python benchmarks/few_shot.py --run runs/cls-45 --tasks data/crossfit --seeds 13,21 \\
        --names ag_news,tweet_eval-stance_atheism,climate_fever,emo --output benchmarks/results/cls-45.json

A seed is one draw of the 16 support examples of each task. All methods use the same support, queries and LoRA sites.
Prints a Markdown table of means over tasks and seeds, with standard errors over seeds.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import peft
import pyro
import torch
import transformers

from bayes_lora.runs.compare import compare
from bayes_lora.runs.folder import CONFIG, CURVE
from bayes_lora.runs.loading import load_posterior
from bayes_lora.tasks import Task, load_tasks
from bayes_lora.utils.progress import bars
from bayes_lora.utils.storage import read_json, write_json

COLUMNS = {"accuracy": "accuracy", "nll": "NLL (nats)", "brier": "Brier", "ece": "ECE"}


def load(folder: Path, names: list[str], seed: int, queries: int) -> list[Task]:
    """The support set of every task for one seed, and at most ``queries`` test examples, the same for all seeds."""
    tasks = load_tasks(folder, names=names, seed=seed, merge_duplicates=True)
    return [t.subset(None, min(queries, len(t.query)), seed=0) for t in tasks.values()]


def summary(by_seed: dict[int, dict[str, Any]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Mean over seeds of each method's mean over tasks, and the standard error of that mean."""
    table: dict[str, dict[str, tuple[float, float]]] = {}
    for method in next(iter(by_seed.values())):
        table[method] = {}
        for column in COLUMNS:
            values = [one[method]["mean"][column] for one in by_seed.values()]
            error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
            table[method][column] = (fmean(values), error)
    return table


def markdown(table: dict[str, dict[str, tuple[float, float]]]) -> str:
    lines = ["| method | " + " | ".join(COLUMNS.values()) + " |", "| --- |" + " --- |" * len(COLUMNS)]
    for method, row in table.items():
        lines.append(f"| {method} | " + " | ".join(f"{m:.3f} ± {e:.3f}" for m, e in row.values()) + " |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run folder of a fit")
    parser.add_argument("--tasks", type=Path, required=True, help="folder of tasks in the MetaICL layout")
    parser.add_argument("--names", required=True, help="unseen tasks, separated by commas")
    parser.add_argument("--seeds", default="13,21,42")
    parser.add_argument("--queries", type=int, default=64, help="at most this many test examples per task")
    parser.add_argument("--steps", default="0,10", help="gradient steps after the amortized posterior")
    parser.add_argument("--rate", type=float, default=2e-3, help="Adam's learning rate in these steps")
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--rates", default="3e-4,1e-3,3e-3", help="Adam's learning rates for the LoRA baseline")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    started = time.perf_counter()
    posterior = load_posterior(args.run)
    by_seed = {}
    with bars() as progress:
        for seed in map(int, args.seeds.split(",")):
            comparison = compare(
                posterior,
                load(args.tasks, args.names.split(","), seed, args.queries),
                steps=[int(count) for count in args.steps.split(",")],
                learning_rate=args.rate,
                num_draws=args.draws,
                lora_learning_rates=[float(rate) for rate in args.rates.split(",")],
                progress=progress,
            )
            by_seed[seed] = comparison.to_dict()
            result = {
                "settings": {k: str(v) for k, v in vars(args).items() if k not in ("run", "tasks", "output")},
                "config": read_json(args.run / CONFIG),
                "curve": read_json(args.run / CURVE),
                "seeds": by_seed,
                "summary": summary(by_seed),
                "seconds": time.perf_counter() - started,
                "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
                "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft, pyro)},
            }
            write_json(args.output, result)  # after every seed, so that an interrupted run keeps its results
    print(markdown(summary(by_seed)))


if __name__ == "__main__":
    main()

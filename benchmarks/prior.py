"""Fit the prior that ships with the package: bayes_lora/prior, whose README is its model card.

    python benchmarks/prior.py --tasks data/crossfit --cache cache/crossfit --run runs/prior

It takes a quarter of an hour on two cores, and is deterministic. --install copies it into the package. With the same
cache, benchmarks/unseen.py does not compute the derivatives of training tasks again.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from crossfit import training_tasks, unseen_names
from rich.console import Console

import bayes_lora
from bayes_lora.recipes.config import RunConfig
from bayes_lora.recipes.recipes import build_language_model
from bayes_lora.runs.fit import with_language_model
from bayes_lora.runs.folder import CONFIG, POSTERIOR, TASKS, shipped_prior
from bayes_lora.tasks import Task, TaskSet
from bayes_lora.utils.progress import bars
from bayes_lora.utils.storage import write_json

EXAMPLES = 48


def settings(cache: Path | None = None) -> RunConfig:
    """Return the settings of the shipped prior: those of the recipe, and no held-out tasks."""
    return RunConfig.from_dict(
        {
            "recipe": "tangent",
            "language_model": {
                "dtype": "float32",
                "cache_folder": None if cache is None else str(cache),
                "cache_gib": 1.0,
            },
            "episodes": {"held_out": 0, "examples_per_task": EXAMPLES},
            "fit": {"steps": 50},
        }
    )


def tasks_of(folder: Path) -> TaskSet:
    """Return the training tasks that have more than one answer."""
    found = training_tasks(folder, unseen_names(folder), EXAMPLES)
    return TaskSet(Task(name, tuple(rows)) for name, rows in found if len({row.answer for row in rows}) > 1)


def install(run: Path, config: RunConfig) -> None:
    """Copy the posterior and the names of its tasks into the package; the settings without the cache of a machine."""
    target = shipped_prior()
    target.mkdir(exist_ok=True)
    shutil.rmtree(target / POSTERIOR, ignore_errors=True)
    shutil.copytree(run / POSTERIOR, target / POSTERIOR)
    shutil.copy(run / TASKS, target / TASKS)
    write_json(target / CONFIG, config.to_dict())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=Path, required=True, help="folder of CrossFit's tasks, with splits.json")
    parser.add_argument("--cache", type=Path, required=True, help="folder for derivatives and hidden states")
    parser.add_argument("--run", type=Path, required=True, help="the run folder")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--install", action="store_true", help="copy the result into the package")
    chosen = parser.parse_args(arguments)
    config, tasks = settings(chosen.cache), tasks_of(chosen.tasks)
    lm = build_language_model(config.language_model)
    with bars(Console(stderr=True)) as progress:
        posterior, state = bayes_lora.fit_posterior(
            lm, tasks, config, run=chosen.run, overwrite=chosen.overwrite, progress=progress
        )
    if chosen.install:
        install(chosen.run, with_language_model(settings(), lm))
    print(f"{len(tasks)} tasks; predictive loss {state.history[0]['loss']:.4f} to {state.history[-1]['loss']:.4f} nats")
    for site, value in posterior.guide.theta_mean().items():
        if "precision" in site:
            print(f"standard deviations, {site}:", [round(one**-0.5, 3) for one in value.flatten().tolist()])


if __name__ == "__main__":
    main()

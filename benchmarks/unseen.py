"""The shipped prior on unseen tasks of CrossFit, against what a user would pick instead.

    python benchmarks/unseen.py --tasks data/crossfit --cache cache/crossfit
    python benchmarks/unseen.py                        # print the table of the results that are there

The prior and every setting of the baselines were fitted on tasks that are nobody's test (benchmarks/prior.py).
Development tasks, which were looked at while choosing what to build, are reported separately. Each task has three
support sets of 16 examples (fewer of some) and at most 100 queries (50 of tasks with options of their own). Intervals
are 95 % of a paired bootstrap over tasks and, within tasks, over support sets.

What is expensive is kept in the cache folder: Gram matrices of derivatives, which are all that the tangent posterior
needs at any support size, and the predictions of baselines that run the language model. It takes an hour on two cores.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from crossfit import DEVELOPMENT, unseen_names, unseen_tasks
from harness import machine
from lm_baselines import Baselines
from prior import settings, tasks_of
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

import bayes_lora
from bayes_lora.infer.empirical_bayes import EmpiricalBayes, TaskGrams, fit_theta
from bayes_lora.metrics.options import expected_calibration_error
from bayes_lora.recipes.recipes import build_language_model, build_objective
from bayes_lora.runs.empirical_bayes import grams_of_tasks
from bayes_lora.tasks import Example, Task
from bayes_lora.utils.storage import read_json, write_json

SIZES = (2, 4, 8, 16, 32)
COLUMNS = ("accuracy", "nll", "brier", "epistemic", "auroc of mutual information", "auroc of confidence")


class UnseenTask(NamedTuple):
    """Examples of the support sets and then the queries of one task, and their Gram matrices."""

    name: str
    rows: list[Example]
    grams: TaskGrams
    sets: list[int]
    fixed: bool


Predict = Callable[[UnseenTask, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From a task, its support and its queries to log-probabilities ``(q, K)`` and their epistemic entropy ``(q,)``."""


class FromGrams:
    """Predictions from Gram matrices at the initial theta of the recipe.

    Args:
        lm: the language model.
        training: Gram matrices of training tasks, to fit slope and biases alone; None takes the shipped prior.
    """

    def __init__(self, lm: Any, training: Mapping[str, TaskGrams] | None = None) -> None:
        objective = build_objective(lm, settings())
        model, guide = objective.model, objective.guide
        self.scores = EmpiricalBayes(model, guide.theta, training or {}, num_support=16)
        if training is None:
            guide.load_state_dict(bayes_lora.load_prior(lm).guide.state_dict())
            return
        with torch.no_grad():
            for name, parameter in guide.theta.named_parameters():
                if "precision" in name and "lora" in name:
                    parameter.fill_(30.0).requires_grad_(False)  # the logarithm
        fit_theta(self.scores)

    @classmethod
    def fitted(cls, lm: Any, training: Mapping[str, TaskGrams]) -> FromGrams:
        """Fit all of theta to some training tasks, as the shipped prior is to all of them."""
        found = cls.__new__(cls)
        objective = build_objective(lm, settings())
        found.scores = EmpiricalBayes(objective.model, objective.guide.theta, training, num_support=16)
        fit_theta(found.scores)
        return found

    def __call__(self, task: UnseenTask, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        found = self.scores.predict(task.grams, support, query)
        return found.log_probs(), found.entropies()[1]


def entropy(log_probs: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs.clamp_min(-1e4)).sum(-1)


def label_counts(task: UnseenTask, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Smoothed counts of the support's labels; the uniform distribution for options of their own."""
    mask = task.grams.option_mask[query].double()
    weights = mask
    if task.fixed:
        counts = torch.bincount(task.grams.answer[support], minlength=mask.shape[-1]).double() + 1.0
        weights = counts * mask
    return (weights / weights.sum(-1, keepdim=True)).log().clamp_min(-1e30), torch.zeros(len(query))


def supports(task: UnseenTask, size: int, joined: bool = False) -> list[Tensor]:
    """Return the indices of the first examples of each support set; joined, the next set goes on where one ends."""
    starts = np.cumsum([0, *task.sets]).tolist()
    sets = [list(range(begin, end)) for begin, end in zip(starts, starts[1:], strict=False)]
    if joined:
        pairs = [one + sets[(i + 1) % len(sets)] for i, one in enumerate(sets)]
        sets = [distinct(task, pair) for pair in pairs]
    return [torch.tensor(one[:size]) for one in sets]


def distinct(task: UnseenTask, indices: Sequence[int]) -> list[int]:
    """Return indices of examples with different inputs; support sets of different seeds share some."""
    found: dict[str, int] = {}
    for index in indices:
        found.setdefault(task.rows[index].input, index)
    return list(found.values())


def scored(task: UnseenTask, predict: Any, size: int, joined: bool = False) -> list[dict[str, Any]]:
    """Accuracy, NLL, Brier score and uncertainty of each support set of a task."""
    query = torch.arange(sum(task.sets), len(task.grams.answer))
    found = []
    for support in supports(task, size, joined):
        log_probs, epistemic = predict(task, support, query)
        gold = task.grams.answer[query]
        confidence, chosen = log_probs.exp().max(-1)
        correct = chosen == gold
        truth = torch.nn.functional.one_hot(gold, log_probs.shape[-1])
        row: dict[str, Any] = {
            "accuracy": float(correct.double().mean()),
            "nll": float(-log_probs.gather(-1, gold[:, None]).mean()),
            "brier": float((log_probs.exp() - truth).square().sum(-1).mean()),
            "epistemic": float(epistemic.mean() / entropy(log_probs).mean()),
            "pairs": (confidence, correct),
        }
        if 0 < int(correct.sum()) < len(correct):
            wrong = (~correct).long()
            row["auroc of mutual information"] = float(binary_auroc(rescaled(epistemic), wrong))
            row["auroc of confidence"] = float(binary_auroc(1.0 - confidence, wrong))
        found.append(row)
    return found


def rescaled(values: Tensor) -> Tensor:
    """Values in [0, 1], because the metric takes others for logits."""
    return (values - values.min()) / (values.max() - values.min()).clamp_min(1e-12)


def interval(one: Mapping[str, list[float]], other: Mapping[str, list[float]], draws: int = 5000) -> list[float]:
    """95 % interval of the difference of means: tasks, and support sets within them, drawn with replacement."""
    generator = np.random.default_rng(0)
    differences = [np.array(one[name]) - np.array(other[name]) for name in one]
    means = []
    for _ in range(draws):
        chosen = generator.integers(len(differences), size=len(differences))
        means.append(np.mean([generator.choice(differences[i], size=len(differences[i])).mean() for i in chosen]))
    return [float(value) for value in np.quantile(means, [0.025, 0.975])]


def table(tasks: Mapping[str, UnseenTask], methods: Mapping[str, Any], size: int = 16) -> dict[str, Any]:
    results = {
        method: {name: scored(task, predict, size) for name, task in tasks.items()}
        for method, predict in methods.items()
    }
    found: dict[str, Any] = {}
    for method, by_task in results.items():
        row: dict[str, Any] = {"tasks": len(by_task)}
        for column in COLUMNS:
            row[column] = mean_of(by_task, column)
        pairs = [one["pairs"] for rows in by_task.values() for one in rows]
        confidence, correct = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        row["pooled ece"] = expected_calibration_error(confidence, correct)
        for column in ("nll", "brier", "accuracy"):
            row[f"tangent's {column} minus this one's"] = interval(
                {name: [one[column] for one in rows] for name, rows in results["tangent"].items()},
                {name: [one[column] for one in rows] for name, rows in by_task.items()},
            )
        row["by task"] = {
            name: {column: mean_of({name: rows}, column) for column in ("accuracy", "nll")}
            for name, rows in by_task.items()
        }
        found[method] = row
    return found


def mean_of(by_task: Mapping[str, list[dict[str, Any]]], column: str) -> float:
    """Mean over tasks of the mean over support sets, of those that have the column."""
    each = [[one[column] for one in rows if column in one] for rows in by_task.values()]
    return float(np.mean([np.mean(values) for values in each if values]))


def by_size(tasks: Mapping[str, UnseenTask], predict: Any) -> dict[str, Any]:
    """The epistemic share at each support size, and the interval of its change from one size to the next.

    More examples than a set has are those of the next set.
    """
    rows = {size: {name: scored(task, predict, size, joined=True) for name, task in tasks.items()} for size in SIZES}
    shares = {size: {name: [one["epistemic"] for one in own] for name, own in rows[size].items()} for size in SIZES}
    return {
        "share": {str(size): mean_of(rows[size], "epistemic") for size in SIZES},
        "change": {f"{a} to {b}": interval(shares[b], shares[a]) for a, b in zip(SIZES, SIZES[1:], strict=False)},
        "nll": {str(size): mean_of(rows[size], "nll") for size in SIZES},
    }


def of_thirds(lm: Any, training: Mapping[str, TaskGrams], tasks: Mapping[str, UnseenTask]) -> list[dict[str, float]]:
    """Metrics of three fits, each without another third of the training tasks: the spread over what was trained on."""
    names = sorted(training)
    random.Random(0).shuffle(names)
    found = []
    for i in range(3):
        predict = FromGrams.fitted(lm, {name: training[name] for j, name in enumerate(names) if j % 3 != i})
        rows = {name: scored(task, predict, 16) for name, task in tasks.items()}
        found.append({column: mean_of(rows, column) for column in ("accuracy", "nll", "brier")})
        print("two thirds of the training tasks:", found[-1], flush=True)
    return found


def detail(settings: Mapping[str, float]) -> str:
    """Return the settings of a baseline in words."""
    return f" ({', '.join(f'{name} {value:g}' for name, value in settings.items())})" if settings else ""


def markdown(results: Mapping[str, Any], part: str = "test") -> str:
    """Return the table of the main README: one row for each method."""
    rows = results["results"][part]
    lines = [
        "| method | accuracy | NLL (nats) | Brier | pooled ECE | NLL of the last row minus this one's |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for method, row in rows.items():
        values = [f"{row[column]:.3f}" for column in ("accuracy", "nll", "brier", "pooled ece")]
        low, high = row["tangent's nll minus this one's"]
        difference = rows["tangent"]["nll"] - row["nll"]
        last = "" if method == "tangent" else f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]"
        name = (
            "**ABMLL, closed form, shipped prior**"
            if method == "tangent"
            else method + detail(results["settings of baselines"].get(method, {}))
        )
        lines.append(f"| {name} | {' | '.join(values)} | {last} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=Path, help="folder of CrossFit's tasks, with splits.json")
    parser.add_argument("--cache", type=Path, help="folder for derivatives, hidden states, predictions")
    parser.add_argument("--recipes", nargs="*", default=(), help="recipes to fit and evaluate, up to an hour each")
    parser.add_argument("--fits", action="store_true", help="also fit to thirds of the training tasks, half an hour")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "unseen.json")
    chosen = parser.parse_args(arguments)
    if chosen.tasks is None or chosen.cache is None:
        print(markdown(read_json(chosen.output)))
        return
    config = settings(chosen.cache)
    lm = build_language_model(config.language_model)
    start = build_objective(lm, settings())
    training = tasks_of(chosen.tasks)
    origin = start.guide.theta_mean()
    tasks: dict[str, UnseenTask] = {}
    for name, sets, queries in unseen_tasks(chosen.tasks, unseen_names(chosen.tasks)):
        rows = [example for one in sets for example in one] + queries
        grams = grams_of_tasks(lm, start.model, origin, {name: Task(name, tuple(rows))})[name]
        tasks[name] = UnseenTask(name, rows, grams, [len(one) for one in sets], len({row.options for row in rows}) == 1)
        print(name, len(rows), flush=True)
    baselines = Baselines(lm, chosen.cache / "predictions", training, recipes=chosen.recipes)
    methods: dict[str, Predict] = {
        "label counts": label_counts,
        "slope and biases": FromGrams(lm, grams_of_tasks(lm, start.model, origin, training)),
        **baselines.methods(),
        "tangent": FromGrams(lm),
    }
    parts = {
        "development": {name: task for name, task in tasks.items() if name in DEVELOPMENT},
        "test": {name: task for name, task in tasks.items() if name not in DEVELOPMENT},
    }
    parts["test, fixed labels"] = {name: task for name, task in parts["test"].items() if task.fixed}
    parts["test, own options"] = {name: task for name, task in parts["test"].items() if not task.fixed}
    results = {
        "machine": machine(torch.device("cpu")),
        "training tasks": sorted(training),
        "settings of baselines": baselines.settings,
        "results": {part: table(own, methods) for part, own in parts.items() if own},
        "support size": by_size(parts["test"], methods["tangent"]),
    }
    if chosen.fits:
        grams = grams_of_tasks(lm, start.model, origin, training)
        results["fits without a third of the training tasks"] = of_thirds(lm, grams, parts["test"])
    write_json(chosen.output, results)
    for part, rows in results["results"].items():
        for method, row in rows.items():
            low, high = row["tangent's nll minus this one's"]
            print(
                f"{part:20} {method:24} n={row['tasks']:2} acc {row['accuracy']:.3f} nll {row['nll']:.3f} brier "
                f"{row['brier']:.3f} ece {row['pooled ece']:.3f} epi {row['epistemic']:.2f} auroc "
                f"{row['auroc of mutual information']:.2f}/{row['auroc of confidence']:.2f} tangent - this "
                f"[{low:+.3f}, {high:+.3f}]"
            )
    print(results["support size"])


if __name__ == "__main__":
    main()

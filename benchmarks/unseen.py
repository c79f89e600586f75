"""The tangent posterior on unseen tasks of CrossFit, against label counts and the option head alone.

    python benchmarks/unseen.py --tasks data/crossfit --cache cache/unseen

Theta is fitted on every task that is nobody's test. Development tasks, which were looked at while choosing settings,
are reported separately. Each task has three support sets of 16 examples (fewer of some) and at most 100 queries (50 of
tasks with options of their own). Derivatives of option scores are computed once, in two hours on two cores, and kept in
the cache folder; methods, support sizes and bootstraps use their Gram matrices alone. Intervals are 95 % of a paired
bootstrap over tasks and, within tasks, over support sets. What is not here yet: baselines that run the language model
again (a tuned LoRA, logistic regression on its features).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from harness import machine
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

import bayes_lora
from bayes_lora.episodes import collate
from bayes_lora.errors import TaskError
from bayes_lora.guides import PointTheta
from bayes_lora.infer.empirical_bayes import EmpiricalBayes, TaskGrams, fit_theta
from bayes_lora.infer.linear_scores import LinearScores
from bayes_lora.infer.score_posterior import CategoricalAnswers, score_posterior
from bayes_lora.infer.tangent import tangent
from bayes_lora.lm.option_head import HEAD_SHAPES
from bayes_lora.metrics.options import expected_calibration_error
from bayes_lora.models import LayerwiseScale, WithHead
from bayes_lora.tasks import Example
from bayes_lora.utils.storage import read_json, write_json

MODULES = ["q_proj", "v_proj", "o_proj", "down_proj"]
DEVELOPMENT = ["ag_news", "tweet_eval-stance_atheism", "climate_fever", "emo"]
SEEDS = (13, 21, 42)
SIZES = (2, 4, 8, 16)
START = 2.0
"""Standard deviation of the weights at which fits start."""


class UnseenTask(NamedTuple):
    """Gram matrices of the support sets and queries of one task, in this order."""

    grams: TaskGrams
    sets: list[int]
    fixed: bool


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


def derivatives(lm: Any, model: Any, rows: Sequence[Example]) -> dict[str, Any]:
    """Scores and Gram matrices of the weights of a plain LoRA at its initial value."""
    theta = model.initial_theta()
    phi = {site: theta[f"theta.loc.{site}"][None, None] for site in model.random_sites}
    unit = {site: value.new_ones(()) for site, value in phi.items()}
    encoded = lm.encoder(rows)
    order = sorted(range(len(rows)), key=lambda i: len(encoded[i]))
    episode = collate([[encoded[i] for i in order]]).to(lm.device)
    found = tangent(lm, episode, model.shared(theta), phi, unit, batch_size=8)
    back, options = torch.tensor(order).argsort(), found.scores.shape[-1]
    places = (back[:, None] * options + torch.arange(options)).flatten()
    return {
        "scores": found.scores[0][back],
        "mask": episode.option_mask[0][back],
        "y": episode.answer[0][back],
        "G": {site: value[0][:, places][:, :, places] for site, value in found.kernels().items()},
        "fixed": len({row.options for row in rows}) == 1,
    }


def with_head(found: Mapping[str, Any]) -> TaskGrams:
    """Centre the scores over options, and add the derivatives by the head's slope and biases, at slope 1."""
    mask, scores = found["mask"].double(), found["scores"].double()
    count, options = scores.shape
    scores = (scores - (scores * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)) * mask
    centre = torch.diag_embed(mask) - mask[:, :, None] * mask[:, None, :] / mask.sum(-1)[:, None, None]
    kernels = {}
    for site, gram in found["G"].items():
        parts = gram.double().view(-1, count, options, count, options)
        parts = torch.einsum("nij,lnjmk,mkh->lnimh", centre, parts, centre)
        kernels[site] = parts.reshape(-1, count * options, count * options).float()
    flat, present = scores.flatten(), mask.flatten()
    label = torch.eye(options).repeat(count, count) * present[:, None] * present * float(found["fixed"])
    kernels |= {"head.slope": torch.outer(flat, flat)[None].float(), "head.bias": label[None].float()}
    return TaskGrams(scores, kernels, {"head.slope": flat}, found["y"], found["mask"])


def cached(folder: Path, name: str, rows: Sequence[Example], make: Any) -> dict[str, Any]:
    """Return the derivatives of these examples from the folder, or make them."""
    path = folder / f"{name}.pt"
    if path.exists():
        found: dict[str, Any] = torch.load(path, weights_only=True)
        if found["y"].tolist() == [row.answer for row in rows]:
            return found
    folder.mkdir(parents=True, exist_ok=True)
    made: dict[str, Any] = make(rows)
    partial = path.with_suffix(".part")
    torch.save(made, partial)
    partial.replace(path)
    print(f"{folder.name}/{name}", flush=True)
    return made


class NoLanguageModel:
    """Gram matrices have replaced the language model."""


def prior(shapes: Mapping[str, int], scale: float) -> WithHead:
    """A prior with one scale per site and layer, which is all that Gram matrices need to know of the weights."""
    initial = {site: torch.zeros(layers, 1, 1, dtype=torch.double) for site, layers in shapes.items()}
    inner: Any = LayerwiseScale(NoLanguageModel(), initial, random="B", initial_scale=(0.1, scale))  # type: ignore[arg-type]
    return WithHead(inner, slope=1.0)


class Fitted:
    """Theta of one method: the weights of the Gram matrices, and the slope."""

    def __init__(
        self, tasks: Mapping[str, TaskGrams], layers: Mapping[str, int], scale: float, **settings: Any
    ) -> None:
        model = prior(layers, scale)
        theta = PointTheta(model)
        loss = EmpiricalBayes(model, theta, tasks, num_support=16, num_splits=1, **settings)
        with torch.no_grad():  # the Gram matrices are those of slope 1
            theta.loc_theta_loc_head_slope.fill_(0.25)
            if scale < 1e-6:
                for site in layers:
                    getattr(theta, f"loc_theta_precision_{site}".replace(".", "_")).requires_grad_(False)
        self.history = fit_theta(loss, max_steps=25)
        with torch.no_grad():
            fitted = loss._prior()
            self.slope = float(fitted["head.slope"].mean)
            self.variance = {site: fn.variance[:, 0, 0].double() for site, fn in fitted.items()}
        for site in layers:
            self.variance[site] = self.variance[site] * self.slope**2

    def facts(self) -> dict[str, Any]:
        return {"slope": self.slope, "variances": {site: v.tolist() for site, v in self.variance.items()},
                "loss": [self.history[0], self.history[-1]]}  # fmt: skip

    def __call__(self, task: TaskGrams, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities ``(q, K)`` and the epistemic part of their entropy, ``(q,)`` nats."""
        options = task.scores.shape[-1]
        weights, kernel = torch.cat(list(self.variance.values())), torch.cat([task.kernels[s] for s in self.variance])
        whole = torch.einsum("l,lij->ij", weights, kernel.double())
        columns, rows = places(support, options), places(query, options)
        answers = CategoricalAnswers(task.answer[None, support], task.option_mask[None, support])
        mean = self.slope * task.scores
        found = score_posterior(mean[None, support], whole[columns][:, columns][None], answers)
        cross = whole[rows][:, columns]
        each = rows.view(-1, options)
        seen = cross.view(len(query), options, -1)
        covariance = whole[each[:, :, None], each[:, None, :]] - seen @ found.removed[0] @ seen.mT
        moved = (cross @ found.weights[0]).view(len(query), options)
        none = torch.zeros(len(query), dtype=torch.bool)
        scores = LinearScores(mean[query] + moved, covariance, task.option_mask[query], none)
        log_probs, draws = scores.log_probs(), scores.draws()
        draws = draws.masked_fill(~scores.option_mask, -1e30).log_softmax(-1)
        return log_probs, entropy(log_probs) - entropy(draws).mean(0)


def places(rows: Tensor, options: int) -> Tensor:
    return (rows[:, None] * options + torch.arange(options)).flatten()


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


def scored(task: UnseenTask, predict: Any, size: int) -> list[dict[str, Any]]:
    """Accuracy, NLL, Brier score and uncertainty of each support set of a task."""
    starts = np.cumsum([0, *task.sets]).tolist()
    query = torch.arange(starts[-1], len(task.grams.answer))
    found = []
    for begin, count in zip(starts, task.sets, strict=False):
        support = torch.arange(begin, begin + min(size, count))
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
        for column in ("accuracy", "nll", "brier", "epistemic", "auroc of mutual information", "auroc of confidence"):
            row[column] = mean_of(by_task, column)
        pairs = [one["pairs"] for rows in by_task.values() for one in rows]
        confidence, correct = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        row["pooled ece"] = expected_calibration_error(confidence, correct)
        for column in ("nll", "brier", "accuracy"):
            row[f"{column} minus label counts"] = interval(
                {name: [one[column] for one in rows] for name, rows in by_task.items()},
                {name: [one[column] for one in rows] for name, rows in results["label counts"].items()},
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
    """The epistemic share at each support size, and the interval of its change from one size to the next."""
    rows = {size: {name: scored(task, predict, size) for name, task in tasks.items()} for size in SIZES}
    shares = {size: {name: [one["epistemic"] for one in own] for name, own in rows[size].items()} for size in SIZES}
    return {
        "share": {str(size): mean_of(rows[size], "epistemic") for size in SIZES},
        "change": {f"{a} to {b}": interval(shares[b], shares[a]) for a, b in zip(SIZES, SIZES[1:], strict=False)},
        "nll": {str(size): mean_of(rows[size], "nll") for size in SIZES},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=Path, required=True, help="folder of CrossFit's tasks, with splits.json")
    parser.add_argument("--cache", type=Path, required=True, help="folder for Gram matrices")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "unseen.json")
    chosen = parser.parse_args(arguments)
    splits = read_json(chosen.tasks / "splits.json")["abmll"]
    unseen = {name for split in ("cls-45", "mcqa") for name in splits[split]["test"]}
    loaded: list[Any] = []

    def made(rows: Sequence[Example]) -> dict[str, Any]:
        if not loaded:
            lm = bayes_lora.load_language_model(target_modules=MODULES, dtype="float32")
            loaded.extend([lm, LayerwiseScale(lm, random="B")])
        return derivatives(*loaded, rows)

    training = {
        name: with_head(cached(chosen.cache / "training", name, rows, made))
        for name, rows in training_tasks(chosen.tasks, unseen)
    }
    training = {name: task for name, task in training.items() if len(task.answer.unique()) > 1}
    tasks: dict[str, UnseenTask] = {}
    for name, sets, queries in unseen_tasks(chosen.tasks, unseen):
        rows = [example for one in sets for example in one] + queries
        found = cached(chosen.cache / "unseen", name, rows, made)
        tasks[name] = UnseenTask(with_head(found), [len(one) for one in sets], bool(found["fixed"]))
    kernels = next(iter(training.values())).kernels
    layers = {site: len(kernel) for site, kernel in kernels.items() if site not in HEAD_SHAPES}
    fitted = {
        "slope and biases": Fitted(training, layers, 1e-8),
        "tangent": Fitted(training, layers, START),
    }
    methods = {"label counts": label_counts} | {
        name: lambda task, support, query, one=one: one(task.grams, support, query) for name, one in fitted.items()
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
        "theta": {name: one.facts() for name, one in fitted.items()},
        "results": {part: table(own, methods) for part, own in parts.items() if own},
        "support size": by_size(parts["test"], methods["tangent"]),
    }
    write_json(chosen.output, results)
    for part, rows in results["results"].items():
        for method, row in rows.items():
            low, high = row["nll minus label counts"]
            aurocs = f"{row['auroc of mutual information']:.2f}/{row['auroc of confidence']:.2f}"
            print(
                f"{part:20} {method:20} n={row['tasks']:2} acc {row['accuracy']:.3f} nll {row['nll']:.3f} brier "
                f"{row['brier']:.3f} ece {row['pooled ece']:.3f} epi {row['epistemic']:.2f} auroc {aurocs} "
                f"nll - counts [{low:+.3f}, {high:+.3f}]"
            )
    print(results["support size"])


if __name__ == "__main__":
    main()

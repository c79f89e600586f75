"""Results of a comparison: a table, metrics, the predictions of each question, and a reliability diagram."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from bayes_lora.lm.arithmetic import ArithmeticUsed
from bayes_lora.metrics.options import (
    Metrics,
    adaptive_calibration_error,
    expected_calibration_error,
    mean_metrics,
    per_example_gap,
)
from bayes_lora.metrics.plots import reliability_diagram
from bayes_lora.metrics.text import TextMetrics
from bayes_lora.posterior.prediction_draws import PredictionDraws
from bayes_lora.runs.folder import EVALUATION, METRICS
from bayes_lora.runs.predictions import Predictions, Question, write_predictions
from bayes_lora.utils.storage import write_json, writing

__all__ = ["Comparison", "MethodResult", "metrics_table"]

MEAN, FREE_MEAN = "mean", "mean, generated answers"
ARITHMETIC, DIAGRAM = "arithmetic.json", "reliability.png"


@dataclass(frozen=True)
class MethodResult:
    """Results of one method on several tasks.

    Attributes:
        metrics: metrics by task.
        confidence: ``(N,)`` confidence of the predictions of all tasks with options, concatenated.
        correct: ``(N,)`` whether each prediction is right.
        draws: the predictions of each task.
        generated: the generated answers of each free-form task.
        layers: mean over tasks of :meth:`TaskPosterior.distance_from_prior`, a row per site and layer; empty if the
            prior is not known, or whole updates are random.
    """

    metrics: dict[str, Metrics | TextMetrics]
    confidence: Tensor
    correct: Tensor
    draws: tuple[PredictionDraws, ...] = ()
    generated: Mapping[str, Sequence[str]] = field(default_factory=dict)
    layers: tuple[dict[str, Any], ...] = ()

    @property
    def means(self) -> dict[str, Metrics | TextMetrics]:
        """Unweighted mean over tasks: ``mean``, and ``mean, generated answers`` if there are tasks of both kinds."""
        return mean_by_kind(self.metrics)

    @property
    def mean(self) -> Metrics | TextMetrics:
        """Unweighted mean over tasks; over those with options if there are tasks of both kinds."""
        return self.means[MEAN]


@dataclass(frozen=True)
class Comparison:
    """Results of several methods on the same tasks.

    Attributes:
        results: results by method, in display order.
        arithmetic: how the base model computed them.
        facts: what they were computed with: ``settings`` of the comparison, ``versions`` of packages, ``tasks`` with
            their sizes and hashes, ``fingerprint`` of the language model.
    """

    results: Mapping[str, MethodResult]
    arithmetic: ArithmeticUsed | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def table(self, title: str = "Unseen tasks") -> Table:
        """Return a table of accuracy, NLL (nats), Brier and ECE per task and on average; EM, F1, NLL if free-form."""
        return metrics_table({name: result.metrics for name, result in self.results.items()}, title)

    def to_dict(self) -> dict[str, Any]:
        """Return metrics per method and task, their means, and calibration errors pooled over all examples."""
        found: dict[str, Any] = {}
        for name, result in self.results.items():
            found[name] = {"tasks": {task: metrics.to_dict() for task, metrics in result.metrics.items()}}
            found[name] |= {kind: metrics.to_dict() for kind, metrics in result.means.items()}
            if len(result.confidence):
                found[name]["pooled"] = {
                    "ece": expected_calibration_error(result.confidence, result.correct),
                    "adaptive_ece": adaptive_calibration_error(result.confidence, result.correct),
                    "per_example_gap": per_example_gap(result.confidence, result.correct),
                }
        return found

    def predictions(self) -> Predictions:
        """Return the predictions of all methods and tasks."""
        first = next(iter(self.results.values()), None)
        questions = [
            Question(
                one.task,
                example,
                {name: result.generated[one.task][i] for name, result in self.results.items() if example.free_form},
            )
            for one in (first.draws if first else ())
            for i, example in enumerate(one.examples)
        ]
        log_probs = {
            name: torch.cat([one.log_probs[:, one.option_mask] for one in result.draws], 1)
            for name, result in self.results.items()
            if result.draws
        }
        return Predictions(tuple(questions), log_probs)

    def write(self, folder: Path) -> None:
        """Write the results to a folder, which is made if needed.

        The files are ``metrics.json``, ``arithmetic.json``, ``reliability.png``, those of
        :mod:`bayes_lora.runs.predictions`, and ``evaluation.json``: :attr:`facts`, and the distance of each method's
        posterior from the prior in ``layers``. Generated answers have no confidence: if all tasks are free-form, there
        is no diagram.

        Raises:
            RunFolderError: the folder cannot be written.
        """
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / METRICS, self.to_dict())
        if self.arithmetic is not None:
            write_json(folder / ARITHMETIC, self.arithmetic.to_dict())
        layers = {name: list(result.layers) for name, result in self.results.items() if result.layers}
        digests = write_predictions(folder, self.predictions())
        write_json(folder / EVALUATION, {**digests, **self.facts, "layers": layers})
        curves = {name: (result.confidence, result.correct) for name, result in self.chosen().items()}
        if all(len(confidence) for confidence, _ in curves.values()):
            with writing(folder / DIAGRAM):
                reliability_diagram(curves, folder / DIAGRAM)

    def chosen(self) -> dict[str, MethodResult]:
        """Return all methods except the LoRA baselines, and the LoRA baseline with the lowest mean NLL."""
        loras = {name: result for name, result in self.results.items() if name.startswith("LoRA")}
        best = min(loras, key=lambda name: loras[name].mean.nll, default=None)
        return {name: result for name, result in self.results.items() if name not in loras or name == best}


def mean_by_kind(metrics: Mapping[str, Metrics | TextMetrics]) -> dict[str, Metrics | TextMetrics]:
    """Return unweighted means over the tasks with options and over the free-form tasks, by display name."""
    options = [one for one in metrics.values() if isinstance(one, Metrics)]
    free = [one for one in metrics.values() if isinstance(one, TextMetrics)]
    means: dict[str, Metrics | TextMetrics] = {MEAN: mean_metrics(options)} if options else {}
    if free:
        means[FREE_MEAN if options else MEAN] = mean_metrics(free)
    return means


COLUMNS = {
    "accuracy": ("accuracy", max),
    "EM": ("exact_match", max),
    "F1": ("f1", max),
    "NLL": ("nll", min),
    "Brier": ("brier", min),
    "ECE": ("ece", min),
}


def metrics_table(results: Mapping[str, Mapping[str, Metrics | TextMetrics]], title: str) -> Table:
    """Return a table with a section per task and one for the mean, with the best value of each column in bold."""
    tasks = list(next(iter(results.values())))
    blocks = {task: {method: by_task[task] for method, by_task in results.items()} for task in tasks}
    if len(tasks) > 1:
        means = {method: mean_by_kind(by_task) for method, by_task in results.items()}
        for kind in next(iter(means.values())):
            blocks[kind] = {method: by_kind[kind] for method, by_kind in means.items()}
    shown = [metrics for rows in blocks.values() for metrics in rows.values()]
    columns = {name: column for name, column in COLUMNS.items() if any(hasattr(one, column[0]) for one in shown)}
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for heading, justify in (("task", "left"), ("method", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for heading in columns:
        table.add_column(heading, justify="right")
    for task, rows in blocks.items():
        cells = [_column(list(rows.values()), field, best) for field, best in columns.values()]
        for index, method in enumerate(rows):
            names = (escape(task) if index == 0 else "", escape(method))
            table.add_row(*names, *(column[index] for column in cells), end_section=index == len(rows) - 1)
    return table


def _column(metrics: Sequence[Metrics | TextMetrics], field: str, best: Callable[..., float]) -> list[str]:
    """Return the cells of a section in one column, empty if the metrics have no such field."""
    if not all(hasattr(one, field) for one in metrics):
        return [""] * len(metrics)
    values = [round(float(getattr(one, field)), 3) for one in metrics]
    winner = best(values) if len(values) > 1 else None
    return [f"[bold]{value:.3f}[/bold]" if value == winner else f"{value:.3f}" for value in values]

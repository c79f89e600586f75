"""Results of a comparison: a table, metrics, the predictions of each question, and a reliability diagram."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
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
from bayes_lora.utils.tables import Column, ResultTable

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

    def table(self, title: str = "Unseen tasks") -> ResultTable:
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
UNITS = {"nll": "nll_nats"}
"""Names of the values in a table, where they are not those of the metrics."""
OPTIONAL = {"Brier": 2, "ECE": 1}
"""Columns that a narrow terminal leaves out, the one with the largest number first."""


def metrics_table(results: Mapping[str, Mapping[str, Metrics | TextMetrics]], title: str) -> ResultTable:
    """Return a table with a section per task and one for the mean, with the best value of each column in bold.

    The rows have ``task``, ``method``, ``num_tasks`` (above 1 in those of a mean), ``num_examples`` and the metrics,
    ``nll`` as ``nll_nats``.
    """
    kinds = {
        task: {method: by_task[task] for method, by_task in results.items()} for task in next(iter(results.values()))
    }
    blocks = [(task, 1, block) for task, block in kinds.items()]
    if len(kinds) > 1:
        means = {method: mean_by_kind(by_task) for method, by_task in results.items()}
        for name in next(iter(means.values())):
            block = {method: by_name[name] for method, by_name in means.items()}
            count = sum(_kind(of_task) is _kind(block) for of_task in kinds.values())
            blocks.append((name, count, block))
    shown = [metrics for *_, block in blocks for metrics in block.values()]
    found = {name: column for name, column in COLUMNS.items() if any(hasattr(one, column[0]) for one in shown)}
    rows: list[dict[str, Any]] = []
    bold: set[tuple[int, str]] = set()
    for task, count, block in blocks:
        for heading, (name, best) in found.items():
            bold |= {(len(rows) + place, heading) for place in _best([*block.values()], name, best)}
        for method, metrics in block.items():
            values = {UNITS.get(name, name): getattr(metrics, name, None) for name, _ in found.values()}
            about = {"task": task, "method": method, "num_tasks": count, "num_examples": metrics.num_examples}
            rows.append(about | values)
    columns = [
        Column("task", lambda row: row["task"], is_number=False),
        Column("method", lambda row: row["method"], is_number=False),
        *(
            Column(heading, partial(_cell, UNITS.get(name, name)), optional=OPTIONAL.get(heading, 0))
            for heading, (name, _) in found.items()
        ),
    ]
    return ResultTable("metrics", columns, rows, title, section="task", bold=frozenset(bold))


def _kind(rows: Mapping[str, Metrics | TextMetrics]) -> type:
    return type(next(iter(rows.values())))


def _cell(name: str, row: Mapping[str, Any]) -> str:
    return "" if row[name] is None else f"{row[name]:.3f}"


def _best(metrics: Sequence[Metrics | TextMetrics], name: str, best: Callable[..., float]) -> list[int]:
    """Return which of several metrics are the best ones as they are shown."""
    if len(metrics) < 2 or not all(hasattr(one, name) for one in metrics):
        return []
    values = [round(float(getattr(one, name)), 3) for one in metrics]
    return [place for place, value in enumerate(values) if value == best(values)]

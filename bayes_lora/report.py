"""Results of a comparison: a table for people, JSON for programs, a reliability diagram for both."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from torch import Tensor

from bayes_lora.errors import RunFolderError
from bayes_lora.metrics import (
    Metrics,
    adaptive_calibration_error,
    expected_calibration_error,
    mean_metrics,
    per_example_gap,
)
from bayes_lora.plots import reliability_diagram
from bayes_lora.storage import write_json

__all__ = ["Comparison", "MethodResult", "check_report_folder", "metrics_table"]

MEAN = "mean"
METRICS, DIAGRAM = "metrics.json", "reliability.png"


@dataclass(frozen=True)
class MethodResult:
    """One method on several tasks.

    Attributes:
        metrics: by task.
        confidence: of the predicted option, all tasks' examples one after another.
        correct: whether it was right.
    """

    metrics: dict[str, Metrics]
    confidence: Tensor
    correct: Tensor

    @property
    def mean(self) -> Metrics:
        """Unweighted mean over tasks."""
        return mean_metrics(list(self.metrics.values()))


@dataclass(frozen=True)
class Comparison:
    """Several methods on the same tasks, in the order to show them."""

    results: Mapping[str, MethodResult]

    def table(self, title: str = "Unseen tasks") -> Table:
        """Per task and on average accuracy, NLL (nats), Brier and ECE of every method."""
        return metrics_table({name: result.metrics for name, result in self.results.items()}, title)

    def to_dict(self) -> dict[str, Any]:
        """Metrics per method and task, their mean, and calibration errors over all tasks' examples together."""
        return {
            name: {
                "tasks": {task: metrics.to_dict() for task, metrics in result.metrics.items()},
                "mean": result.mean.to_dict(),
                "pooled": {
                    "ece": expected_calibration_error(result.confidence, result.correct),
                    "adaptive_ece": adaptive_calibration_error(result.confidence, result.correct),
                    "per_example_gap": per_example_gap(result.confidence, result.correct),
                },
            }
            for name, result in self.results.items()
        }

    def write(self, folder: Path) -> None:
        """Write ``metrics.json`` and ``reliability.png`` into a folder, which is made if it is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / METRICS, self.to_dict())
        curves = {name: (result.confidence, result.correct) for name, result in self.chosen().items()}
        reliability_diagram(curves, folder / DIAGRAM)

    def chosen(self) -> dict[str, MethodResult]:
        """All methods but the LoRA baselines, and of these the one with the lowest mean NLL."""
        loras = {name: result for name, result in self.results.items() if name.startswith("LoRA")}
        best = min(loras, key=lambda name: loras[name].mean.nll, default=None)
        return {name: result for name, result in self.results.items() if name not in loras or name == best}


def check_report_folder(folder: Path, *, overwrite: bool = False) -> None:
    """Look whether :meth:`Comparison.write` can write there: before long work, not after it. Leaves nothing behind.

    Raises:
        RunFolderError: metrics are there already and may not be replaced, or the folder cannot be made or written.
    """
    there = folder.absolute()
    try:
        taken = (folder / METRICS).exists() and not overwrite
        while not there.exists():
            there = there.parent
        tempfile.TemporaryDirectory(dir=there).cleanup()
    except OSError as error:
        raise RunFolderError(
            f"{folder}: expected a folder that can be written, but {there}: {error.strerror}. Give another --output."
        ) from error
    if taken:
        raise RunFolderError(f"{folder} holds metrics already. Use --overwrite to replace them, or another --output.")


def metrics_table(results: Mapping[str, Mapping[str, Metrics]], title: str) -> Table:
    """A table with a block per task and a last block for the mean; the best of each column in bold."""
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for heading, justify in (("task", "left"), ("method", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for heading in ("accuracy", "NLL", "Brier", "ECE"):
        table.add_column(heading, justify="right")
    tasks = list(next(iter(results.values())))
    blocks = {task: {method: by_task[task] for method, by_task in results.items()} for task in tasks}
    if len(tasks) > 1:
        blocks[MEAN] = {method: mean_metrics(list(by_task.values())) for method, by_task in results.items()}
    for task, rows in blocks.items():
        values = {m: [round(v, 3) for v in (x.accuracy, x.nll, x.brier, x.ece)] for m, x in rows.items()}
        best = [pick(row[i] for row in values.values()) for i, pick in enumerate((max, min, min, min))]
        for index, (method, row) in enumerate(values.items()):
            bold = [len(rows) > 1 and value == best[i] for i, value in enumerate(row)]
            cells = [f"[bold]{v:.3f}[/bold]" if b else f"{v:.3f}" for v, b in zip(row, bold, strict=True)]
            names = (escape(task) if index == 0 else "", escape(method))
            table.add_row(*names, *cells, end_section=index == len(values) - 1)
    return table

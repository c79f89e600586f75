"""The page: everything that a report says about its runs, rendered to one HTML file."""

from __future__ import annotations

import base64
import datetime
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from bayes_lora import __version__
from bayes_lora.report.details import data_rows, made_with, task_metrics
from bayes_lora.report.figures import Drawing, fit_figures, layer_figures, prediction_figures
from bayes_lora.report.reliability import Panel, TaskRow, bin_questions, panels, task_rows, task_sentences
from bayes_lora.report.results import BASELINE, Results, results_of
from bayes_lora.report.sources import Source, check_output, open_sources
from bayes_lora.utils.storage import write_text

__all__ = ["render_report", "write_report"]

FOLDER = Path(__file__).parent
TEMPLATE, STYLE, SCRIPT = "report.html.jinja", "report.css", "report.js"

COLUMNS = {
    "accuracy": ("accuracy", max),
    "nll": ("NLL (nats)", min),
    "skill": ("skill", max),
    "brier": ("Brier", min),
    "ece": ("ECE", min),
    "error_auroc_confidence": ("AUROC of errors", max),
    "excess_aurc_confidence": ("excess AURC", min),
}
"""Metrics of the table of methods: their headings, and which value is the best."""
OF_TASK = {
    "accuracy": "accuracy",
    "exact_match": "exact match",
    "f1": "F1",
    "nll": "NLL (nats)",
    "brier": "Brier",
    "ece": "ECE",
    "num_examples": "questions",
}
"""Metrics of ``metrics.json`` by task, and their headings."""


@dataclass(frozen=True)
class Cell:
    """A number of a table.

    Attributes:
        value: the number; NaN if it is undefined.
        low: lower end of its interval; NaN without one.
        high: upper end.
        floor: value of a calibrated predictor; NaN if the metric has none.
        note: why it is undefined, or what limits it.
        best: whether it is the best of its run.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    floor: float = math.nan
    note: str = ""
    best: bool = False


@dataclass
class Run:
    """What the page shows of one run.

    Attributes:
        name: its name.
        key: identifier of its elements.
        results: its predictions; None without any.
        panels: its reliability diagrams.
        bins: the questions in their bins.
        tasks: the accuracy of its main method by task.
        sentences: on which tasks it can be relied on.
        figures: figures of predictions.
        fit: figures of the fit and of the posterior.
        metrics: task, method and metrics of each pair.
        data: see :func:`bayes_lora.report.details.data_rows`.
        missing: what is not shown, and why.
    """

    name: str
    key: str
    results: Results | None = None
    panels: list[Panel] = field(default_factory=list)
    bins: dict[str, Any] = field(default_factory=dict)
    tasks: list[TaskRow] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    figures: list[Drawing] = field(default_factory=list)
    fit: list[Drawing] = field(default_factory=list)
    metrics: list[tuple[str, str, dict[str, float]]] = field(default_factory=list)
    data: list[tuple[str, str, str, str]] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)


def write_report(runs: Sequence[str | Path], output: str | Path, *, overwrite: bool = False) -> Path:
    """Write a report of run folders as one HTML file, which needs no network.

    Args:
        runs: folders written by ``fit_posterior(..., run=)``, :meth:`Comparison.write` or the command line.
        output: the file.
        overwrite: replace the file.

    Raises:
        RunFolderError: a folder is not one of results, or has none; two have one name; or the file cannot be written.
        PosteriorError: a file in a folder is damaged.
    """
    sources, output = open_sources([Path(run) for run in runs]), Path(output)
    check_output(output, overwrite=overwrite)
    write_text(output, render_report(sources))
    return output


def render_report(sources: Sequence[Source]) -> str:
    """Return the HTML of a report."""
    shown = [_run(source, f"run{index}") for index, source in enumerate(sources)]
    script = (FOLDER / SCRIPT).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "percent": _percent}
    return environment.get_template(TEMPLATE).render(
        runs=shown,
        summary=list(_summary(shown)),
        columns={name: heading for name, (heading, _) in COLUMNS.items()},
        of_task=OF_TASK,
        made_with=made_with(sources),
        baseline=BASELINE,
        version=__version__,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        script=Markup(script),  # noqa: S704 -- files of this package
        style=Markup((FOLDER / STYLE).read_text(encoding="utf-8")),  # noqa: S704
    )


def _run(source: Source, key: str) -> Run:
    run = Run(source.name, key, metrics=task_metrics(source), data=data_rows(source))
    found = results_of(source)
    if isinstance(found, Results):
        run.results = found
        run.panels, run.bins = panels(found), bin_questions(found)
        run.tasks = task_rows(found, BASELINE)
        run.sentences = task_sentences(run.tasks, found.main, BASELINE)
        run.figures = list(prediction_figures(found, key))
    else:
        run.missing.append(("metrics with intervals, reliability, questions", found))
    main = run.results.main if run.results else ""
    run.fit = [*fit_figures(source, key), *layer_figures(source, key, main)]
    run.missing += _missing(run, source)
    return run


def _missing(run: Run, source: Source) -> Iterator[tuple[str, str]]:
    """Yield what is not shown of a run, and why."""
    kinds = {drawing.kind for drawing in run.fit}
    free = list(dict.fromkeys(task for task, _, values in run.metrics if "exact_match" in values))
    if run.results and free:
        yield f"probabilities of {', '.join(free)}", "answers are generated texts, so that there are no options"
    if "learning" not in kinds:
        once = "its fit was evaluated only once, as a closed-form fit is"
        yield "learning curve", once if source.history() else "no curve.json of a fit is in this folder"
    if "support" not in kinds:
        yield "metrics against the number of examples", "only the demo of the shipped prior writes support_curve.json"
    if "kl" not in kinds:
        yield (
            "heat maps of layers",
            "no distances from the prior are in this folder: evaluate --output and adapt write them, unless no weight "
            "of a layer is random, or whole updates are",
        )


def _summary(runs: Sequence[Run]) -> Iterator[tuple[Run, str, dict[str, Cell], bool]]:
    """Yield run, method, cells, and whether it is the main method of its run."""
    for run in runs:
        rows = _table_cells(run.results) if run.results else _mean_cells(run.metrics)
        for name, (_, best) in COLUMNS.items():
            values = [cells[name].value for cells in rows.values() if not math.isnan(cells[name].value)]
            for cells in rows.values():
                cell = cells[name]
                if len(values) > 1 and cell.value == best(values):
                    cells[name] = Cell(cell.value, cell.low, cell.high, cell.floor, cell.note, True)
        for method, cells in rows.items():
            yield run, method, cells, run.results is not None and method == run.results.main


def _table_cells(results: Results) -> dict[str, dict[str, Cell]]:
    fields = ("value", "low", "high", "floor", "note")
    return {
        method: {name: Cell(**{key: results.values[method, name][key] for key in fields}) for name in COLUMNS}
        for method in results.methods
    }


def _mean_cells(metrics: Sequence[tuple[str, str, Mapping[str, float]]]) -> dict[str, dict[str, Cell]]:
    """Return unweighted means over the tasks with options, of a folder without predictions."""
    rows: dict[str, dict[str, Cell]] = {}
    for method in dict.fromkeys(method for _, method, _ in metrics):
        own = [values for _, other, values in metrics if other == method and "accuracy" in values]
        if own:
            rows[method] = {name: _mean([values.get(name, math.nan) for values in own]) for name in COLUMNS}
    return rows


def _mean(values: Sequence[float]) -> Cell:
    found = sum(values) / len(values)
    return Cell(
        found, note="not in metrics.json" if math.isnan(found) else "no interval: no predictions in this folder"
    )


def _number(value: float | None, digits: int = 3) -> str:
    if value is None or math.isnan(value):
        return ""
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}") if math.isfinite(value) else str(value)


def _percent(value: float) -> str:
    return f"{100 * value:.0f}\N{NO-BREAK SPACE}%"

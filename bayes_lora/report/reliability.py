"""The reliability diagram of a report: places of its bins, the questions in each, and the accuracy of each task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bayes_lora.metrics.plot_style import STYLES
from bayes_lora.metrics.plots import bin_index, bin_means, wilson_interval

if TYPE_CHECKING:
    from pandas import DataFrame

    from bayes_lora.report.results import Results

__all__ = ["Bin", "Panel", "TaskRow", "bin_questions", "panels", "task_rows", "task_sentences"]

NUM_BINS = 15
MOST, LONGEST = 30, 240
"""Maximum number of questions of a bin that are listed, and of characters of a text there."""
MOST_NAMES = 8
"""Maximum number of names of tasks in a sentence."""


@dataclass(frozen=True)
class Bin:
    """A bin of confidence.

    Attributes:
        index: its place, from 0.
        start: lower end.
        end: upper end.
        count: number of questions.
        right: number of right answers.
        confidence: mean confidence.
        accuracy: share of right answers.
        low: lower end of the 90 % Wilson interval of the accuracy.
        high: its upper end.
        share: its count, as a share of that of the largest bin.
    """

    index: int
    start: float
    end: float
    count: int
    right: int
    confidence: float
    accuracy: float
    low: float
    high: float
    share: float


@dataclass(frozen=True)
class Panel:
    """The diagram of one method.

    Attributes:
        method: its name.
        style: index of its colour.
        marker: name of its marker in matplotlib.
        bins: the bins that have questions.
        confidence: mean confidence of all questions.
        accuracy: their accuracy.
        largest: count of the largest bin.
    """

    method: str
    style: int
    marker: str
    bins: tuple[Bin, ...]
    confidence: float
    accuracy: float
    largest: int


@dataclass(frozen=True)
class TaskRow:
    """The answers of one method to the questions of one task.

    Attributes:
        task: name of the task.
        count: number of questions.
        accuracy: share of right answers.
        low: lower end of its 90 % Wilson interval.
        high: its upper end.
        confidence: mean confidence.
        baseline: accuracy of label counts; None if they were not compared.
        kind: ``good``, ``poor`` or ``unclear``: better than label counts, worse, or neither.
    """

    task: str
    count: int
    accuracy: float
    low: float
    high: float
    confidence: float
    baseline: float | None
    kind: str

    @property
    def calibration(self) -> str:
        """``underconfident`` or ``overconfident`` where the confidence is outside of the accuracy's interval."""
        return (
            "underconfident" if self.confidence < self.low else "overconfident" if self.confidence > self.high else ""
        )

    def compared(self, baseline: str) -> str:
        """Return how the accuracy compares with that of label counts; empty if they were not compared."""
        than = {"good": "better than", "poor": "worse than"}.get(self.kind, "not clearly better than")
        return "" if self.baseline is None else f"{than} {baseline}"


def panels(results: Results) -> list[Panel]:
    """Return the diagrams of the methods in figures."""
    return [_panel(method, results.frames[method], place) for place, method in enumerate(results.drawn)]


def bin_questions(results: Results) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return the questions in each bin by method and index of the bin, wrong ones first, as JSON values."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for method in results.drawn:
        frame = results.frames[method]
        index = bin_index(torch.tensor(frame["confidence"].to_numpy()), NUM_BINS).numpy()
        ordered = frame.assign(bin=index).sort_values(["correct", "confidence"], ascending=[True, False], kind="stable")
        found[method] = {
            str(place): [_question(results, row) for row in own.head(MOST).itertuples()]
            for place, own in ordered.groupby("bin")
        }
    return found


def task_rows(results: Results, baseline: str) -> list[TaskRow]:
    """Return the accuracy of the main method on each task, with the label counts' and its mean confidence."""
    frame = results.frames[results.main]
    other = results.frames.get(baseline)
    rows = []
    for task, own in frame.groupby("task", sort=False):
        base = None if other is None or baseline == results.main else float(other["correct"][own.index].mean())
        accuracy, sure = float(own["correct"].mean()), float(own["confidence"].mean())
        low, high = (float(end) for end in wilson_interval(accuracy, len(own)))
        kind = "unclear" if base is None or low <= base <= high else "good" if base < low else "poor"
        rows.append(TaskRow(str(task), len(own), accuracy, low, high, sure, base, kind))
    return sorted(rows, key=lambda row: -row.accuracy)


def task_sentences(rows: Sequence[TaskRow], method: str, baseline: str) -> list[str]:
    """Return on which tasks the method can be relied on, and on which its confidence is wrong, as sentences."""
    found = []
    by_kind = {kind: [row.task for row in rows if row.kind == kind] for kind in ("good", "unclear", "poor")}
    if any(row.baseline is not None for row in rows):
        good, rest = by_kind["good"], [*by_kind["unclear"], *by_kind["poor"]]
        where = f"{len(good)} of {len(rows)} tasks" + (f" ({_names(good)})" if good else "")
        if len(rows) == 1 and good:
            where = good[0]
        found.append(f"{method} is clearly more accurate than {baseline} on {where}.")
        if rest:
            found.append(f"Do not rely on its answers on {_names(rest)}.")
    for word in ("overconfident", "underconfident"):
        own = [row.task for row in rows if row.calibration == word]
        if own:
            found.append(f"It is {word} on {_names(own)}.")
    return found


def _names(tasks: Sequence[str]) -> str:
    """Return the names of tasks as a list in words."""
    shown = [*tasks] if len(tasks) <= MOST_NAMES else [*tasks[:MOST_NAMES], f"{len(tasks) - MOST_NAMES} more"]
    return ", ".join(shown[:-1]) + " and " * (len(shown) > 1) + shown[-1]


def _panel(method: str, frame: DataFrame, place: int) -> Panel:
    confidence = torch.tensor(frame["confidence"].to_numpy())
    correct = torch.tensor(frame["correct"].to_numpy()).double()
    filled = bin_index(confidence, NUM_BINS).unique().tolist()
    means = [one.tolist() for one in bin_means(confidence, correct, NUM_BINS)]
    largest = max(means[2])
    bins = []
    for index, x, y, count in zip(filled, *means, strict=True):
        low, high = (float(end) for end in wilson_interval(y, count))
        ends = index / NUM_BINS, (index + 1) / NUM_BINS
        bins.append(Bin(index, *ends, count, round(y * count), x, y, low, high, count / largest))
    style = place % len(STYLES)
    return Panel(method, style, STYLES[style][1], tuple(bins), float(confidence.mean()), float(correct.mean()), largest)


def _question(results: Results, row: Any) -> dict[str, Any]:
    question = results.predictions.questions[row.Index]
    options = question.example.options
    return {
        "task": question.task,
        "input": _shorten(question.example.input),
        "predicted": _shorten(options[row.prediction]),
        "gold": _shorten(options[row.gold]),
        "right": bool(row.correct),
        "confidence": round(float(row.confidence), 3),
    }


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 4] + " ..."

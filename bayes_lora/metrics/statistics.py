"""Metrics as functions of weights on questions, so that a bootstrap computes thousands of them at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from bayes_lora.metrics.bootstrap import Array, balanced_weights
from bayes_lora.metrics.draws import Draws
from bayes_lora.metrics.ranking import TieGroups

__all__ = ["Case", "Statistic", "mean", "missing", "probability_statistics", "ranking_statistics", "sums_matrix"]

Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Statistic:
    """A metric.

    Attributes:
        of: from weights ``(R, N)``, whose rows sum to 1, to R values.
        rows: value of each question, ``(N,)``, if the metric is their weighted mean.
        task_mean: whether the metric is the mean over tasks of its values on each.
        raised: whether noise raises the metric, a sum of absolute or squared sums that is not negative.
        floor: value that is expected of a calibrated predictor with the same probabilities.
        note: why the value is NaN.
    """

    of: Callable[[Array], Array]
    rows: Array | None = None
    task_mean: bool = False
    raised: bool = False
    floor: float = float("nan")
    note: str = ""


def mean(rows: Array) -> Statistic:
    """Return the weighted mean of a value per question, which may be infinite."""
    finite = np.isfinite(rows)
    kept = np.where(finite, rows, 0.0)

    def of(weights: Array) -> Array:
        return np.where(weights @ ~finite > 0, np.inf, weights @ kept)

    return Statistic(of, rows=rows, task_mean=True)


def missing(reason: str) -> Statistic:
    """Return a metric that is NaN."""
    return Statistic(lambda weights: np.full(len(weights), np.nan), note=reason)


@dataclass(frozen=True)
class Case:
    """Predictions of one method for N questions of T tasks.

    Attributes:
        draws: the predictions.
        gold: index of the gold option, ``(N,)``.
        task: index of the task, ``(N,)``.
        present: whether an option exists, ``(N, K)``.
        reference: NLL of the reference for skill, ``(N,)`` nats; or why there is none.
    """

    draws: Draws
    gold: Index
    task: Index
    present: npt.NDArray[np.bool_]
    reference: Array | str

    @cached_property
    def weights(self) -> Array:
        """Weights of the metrics' values, ``(N,)``."""
        return balanced_weights(self.task)

    @cached_property
    def num_tasks(self) -> int:
        """Number of tasks."""
        return int(self.task.max()) + 1

    @cached_property
    def predicted(self) -> Index:
        """Index of the predicted option, ``(N,)``."""
        return np.asarray(self.draws.predicted.numpy())

    @cached_property
    def correct(self) -> Array:
        """1 where the prediction is right, else 0, ``(N,)``."""
        return np.asarray(self.predicted == self.gold, np.float64)

    @cached_property
    def confidence(self) -> Array:
        """Probability of the predicted option, ``(N,)``."""
        return np.asarray(self.draws.confidence.numpy())

    @cached_property
    def probs(self) -> Array:
        """Predicted probabilities, ``(N, K)``."""
        return np.asarray(self.draws.mean.exp().numpy())

    @cached_property
    def nll(self) -> Array:
        """Negative log-probability of the gold option, ``(N,)`` nats."""
        return np.asarray(-np.take_along_axis(self.draws.mean.numpy(), self.gold[:, None], 1)[:, 0])


def sums_matrix(columns: Index, num_columns: int, values: Any = None, rows: Index | None = None) -> Any:
    """Return the sparse matrix M such that ``weights @ M`` has the weighted sum of the values of each column."""
    rows = np.arange(len(columns)) if rows is None else rows
    values = np.ones(len(columns)) if values is None else values
    return csr_array((np.asarray(values, np.float64), (rows, columns)), shape=(int(rows.max()) + 1, num_columns))


def probability_statistics(case: Case) -> dict[str, Statistic]:
    """Return the metrics of probabilities and predictions that are means over questions or over tasks."""
    onehot = np.arange(case.probs.shape[1]) == case.gold[:, None]
    return {
        "accuracy": mean(case.correct),
        "macro_f1": Statistic(_macro_f1(case), task_mean=True),
        "nll": mean(case.nll),
        "skill": missing(case.reference) if isinstance(case.reference, str) else _skill(case, case.reference),
        "brier": mean(((case.probs - onehot) ** 2).sum(1)),
        "per_example_gap": mean(np.abs(case.correct - case.confidence)),
        "entropy": mean(np.asarray(case.draws.entropy.numpy())),
    }


def _macro_f1(case: Case) -> Callable[[Array], Array]:
    options = case.probs.shape[1]
    shape = (-1, case.num_tasks, options)
    hits = sums_matrix(case.task * options + case.predicted, case.num_tasks * options, case.correct)
    both = sums_matrix(case.task * options + case.predicted, case.num_tasks * options) + sums_matrix(
        case.task * options + case.gold, case.num_tasks * options
    )
    mass = sums_matrix(case.task, case.num_tasks)

    def of(weights: Array) -> Array:
        size = (weights @ both).reshape(shape)
        f1 = np.divide(2.0 * (weights @ hits).reshape(shape), size, out=np.zeros_like(size), where=size > 0)
        used = np.maximum((size > 0).sum(-1), 1)
        return np.asarray(((weights @ mass) * f1.sum(-1) / used).sum(1))

    return of


def _skill(case: Case, reference: Array) -> Statistic:
    """Mean over tasks of ``1 - NLL / NLL of the reference``."""
    mass = sums_matrix(case.task, case.num_tasks)
    by_task = [case.task == t for t in range(case.num_tasks)]
    if any(not reference[own].any() or not np.isfinite(reference[own]).all() for own in by_task):
        return missing("the reference has an NLL of 0 or infinity on a task")
    base = sums_matrix(case.task, case.num_tasks, reference)
    finite = np.isfinite(case.nll)
    own = sums_matrix(case.task, case.num_tasks, np.where(finite, case.nll, 0.0))

    def of(weights: Array) -> Array:
        share, below = weights @ mass, weights @ base
        # A resample of a task may have none of its questions, or only those on which the reference is certain.
        ratio = np.divide(weights @ own, below, out=np.full_like(below, np.nan), where=below > 0)
        value = np.where(share > 0, share * (1.0 - ratio), 0.0).sum(1)
        return np.where(weights @ ~finite > 0, -np.inf, value)

    return Statistic(of, task_mean=True)


def ranking_statistics(case: Case) -> dict[str, Statistic]:
    """Return the metrics of whether wrong answers are those of high uncertainty, for each uncertainty."""
    draws = case.draws
    found: dict[str, Statistic] = {}
    for name, values in {
        "confidence": 1.0 - case.confidence,
        "entropy": np.asarray(draws.entropy.numpy()),
        "epistemic": np.asarray(draws.epistemic.numpy()),
    }.items():
        if draws.count == 1 and name == "epistemic":
            each = dict.fromkeys(("error_auroc", "error_auroc_within", "aurc", "excess_aurc"), missing("one draw"))
        else:
            # Rounding errors must not order what is equal.
            each = _ranking(case, np.round(values, 12))
        found |= {f"{metric}_{name}": statistic for metric, statistic in each.items()}
    return found


def _ranking(case: Case, values: Array) -> dict[str, Statistic]:
    groups = TieGroups(values, 1.0 - case.correct)
    reason = {0.0: "all answers are wrong", 1.0: "all answers are right"}.get(float(case.correct.mean()))
    parts: list[tuple[Index, TieGroups]] = []
    for t in range(case.num_tasks):
        own = np.flatnonzero(case.task == t)
        if 0 < case.correct[own].sum() < len(own):
            parts.append((own, TieGroups(values[own], 1.0 - case.correct[own])))
    within = Statistic(partial(_auroc_within, parts)) if parts else missing("no task has right and wrong answers")
    return {
        "error_auroc": missing(reason) if reason else Statistic(groups.auroc),
        "error_auroc_within": within,
        "aurc": Statistic(groups.aurc),
        "excess_aurc": Statistic(groups.excess_aurc),
    }


def _auroc_within(parts: list[tuple[Index, TieGroups]], weights: Array) -> Array:
    """Mean over the tasks in which it is defined."""
    total, mass = np.zeros(len(weights)), np.zeros(len(weights))
    for own, groups in parts:
        inside = weights[:, own]
        value, share = groups.auroc(inside), inside.sum(1)
        known = ~np.isnan(value)
        total += np.where(known, share * np.where(known, value, 0.0), 0.0)
        mass += share * known
    return np.asarray(np.divide(total, mass, out=np.full(len(mass), np.nan), where=mass > 0))

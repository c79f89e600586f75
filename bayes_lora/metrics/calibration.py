"""Calibration errors and the parts of the Brier score as functions of weights, and what noise alone makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from bayes_lora.metrics.bootstrap import Array
from bayes_lora.metrics.ranking import TieGroups
from bayes_lora.metrics.statistics import Case, Statistic, missing, sums_matrix

__all__ = ["calibration_statistics"]

_CELLS = 4_000_000  # numbers in one block of simulated outcomes, 32 MB


def calibration_statistics(case: Case, num_bins: int, seed: int, num_simulations: int = 200) -> dict[str, Statistic]:
    """Return the calibration errors, each with its floor, and the parts of the Brier score.

    The floor is the mean over simulations of the error whose outcomes are drawn from the predicted probabilities.

    Args:
        case: the predictions.
        num_bins: number of bins of probability.
        seed: seeds the simulations.
        num_simulations: number of simulations.
    """
    brier = ["brier_reliability", "brier_resolution", "brier_uncertainty", "brier_within_bins"]
    errors = ["ece", "adaptive_ece", "classwise_ece"]
    if len(case.gold) < num_bins:
        return dict.fromkeys(errors + brier, missing(f"{len(case.gold)} questions are fewer than {num_bins} bins"))
    classwise = _Classwise(case, num_bins)
    each: list[_Error] = [_Pooled(case, num_bins), _Adaptive(case, num_bins), classwise]
    floors = _floors(case, each, (classwise.row, classwise.option), seed, num_simulations)
    found = {
        name: Statistic(one.of, raised=True, floor=floor) for name, one, floor in zip(errors, each, floors, strict=True)
    }
    return found | dict(zip(brier, _brier_parts(case, num_bins), strict=True))


class _Error(Protocol):
    """A calibration error of the data, and of gaps between outcomes and probabilities that are times the weights."""

    def of(self, weights: Array) -> Array: ...

    def of_gaps(self, gaps: Array, weights: Array) -> Array: ...


class _Pooled:
    """ECE in bins of equal width."""

    def __init__(self, case: Case, num_bins: int) -> None:
        self._gap = case.correct - case.confidence
        self._bins = sums_matrix(bin_of(case.confidence, num_bins), num_bins)

    def of(self, weights: Array) -> Array:
        return self.of_gaps(weights * self._gap, weights)

    def of_gaps(self, gaps: Array, weights: Array) -> Array:
        return np.asarray(np.abs(gaps @ self._bins).sum(1))


class _Adaptive:
    """ECE in bins of equal weight; examples at an edge, and those of equal confidence, are shared in proportion."""

    def __init__(self, case: Case, num_bins: int) -> None:
        self._gap = case.correct - case.confidence
        self._groups = TieGroups(np.round(case.confidence, 12), 1.0 - case.correct)
        self._edges = np.linspace(0.0, 1.0, num_bins + 1)

    def of(self, weights: Array) -> Array:
        return self.of_gaps(weights * self._gap, weights)

    def of_gaps(self, gaps: Array, weights: Array) -> Array:
        mass, gap = (np.pad(np.cumsum(self._groups.sums(one), 1), ((0, 0), (1, 0))) for one in (weights, gaps))
        mass = np.broadcast_to(mass, gap.shape)
        at_edges = [np.interp(self._edges * x[-1], x, y) for x, y in zip(mass, gap, strict=True)]
        return np.asarray(np.abs(np.diff(at_edges, axis=1)).sum(1))


class _Classwise:
    """ECE of the probability of each option of a task, averaged over its options and then over tasks."""

    def __init__(self, case: Case, num_bins: int) -> None:
        options = case.probs.shape[1]
        self.row, self.option = np.nonzero(case.present)
        probs = case.probs[self.row, self.option]
        self._gap = (case.gold[self.row] == self.option) - probs
        cell = (case.task[self.row] * options + self.option) * num_bins + bin_of(probs, num_bins)
        used, column = np.unique(cell, return_inverse=True)
        present = np.zeros((case.num_tasks, options), dtype=bool)
        present[case.task[self.row], self.option] = True
        self._share = 1.0 / present.sum(1)[used // (options * num_bins)]
        self._pairs = sums_matrix(column, len(used))
        self._gaps = sums_matrix(column, len(used), self._gap, self.row)

    def of(self, weights: Array) -> Array:
        return np.asarray(np.abs(weights @ self._gaps) @ self._share)

    def of_gaps(self, gaps: Array, weights: Array) -> Array:
        return np.asarray(np.abs(gaps @ self._pairs) @ self._share)


def _floors(
    case: Case, errors: Sequence[_Error], pairs: tuple[Any, Any], seed: int, num_simulations: int
) -> list[float]:
    """Return the mean errors of outcomes that are drawn from the predicted probabilities.

    The last error is that of the pairs of a question and an option, the others are those of the confidence.
    """
    rng = np.random.default_rng(seed)
    cumulative = np.cumsum(case.probs, 1)
    cumulative /= cumulative[:, -1:]
    weights = case.weights[None]
    block = max(1, _CELLS // case.probs.size)
    total = np.zeros(len(errors))
    for begin in range(0, num_simulations, block):
        uniform = rng.random((min(block, num_simulations - begin), len(case.gold), 1))
        outcome = (uniform >= cumulative).sum(-1)
        top = ((outcome == case.predicted) - case.confidence) * case.weights
        each = ((outcome[:, pairs[0]] == pairs[1]) - case.probs[pairs]) * case.weights[pairs[0]]
        total += [error.of_gaps(top, weights).sum() for error in errors[:-1]] + [
            errors[-1].of_gaps(each, weights).sum()
        ]
    return [float(one) for one in total / num_simulations]


def _brier_parts(case: Case, num_bins: int) -> list[Statistic]:
    """Reliability, resolution, uncertainty, and the rest, over all pairs of a question and an option.

    Brier score = reliability - resolution + uncertainty + rest. The rest is the variance of probabilities within bins
    minus twice their covariance with the outcomes.
    """
    row, option = np.nonzero(case.present)
    probs, outcome = case.probs[row, option], (case.gold[row] == option).astype(np.float64)
    column = bin_of(probs, num_bins)
    count, predicted, observed = (
        sums_matrix(column, num_bins, values, row) for values in (np.ones(len(row)), probs, outcome)
    )
    pairs = np.bincount(row)
    square = np.bincount(row, (probs - outcome) ** 2)

    def parts(weights: Array) -> tuple[Array, Array, Array, Array]:
        size = weights @ count
        safe = np.where(size > 0, size, 1.0)
        mean_probability, frequency = (weights @ predicted) / safe, (weights @ observed) / safe
        total = weights @ pairs
        base = (weights.sum(1) / total)[:, None]
        reliability = (size * (mean_probability - frequency) ** 2).sum(1)
        resolution = (size * (frequency - base) ** 2).sum(1)
        uncertainty = total * (base * (1.0 - base))[:, 0]
        return reliability, resolution, uncertainty, weights @ square - reliability + resolution - uncertainty

    def part(index: int) -> Callable[[Array], Array]:
        return lambda weights: parts(weights)[index]

    return [Statistic(part(0), raised=True), Statistic(part(1)), Statistic(part(2)), Statistic(part(3))]


def bin_of(probs: Array, num_bins: int) -> np.ndarray:
    """Return the index of the bin of each probability: ``[b / B, (b + 1) / B)``, and 1 in the last."""
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    return np.clip(np.searchsorted(edges, probs, side="right") - 1, 0, num_bins - 1)

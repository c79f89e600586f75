"""One table of metrics by method, with intervals, from arrays of predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bayes_lora.metrics.bootstrap import (
    Array,
    balanced_weights,
    basic_interval,
    percentile_interval,
    resampled_weights,
    sign_flip_test,
)
from bayes_lora.metrics.draws import Draws, checked_answers, checked_draws

if TYPE_CHECKING:
    from pandas import DataFrame

    from bayes_lora.metrics.statistics import Statistic

__all__ = ["metric_table"]

_COLUMNS = [
    "method",
    "metric",
    "value",
    "low",
    "high",
    "floor",
    "difference",
    "difference_low",
    "difference_high",
    "p_value",
    "note",
]


def metric_table(
    predictions: Mapping[str, Any],
    answers: Any,
    *,
    tasks: Sequence[str] | None = None,
    option_mask: Any = None,
    reference: str = "label counts",
    against: str | None = None,
    num_bins: int = 15,
    level: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> DataFrame:
    """Return one row per method and metric: value, interval, and the difference from one of the methods.

    Every metric is one of a question drawn at random: first a task, then one of its questions. So tasks count the same
    whatever their size; without ``tasks``, questions do. Intervals are from a bootstrap over tasks and, within tasks,
    over questions; all methods see the same resamples.

    ============================ =======================================================================================
    metric                       definition (docs/uncertainty.md has the formulas)
    ============================ =======================================================================================
    ``accuracy``, ``macro_f1``   of the most probable option; F1 is averaged over the options that occur in a task
    ``nll``                      of the gold option, nats
    ``skill``                    mean over tasks of 1 - NLL / NLL of ``reference``
    ``brier``                    sum over options; ``brier_reliability - brier_resolution + brier_uncertainty
                                 + brier_within_bins``
    ``ece``, ``adaptive_ece``    of the confidence, in bins of equal width and of equal weight, all tasks pooled
    ``classwise_ece``            of the probability of each option of a task, averaged over options, then tasks
    ``per_example_gap``          see :func:`~bayes_lora.metrics.options.per_example_gap`; not a calibration error
    ``entropy``                  mean entropy of the prediction, nats
    ``error_auroc_*``            probability that a wrong answer is more uncertain than a right one
    ``error_auroc_within_*``     the same for answers of one task, averaged over tasks that have both
    ``aurc_*``, ``excess_aurc_*`` area under the risk-coverage curve, and what it exceeds the best possible order by
    ============================ =======================================================================================

    The last three are given for each uncertainty: ``confidence`` (one minus it), ``entropy`` and ``epistemic``.

    Args:
        predictions: for each method, log-probabilities ``(N, K)``, or ``(S, N, K)`` for S draws, whose probabilities
            are averaged; nats. Numbers of draws may differ.
        answers: indices of the gold options, ``(N,)``.
        tasks: name of the task of each question, ``(N,)``.
        option_mask: True for options that exist, ``(N, K)``. None means every option that is above -3e4 nats in any
            method.
        reference: the method that ``skill`` compares with.
        against: the method that is subtracted in differences; by default the first.
        num_bins: number of bins of the calibration errors and of the parts of the Brier score.
        level: probability of the intervals.
        num_resamples: number of bootstrap samples.
        seed: seeds resamples, simulations and sign flips.

    Returns:
        Columns ``method``, ``metric``, ``value``, ``low``, ``high``; ``floor``, for the three calibration errors what a
        calibrated predictor with the same probabilities has on average; ``difference`` (this method minus ``against``)
        with ``difference_low`` and ``difference_high``; ``p_value`` of no difference by random signs of the differences
        of tasks (of questions if there is one task), for metrics that are means over them; and ``note``, which says why
        a number is NaN. P-values are not corrected for the number of comparisons. Intervals of calibration errors and
        of ``brier_reliability``, which noise raises, are percentiles reflected at the value (the basic bootstrap).

    Raises:
        ValueError: a shape is wrong, a row is NaN or not normalised, methods have different questions, an answer is out
            of range or absent, or a method is unknown.
    """
    import pandas  # takes long to import

    draws, gold, task = _checked(predictions, answers, tasks, option_mask, num_bins, num_resamples, level)
    names = list(draws)
    base = names[0] if against is None else against
    if base not in draws:
        raise ValueError(f"`against` must be one of {', '.join(names)}, got {base!r}")
    statistics = _statistics(draws, gold, task, reference, num_bins, seed)
    resampled: dict[tuple[str, str], list[Array]] = {(m, k): [] for m in names for k in statistics[m]}
    for weights in resampled_weights(task, num_resamples, seed):
        for method, metric in resampled:
            resampled[method, metric].append(statistics[method][metric].of(weights))
    rows = []
    for method, metric in resampled:
        one, other = ((statistics[m][metric], np.concatenate(resampled[m, metric])) for m in (method, base))
        row = {"method": method, "metric": metric} | _estimate(*one, task, level)
        if method != base:
            row |= _difference(one, other, task, level, seed)
        rows.append(row | {"note": _note(one, other, base)})
    frame = pandas.DataFrame(rows, columns=_COLUMNS)
    counts = {"num_tasks": int(task.max()) + 1, "num_questions": len(task), "num_resamples": num_resamples}
    frame.attrs |= {
        "against": base,
        "reference": reference,
        "level": level,
        "seed": seed,
        "num_bins": num_bins,
    } | counts
    return frame


def _checked(
    predictions: Mapping[str, Any],
    answers: Any,
    tasks: Sequence[str] | None,
    option_mask: Any,
    num_bins: int,
    num_resamples: int,
    level: float,
) -> tuple[dict[str, Draws], Any, Any]:
    """Return the draws of each method with the same present options, the gold options, and the index of each task."""
    if not isinstance(predictions, Mapping):
        raise ValueError(f"`predictions` must be a mapping from method to log-probabilities, got {type(predictions)}")
    if not predictions:
        raise ValueError("`predictions` is empty: pass the log-probabilities of at least one method")
    if not 0.0 < level < 1.0 or num_bins < 1 or num_resamples < 2:
        raise ValueError(
            f"expected 0 < level < 1, num_bins >= 1 and num_resamples >= 2, got {level}, {num_bins} and {num_resamples}"
        )
    draws = {name: checked_draws(one, option_mask, f"predictions[{name!r}]") for name, one in predictions.items()}
    shapes = {name: tuple(one.present.shape) for name, one in draws.items()}
    if len(set(shapes.values())) > 1:
        got = ", ".join(f"{shape} for {name!r}" for name, shape in shapes.items())
        raise ValueError(f"`predictions` must have the same questions and options for every method, got {got}")
    present = np.logical_or.reduce([one.present.numpy() for one in draws.values()])
    gold = checked_answers(answers, next(iter(draws.values()))).numpy()
    if not np.take_along_axis(present, gold[:, None], 1).all():
        raise ValueError("`answers` has the index of an absent option; check that it was not shifted by the padding")
    draws = {name: Draws(one.log_probs, one.present.new_tensor(present)) for name, one in draws.items()}
    if tasks is not None and len(tasks) != len(gold):
        raise ValueError(f"`tasks` must have one name per question, {len(gold)}, got {len(tasks)}")
    names = [""] * len(gold) if tasks is None else [str(one) for one in tasks]
    return draws, gold, np.unique(names, return_inverse=True)[1]


def _statistics(
    draws: Mapping[str, Draws], gold: Any, task: Any, reference: str, num_bins: int, seed: int
) -> dict[str, dict[str, Statistic]]:
    from bayes_lora.metrics.calibration import calibration_statistics  # scipy takes long to import
    from bayes_lora.metrics.statistics import Case, probability_statistics, ranking_statistics

    def case(name: str, nll: Array | str) -> Case:
        return Case(draws[name], gold, task, draws[name].present.numpy(), nll)

    known: Array | str = f"no method is named {reference!r}"
    if reference in draws:
        known = case(reference, "").nll
    found = {}
    for name in draws:
        own = case(name, known)
        calibration = calibration_statistics(own, num_bins, seed)
        found[name] = probability_statistics(own) | calibration | ranking_statistics(own)
    return found


def _value(statistic: Statistic, task: Any) -> float:
    return float(statistic.of(balanced_weights(task)[None])[0])


def _estimate(statistic: Statistic, resamples: Array, task: Any, level: float) -> dict[str, float]:
    value = _value(statistic, task)
    low, high = percentile_interval(resamples, level)
    if statistic.raised:
        low, high = (float(np.maximum(end, 0.0)) for end in basic_interval(value, resamples, level))
    return {"value": value, "low": low, "high": high, "floor": statistic.floor}


def _difference(
    one: tuple[Statistic, Array], other: tuple[Statistic, Array], task: Any, level: float, seed: int
) -> dict[str, float]:
    with np.errstate(invalid="ignore"):  # inf - inf, of two infinite NLLs, is NaN
        value = float(np.float64(_value(one[0], task)) - _value(other[0], task))
        resamples = one[1] - other[1]
        units = [_units(statistic, task) for statistic, _ in (one, other)]
        differences = None if units[0] is None or units[1] is None else units[0] - units[1]
    reflected = one[0].raised and not np.isnan(value)
    low, high = basic_interval(value, resamples, level) if reflected else percentile_interval(resamples, level)
    known = differences is not None and bool(np.isfinite(differences).all())
    p_value = sign_flip_test(differences, seed) if known and differences is not None else float("nan")
    return {"difference": value, "difference_low": low, "difference_high": high, "p_value": p_value}


def _units(statistic: Statistic, task: Any) -> Array | None:
    """Return the values whose mean the metric is: of tasks, or of questions if there is one task."""
    count = int(task.max()) + 1
    if count == 1:
        return statistic.rows
    if not statistic.task_mean:
        return None
    inside = (task == np.arange(count)[:, None]).astype(np.float64)
    return statistic.of(inside / inside.sum(1, keepdims=True))


def _note(one: tuple[Statistic, Array], other: tuple[Statistic, Array], base: str) -> str:
    statistic, resamples = one
    lost = float(np.isnan(resamples).mean())
    if statistic.note:
        return statistic.note
    if other[0].note:
        return f"no difference: {base}: {other[0].note}"
    return f"undefined in {100 * lost:.1f} % of the resamples, which the interval leaves out" if lost else ""

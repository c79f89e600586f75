"""One table of metrics for the predictions of several methods on several tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from bayes_lora.errors import TaskError
from bayes_lora.metrics.tables import metric_table as of_log_probs
from bayes_lora.posterior.prediction_draws import PredictionDraws
from bayes_lora.types import absent_score

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["metric_table"]


def metric_table(
    predictions: Mapping[str, PredictionDraws | Sequence[PredictionDraws]],
    *,
    reference: str = "label counts",
    against: str | None = None,
    **kwargs: Any,
) -> pd.DataFrame:
    """Return one row per method and metric, see :func:`bayes_lora.metrics.metric_table`.

    The gold answers are those of the questions themselves, so that all must have one.

    Example::

        queries = [task.query for task in tasks]
        table = bayes_lora.metric_table({
            "pretrained": pretrained(lm, tasks).predict_draws(queries),
            "adapted": posterior.adapt(tasks).predict_draws(queries),
        })
        table.pivot(index="method", columns="metric", values="value")

    Args:
        predictions: for each method what :meth:`TaskPosterior.predict_draws` returns, of one task or of several; of all
            methods for the same questions.
        reference: the method that ``skill`` compares with.
        against: the method that is subtracted in differences; by default the first.
        **kwargs: passed on: ``num_bins``, ``level``, ``num_resamples``, ``seed``.

    Raises:
        TaskError: there is no question, methods have different questions, or the answer of a question is generated.
        ValueError: a method is unknown, or a number is out of range.
    """
    each = {name: [one] if isinstance(one, PredictionDraws) else list(one) for name, one in predictions.items()}
    asked = {name: [(one.task, row) for one in own for row in one.examples] for name, own in each.items()}
    first = next(iter(asked.values()), [])
    if not first:
        raise TaskError("metric_table: expected the predictions of at least one question, got none.")
    for name, own in asked.items():
        if own != first:
            raise TaskError(f"metric_table: expected predictions of the same questions, but those of {name!r} differ.")
    rows = [row for _, row in first]
    free = next((task for task, row in first if not row.options), None)
    if free is not None:
        raise TaskError(f"metric_table: answers of task {free!r} are generated. Pass tasks with options only.")
    width = max(len(row.options) for row in rows)
    return of_log_probs(
        {name: _joined(own, width) for name, own in each.items()},
        torch.tensor([row.answer for row in rows]),
        tasks=[task for task, _ in first],
        option_mask=torch.arange(width) < torch.tensor([len(row.options) for row in rows])[:, None],
        reference=reference,
        against=against,
        **kwargs,
    )


def _joined(draws: Sequence[PredictionDraws], width: int) -> Tensor:
    """Return log-probabilities ``(S, N, K)`` of all tasks; of their averages if numbers of draws differ."""
    filled = [one for one in draws if one.examples]
    same = len({len(one) for one in filled}) == 1
    values = [(one.log_probs if same else one.mean()[None]).double().cpu() for one in filled]
    low = absent_score(torch.float64)
    return torch.cat([pad(value, (0, width - value.shape[-1]), value=low) for value in values], 1)

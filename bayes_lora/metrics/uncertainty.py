"""The uncertainty of each prediction, and which part of it comes from the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bayes_lora.metrics.draws import Draws, checked_answers, checked_draws

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["credible_interval", "uncertainty"]


def uncertainty(
    log_probs: Any,
    answers: Any = None,
    *,
    option_mask: Any = None,
    task: str | Sequence[str] | None = None,
    question: Sequence[Any] | None = None,
    options: Sequence[str] | Sequence[Sequence[str]] | None = None,
    level: float = 0.9,
) -> DataFrame:
    r"""Return one row per question: the prediction, and how uncertain it is.

    With the probabilities :math:`p_{sk}` of option k under draw s of S, and their mean
    :math:`\bar p_k = \frac1S \sum_s p_{sk}`:

    .. math::

        \underbrace{-\sum_k \bar p_k \log \bar p_k}_{\texttt{entropy}} =
        \underbrace{-\frac1S \sum_{s,k} p_{sk} \log p_{sk}}_{\texttt{aleatoric}} +
        \underbrace{\frac1S \sum_{s,k} p_{sk} \log \frac{p_{sk}}{\bar p_k}}_{\texttt{epistemic}}

    The epistemic part is the mutual information of answer and weights. S draws show at most :math:`\log S` nats of it,
    and on average less than there is.

    ============================= ======================================================================================
    column                        value
    ============================= ======================================================================================
    ``task``                      name of the task, if it is given
    ``question``                  what is given for the question, or its index
    ``prediction``                index of the option with the largest :math:`\bar p_k`; the first of equal ones
    ``prediction_text``           its text, if ``options`` are given
    ``gold``, ``gold_text``       index and text of the gold option, if ``answers`` are given
    ``correct``                   whether both are the same
    ``nll``                       :math:`-\log \bar p_\text{gold}`, nats
    ``confidence``                :math:`\max_k \bar p_k`
    ``entropy``                   nats; the sum of the two columns that follow
    ``aleatoric``, ``epistemic``  nats
    ``variation_ratio``           share of draws that do not predict the option that most draws predict
    ``low``, ``high``             equal-tailed interval of the draws' probabilities of the predicted option
    ============================= ======================================================================================

    ``attrs["notes"]`` of the frame lists what limits these numbers. With one draw, the last five columns are NaN: it
    does not tell a certain posterior from one that was not sampled. For intervals of all options, see
    :func:`credible_interval`.

    Args:
        log_probs: log-probabilities of the options, nats, ``(S, N, K)``, or ``(N, K)`` for one draw; each row of each
            draw is normalised. A tensor, an array, or a sequence of S tensors.
        answers: indices of the gold options, ``(N,)``.
        option_mask: True for options that exist, ``(N, K)``. None means every option that is above -3e4 nats in a draw.
        task: name of the task, or one name per question.
        question: a text or an identifier per question.
        options: texts of the options: K texts for all questions, or a sequence of texts per question.
        level: probability of the interval.

    Raises:
        ValueError: a shape is wrong, the draws have different shapes, a row is NaN or not normalised, an answer is out
            of range or absent, or an option has no text.
    """
    import pandas  # takes long to import

    draws = checked_draws(log_probs, option_mask)
    size = len(draws.present)
    columns: dict[str, Any] = {}
    if task is not None:
        columns["task"] = [task] * size if isinstance(task, str) else _of_length(task, size, "task")
    columns["question"] = list(range(size)) if question is None else _of_length(question, size, "question")
    texts = None if options is None else _texts(options, draws)
    columns["prediction"] = draws.predicted.tolist()
    if texts is not None:
        columns["prediction_text"] = [row[k] for row, k in zip(texts, columns["prediction"], strict=True)]
    if answers is not None:
        gold = checked_answers(answers, draws)
        # Without a mask, a probability of zero and an absent option are the same.
        if option_mask is not None and not bool(draws.present.gather(1, gold[:, None]).all()):
            raise ValueError(
                "`answers` has the index of an absent option; check that it was not shifted by the padding"
            )
        columns["gold"] = gold.tolist()
        if texts is not None:
            columns["gold_text"] = [row[k] for row, k in zip(texts, columns["gold"], strict=True)]
        columns["correct"] = (draws.predicted == gold).tolist()
        columns["nll"] = -draws.mean.gather(1, gold[:, None])[:, 0]
    low, high = (end.gather(1, draws.predicted[:, None])[:, 0] for end in draws.interval(level))
    columns |= {
        "confidence": draws.confidence,
        "entropy": draws.entropy,
        "aleatoric": draws.aleatoric,
        "epistemic": draws.epistemic,
        "variation_ratio": draws.variation_ratio,
        "low": low,
        "high": high,
    }
    arrays = {name: value.numpy() if isinstance(value, Tensor) else value for name, value in columns.items()}
    frame = pandas.DataFrame(arrays)
    frame.attrs |= {"level": level, "num_draws": draws.count, "notes": _notes(draws, level)}
    return frame


def credible_interval(log_probs: Any, level: float = 0.9, *, option_mask: Any = None) -> tuple[Tensor, Tensor]:
    """Return the ends of the equal-tailed interval of each option's probability over draws, ``(N, K)`` each.

    They are quantiles of the draws, interpolated linearly; fewer than ``2 / (1 - level)`` draws give an interval that
    is too narrow. NaN for absent options, and for one draw. Arguments are those of :func:`uncertainty`.

    Raises:
        ValueError: as for :func:`uncertainty`, or ``level`` is not between 0 and 1.
    """
    return checked_draws(log_probs, option_mask).interval(level)


def _notes(draws: Draws, level: float) -> list[str]:
    if draws.count == 1:
        return ["one draw: aleatoric, epistemic, variation_ratio, low and high need at least two"]
    notes = []
    if draws.count < 2.0 / (1.0 - level) - 1e-9:
        notes.append(f"{draws.count} draws: their {level:g} interval is too narrow")
    options = draws.present.sum(-1).max()
    if draws.count < options:
        notes.append(f"{draws.count} draws: the epistemic part is at most {math.log(draws.count):.2f} nats")
    return notes


def _of_length(values: Sequence[Any], size: int, name: str) -> list[Any]:
    if len(values) != size:
        raise ValueError(f"`{name}` must have one entry per question, {size}, got {len(values)}")
    return list(values)


def _texts(options: Sequence[Any], draws: Draws) -> list[Sequence[str]]:
    """Return the texts of each question's options."""
    size, width = draws.present.shape
    shared = len(options) > 0 and isinstance(options[0], str)
    rows = [options] * size if shared else _of_length(options, size, "options")
    for i, (row, present) in enumerate(zip(rows, draws.present.tolist(), strict=True)):
        needed = max(k + 1 for k in range(width) if present[k])
        if len(row) < needed:
            raise ValueError(f"`options` must have {needed} texts for question {i}, got {len(row)}")
    return rows

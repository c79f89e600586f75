"""Thresholds above which answers are given, with a bound on how many of them are wrong."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bayes_lora.metrics.ranking import checked_scores

__all__ = ["RiskControl", "risk_control_threshold"]


@dataclass(frozen=True, slots=True)
class RiskControl:
    """A threshold on the confidence, and what it promises for a new question.

    Attributes:
        threshold: A question is answered if its confidence is *above* it. -inf answers all, inf answers none.
        coverage: Share of calibration questions that are answered.
        risk: Share of calibration questions that are answered and wrong; with ``delta``, the share of wrong answers
            among those that are given (NaN if none is). The promise is about ``target``, not about this number.
        target: The bound.
        delta: Probability that the bound does not hold; None if it holds on average.
        num_examples: Number of calibration questions.
        guarantee: The promise in words.
    """

    threshold: float
    coverage: float
    risk: float
    target: float
    delta: float | None
    num_examples: int
    guarantee: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


def risk_control_threshold(
    confidence: Any, correct: Any, target: float, delta: float | None = None, *, num_coverages: int = 20
) -> RiskControl:
    r"""Choose the lowest confidence at which answers are given, such that few of them are wrong.

    *Without* ``delta``: conformal risk control (arXiv 2208.02814) of the loss "answered and wrong", which can only fall
    as the threshold rises. With n calibration questions, the threshold is the lowest at which

    .. math:: \frac{1 + \#\{\text{answered and wrong}\}}{n + 1} \le \texttt{target}.

    If the calibration questions and the new one are exchangeable, then
    :math:`P(\text{answered and wrong}) \le \texttt{target}`, on average over calibration sets. The share is of *all*
    questions: among those that are answered the error rate is higher, by a factor of one over the coverage. Below a
    target of ``1 / (n + 1)`` no question is answered.

    *With* ``delta``: the error rate *among the answers that are given*. The thresholds that answer 1/J, 2/J, ..., all
    of the calibration questions are tested in this order, until one fails (learn then test with a fixed sequence, arXiv
    2110.01052): m answers with e errors pass if :math:`P(\mathrm{Binomial}(m, \texttt{target}) \le e) \le
    \texttt{delta}`. The last that passes is taken. If the questions are independent and identically distributed, then
    with probability ``1 - delta`` over calibration sets :math:`P(\text{wrong} \mid \text{answered}) \le
    \texttt{target}`. This is proved if the error rate above a threshold crosses the target at most once, as it does if
    it falls with the confidence. Otherwise fewer questions are answered, and the promise held in a search for
    counterexamples (docs/uncertainty.md). The sequence begins at the number m of answers of which
    :math:`\lfloor \texttt{target}\, m / 3 \rfloor` wrong ones pass, 22 for a target and a delta of 0.1: no smaller
    number can pass, or only by luck.

    Neither promise holds for a task that has no calibration questions, nor for each question by itself.

    Args:
        confidence: any score that is high where the answer is likely right, ``(N,)``, such as the probability of the
            predicted option, or minus the entropy.
        correct: whether the answer is right, ``(N,)`` bool.
        target: the bound on the risk, in (0, 1).
        delta: probability that the bound fails, in (0, 1); None for a bound on average.
        num_coverages: the number J of thresholds.

    Raises:
        ValueError: the shapes differ, a confidence is not finite, or a number is out of range.
    """
    for name, value in (("target", target), ("delta", delta)):
        if value is not None and not 0.0 < value < 1.0:
            raise ValueError(f"`{name}` must be between 0 and 1, got {value}")
    if num_coverages < 1:
        raise ValueError(f"`num_coverages` must be at least 1, got {num_coverages}")
    values, right = checked_scores(confidence, correct)
    wrong = right == 0
    size = len(values)
    if delta is None:
        threshold = _conformal(values[wrong], size, target)
        guarantee = f"P(answered and wrong) <= {target:g}, on average over calibration sets of exchangeable questions"
    else:
        threshold = _learn_then_test(values, wrong, target, delta, num_coverages)
        guarantee = (
            f"P(wrong | answered) <= {target:g} with probability {1 - delta:g} over calibration sets of independent, "
            "identically distributed questions"
        )
    answered = values > threshold
    errors, count = int((wrong & answered).sum()), int(answered.sum())
    among = size if delta is None else count
    return RiskControl(
        threshold=threshold,
        coverage=count / size,
        risk=errors / among if among else math.nan,
        target=target,
        delta=delta,
        num_examples=size,
        guarantee=guarantee if count else f"{guarantee}; no question is answered",
    )


def _conformal(wrong: Any, size: int, target: float) -> float:
    """Return the lowest threshold that leaves ``target * (size + 1) - 1`` wrong answers above it."""
    allowed = math.floor(target * (size + 1) + 1e-9) - 1  # 0.29 * 100 is below 29
    if allowed < 0:
        return math.inf
    return -math.inf if allowed >= len(wrong) else float(np.sort(wrong)[len(wrong) - 1 - allowed])


def _learn_then_test(values: Any, wrong: Any, target: float, delta: float, num_coverages: int) -> float:
    """Return the lowest threshold down to which all tests pass at level ``delta``.

    Given the threshold, a fixed rank of the confidences, the answers above it are independent, each wrong with the same
    probability; so each p-value is valid. The order of the tests is fixed before errors are counted, and a false
    promise is made only if the first one of the sequence passes: no correction for their number is needed. Which is the
    first depends on the confidences. Given how many of them are above the place where the error rate crosses the
    target, the answers above are wrong as often as the target, and those below more often, so it passes with
    probability ``delta`` at most. With several crossings, the number above one says something about the next.
    """
    from scipy.stats import binom  # takes long to import

    least = 1
    while least <= len(values) and binom.cdf(int(target * least / 3), least, target) > delta:
        least += 1
    ranked, found = np.sort(values)[::-1], math.inf
    for step in range(1, num_coverages + 1):
        rank = math.ceil(len(values) * step / num_coverages - 1e-9)
        threshold = -math.inf if rank == len(values) else float(ranked[rank])
        answered = values > threshold
        if answered.sum() < least:
            continue
        if binom.cdf(int((wrong & answered).sum()), int(answered.sum()), target) > delta:
            break
        found = threshold
    return found

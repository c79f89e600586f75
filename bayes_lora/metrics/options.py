"""Accuracy and calibration of predictions over answer options.

Every function takes predictions over ``N`` examples with at most ``K`` options. The confidence is the
probability of the predicted (most probable) option. All sums are computed in float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from bayes_lora.metrics.draws import SUM_TOLERANCE, tensor_of

__all__ = [
    "Metrics",
    "adaptive_calibration_error",
    "compute_metrics",
    "expected_calibration_error",
    "mean_metrics",
    "per_example_gap",
    "top_confidence",
]

Scores = TypeVar("Scores")


@dataclass(frozen=True, slots=True)
class Metrics:
    """Scores of one task, or their average over tasks.

    Attributes:
        accuracy: Share of examples whose most probable option is the gold one; in [0, 1], higher is better.
        nll: Mean negative log-probability of the gold option, in nats; lower is better.
        brier: Mean over examples of the sum over options of ``(p - onehot)^2``; in [0, 2], lower is better.
        ece: Expected calibration error in 15 equal-width bins; in [0, 1], lower is better.
        num_examples: Number of examples that were scored.
    """

    accuracy: float
    nll: float
    brier: float
    ece: float
    num_examples: int

    def to_dict(self) -> dict[str, float]:
        """Return the fields by name, ready for JSON."""
        return asdict(self)


def compute_metrics(log_probs: Tensor, answer: Tensor, option_mask: Tensor | None = None) -> Metrics:
    """Score predictions against the gold answers.

    Args:
        log_probs: Log-probabilities of the options in nats, ``(N, K)``, each row normalised; -inf on padding.
        answer: Index of the gold option, ``(N,)``, integers.
        option_mask: True on real options, False on padding, ``(N, K)``. None means that every option that is
            not -inf is real. The number of padded options does not affect the scores.

    Raises:
        ValueError: A shape is wrong, a row is not normalised, or an answer is out of range or padding.
    """
    log_probs, answer = _checked(log_probs, answer, option_mask)
    probs = log_probs.exp()
    gold = torch.nn.functional.one_hot(answer, probs.shape[1]).to(probs)
    confidence, correct = _top(log_probs, answer)
    return Metrics(
        accuracy=float(correct.double().mean()),
        nll=float(-log_probs.gather(1, answer[:, None]).mean()),
        brier=float((probs - gold).square().sum(-1).mean()),
        ece=expected_calibration_error(confidence, correct),
        num_examples=len(answer),
    )


def mean_metrics(metrics: Sequence[Scores]) -> Scores:
    """Return the unweighted average over tasks; `num_examples` is summed.

    Args:
        metrics: `Metrics` or another dataclass of numbers with `num_examples`, all of one type.

    Raises:
        ValueError: `metrics` is empty, or of several types.
    """
    if not metrics:
        raise ValueError("`metrics` is empty: expected the metrics of at least one task")
    kinds = sorted({type(one).__name__ for one in metrics})
    if len(kinds) > 1:
        raise ValueError(f"`metrics` must be of one type, got {' and '.join(kinds)}; average each by itself")
    rows = [asdict(one) for one in metrics]  # type: ignore[call-overload]
    means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    return type(metrics[0])(**means | {"num_examples": sum(row["num_examples"] for row in rows)})


def top_confidence(log_probs: Tensor, answer: Tensor, option_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the confidence ``(N,)`` and whether the prediction is correct ``(N,)``.

    Arguments are those of :func:`compute_metrics`. Of equally probable options, the first is predicted.
    """
    return _top(*_checked(log_probs, answer, option_mask))


def expected_calibration_error(confidence: Any, correct: Any, num_bins: int = 15) -> float:
    r"""Expected calibration error (ECE) in equal-width bins, pooled over all examples.

    .. math:: \text{ECE} = \sum_b \frac{|b|}{N} \left| \text{accuracy}(b) - \text{confidence}(b) \right|

    Bin ``b`` of ``B`` contains the confidences in ``[b / B, (b + 1) / B)``; the last bin also contains 1.

    Args:
        confidence: Probability of the predicted option, ``(N,)``, in [0, 1].
        correct: Whether the prediction is right, ``(N,)``, bool.
        num_bins: The number of bins ``B``.

    Raises:
        ValueError: There are no examples or no bins, the shapes differ, a confidence is outside [0, 1], or `correct`
            is neither bool nor 0 and 1.
    """
    from torchmetrics.functional.classification import binary_calibration_error  # takes long to import

    confidence, correct = _checked_pairs(confidence, correct, num_bins)
    # torchmetrics puts a confidence of exactly 1 into a separate bin, which favours saturated predictions.
    below_one = torch.nextafter(confidence.new_ones(()), confidence.new_zeros(()))
    return float(binary_calibration_error(confidence.minimum(below_one), correct.long(), num_bins, norm="l1"))


def adaptive_calibration_error(confidence: Any, correct: Any, num_bins: int = 15) -> float:
    """ECE in bins of equal mass: the examples are sorted by confidence and divided into bins of equal size.

    The first ``N mod num_bins`` bins have one more example. With at most ``num_bins`` examples, each is its
    own bin and the result is `per_example_gap`.

    Args:
        confidence: Probability of the predicted option, ``(N,)``, in [0, 1].
        correct: Whether the prediction is right, ``(N,)``, bool. Ties in confidence keep their order.
        num_bins: The number of bins.

    Raises:
        ValueError: As for `expected_calibration_error`.
    """
    confidence, correct = _checked_pairs(confidence, correct, num_bins)
    gap = (correct.to(confidence) - confidence)[confidence.argsort(stable=True)]
    bins = gap.tensor_split(num_bins)
    return float(sum(one.sum().abs() for one in bins)) / len(gap)


def per_example_gap(confidence: Any, correct: Any) -> float:
    """Mean over examples of ``|1{correct} - confidence|``, which is *not* a calibration error.

    The code released with arXiv 2508.14285 reports this quantity as "ECE". A perfectly calibrated predictor
    of confidence ``c`` has a gap of ``2 c (1 - c)``, not 0. Use it only to compare with those numbers.

    Args:
        confidence: Probability of the predicted option, ``(N,)``, in [0, 1].
        correct: Whether the prediction is right, ``(N,)``, bool.

    Raises:
        ValueError: As for `expected_calibration_error`.
    """
    confidence, correct = _checked_pairs(confidence, correct)
    return float((correct.to(confidence) - confidence).abs().mean())


def _top(log_probs: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
    predicted = log_probs.argmax(-1)
    return log_probs.gather(1, predicted[:, None]).squeeze(1).exp().clamp(max=1.0), predicted == answer


def _checked(log_probs: Any, answer: Any, option_mask: Any) -> tuple[Tensor, Tensor]:
    """Check the arguments; return log-probabilities in float64 with -inf on padding, and int64 answers."""
    log_probs, answer = tensor_of(log_probs, "log_probs"), tensor_of(answer, "answer")
    option_mask = None if option_mask is None else tensor_of(option_mask, "option_mask")
    if log_probs.ndim != 2 or log_probs.shape[0] < 1 or log_probs.shape[1] < 2:
        raise ValueError(f"`log_probs` must be (N, K) with N >= 1 and K >= 2 options, got {tuple(log_probs.shape)}")
    if answer.shape != log_probs.shape[:1] or answer.is_floating_point() or answer.dtype == torch.bool:
        raise ValueError(
            f"`answer` must be ({log_probs.shape[0]},) integers, got {tuple(answer.shape)} of {answer.dtype}"
        )
    log_probs, answer = log_probs.double(), answer.long()
    if option_mask is not None:
        if option_mask.shape != log_probs.shape or option_mask.dtype != torch.bool:
            raise ValueError(
                f"`option_mask` must be {tuple(log_probs.shape)} bool, got {tuple(option_mask.shape)} of "
                f"{option_mask.dtype}"
            )
        log_probs = log_probs.masked_fill(~option_mask, -torch.inf)
    if bool(((answer < 0) | (answer >= log_probs.shape[1])).any()):
        raise ValueError(f"`answer` must be in 0..{log_probs.shape[1] - 1}, got {answer.min()}..{answer.max()}")
    if option_mask is not None and not bool(option_mask.gather(1, answer[:, None]).all()):
        raise ValueError("`answer` is the index of a padded option; check that it was not shifted by the padding")
    error = (log_probs.exp().sum(-1) - 1).abs()
    if not bool((error <= SUM_TOLERANCE).all()):
        row = int(error.nan_to_num(torch.inf).argmax())
        raise ValueError(
            f"`log_probs` must be normalised over the options, but row {row} sums to "
            f"{float(log_probs[row].exp().sum()):.4g}; apply log_softmax first"
        )
    return log_probs, answer


def _checked_pairs(confidence: Any, correct: Any, num_bins: int = 1) -> tuple[Tensor, Tensor]:
    confidence, correct = tensor_of(confidence, "confidence"), tensor_of(correct, "correct")
    if num_bins < 1:
        raise ValueError(f"`num_bins` must be at least 1, got {num_bins}")
    if confidence.ndim != 1 or confidence.shape != correct.shape or len(confidence) < 1:
        raise ValueError(
            "`confidence` and `correct` must both be (N,) with N >= 1, got "
            f"{tuple(confidence.shape)} and {tuple(correct.shape)}"
        )
    confidence = confidence.double()
    if not bool(((confidence >= 0) & (confidence <= 1)).all()):
        raise ValueError("`confidence` must be in [0, 1] and not NaN; pass probabilities, not their logarithms")
    if correct.dtype != torch.bool and not bool(((correct == 0) | (correct == 1)).all()):
        raise ValueError("`correct` must be bool, or 0 and 1: whether each prediction is right")
    return confidence, correct.bool()

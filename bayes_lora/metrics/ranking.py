"""Whether uncertain answers are the wrong ones: AUROC, risk against coverage, and detection of other distributions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from bayes_lora.metrics.draws import tensor_of

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["OODMetrics", "TieGroups", "ood_metrics", "risk_coverage"]

Array = npt.NDArray[np.float64]


class TieGroups:
    """Examples sorted by uncertainty, those of equal uncertainty in one group.

    Results do not depend on the order of the examples. Weights ``(R, N)`` are R versions of the same examples, such as
    counts of a bootstrap; each row must have a positive sum.

    Args:
        uncertainty: ``(N,)``; the answers with the lowest are given first.
        wrong: whether the answer is wrong, ``(N,)``.
    """

    def __init__(self, uncertainty: Array, wrong: Array) -> None:
        self.levels, group = np.unique(uncertainty, return_inverse=True)
        self._order = np.argsort(group, kind="stable")
        self._starts = np.flatnonzero(np.diff(group[self._order], prepend=-1))
        self._wrong = np.asarray(wrong, dtype=np.float64)

    def sums(self, weights: Array) -> Array:
        """Return the sum of weights in each group, ``(R, groups)``."""
        return np.asarray(np.add.reduceat(weights[:, self._order], self._starts, axis=1))

    def auroc(self, weights: Array) -> Array:
        """Return the probability that a wrong answer has more uncertainty than a right one, ties counting one half.

        ``(R,)``; NaN if all answers are right, or all are wrong.
        """
        wrong = self.sums(weights * self._wrong)
        right = self.sums(weights * (1.0 - self._wrong))
        below = np.cumsum(right, axis=1) - right / 2.0
        pairs = wrong.sum(1) * right.sum(1)
        return np.asarray(np.divide((wrong * below).sum(1), pairs, out=np.full(len(pairs), np.nan), where=pairs > 0))

    def curve(self, weights: Array) -> tuple[Array, Array]:
        """Return coverage and errors at the end of each group, ``(R, groups)`` each, as shares of all examples."""
        total = weights.sum(1, keepdims=True)
        return np.cumsum(self.sums(weights), 1) / total, np.cumsum(self.sums(weights * self._wrong), 1) / total

    def aurc(self, weights: Array) -> Array:
        r"""Return the area under the risk-coverage curve, ``(R,)``: the average of the risk over coverages in [0, 1].

        Within a group the answers are given in random order: with slope s, the errors are
        :math:`E(c) = E_0 + s (c - c_0)`, whose :math:`\int E(c) / c \, dc` is known.
        """
        coverage, errors = self.curve(weights)
        start, before = (np.pad(one[:, :-1], ((0, 0), (1, 0))) for one in (coverage, errors))
        width = coverage - start
        slope = np.divide(errors - before, width, out=np.zeros_like(width), where=width > 0)
        ratio = np.divide(coverage, start, out=np.ones_like(width), where=start > 0)
        return np.asarray((slope * width + (before - slope * start) * np.log(ratio)).sum(1))

    def excess_aurc(self, weights: Array) -> Array:
        r"""Return AURC minus that of the same answers with all wrong ones last, :math:`r + (1 - r) \log (1 - r)`."""
        risk = self.curve(weights)[1][:, -1]
        # Not below 0 but by rounding.
        rest = np.clip(1.0 - risk, 0.0, 1.0)
        best = risk + rest * np.log(np.where(rest > 0, rest, 1.0))
        return np.maximum(self.aurc(weights) - best, 0.0)


def risk_coverage(uncertainty: Any, correct: Any) -> DataFrame:
    """Return the error rate among the answers of lowest uncertainty, for each number of answers that are given.

    Answers of equal uncertainty are given together, so the rows do not depend on their order.

    Args:
        uncertainty: ``(N,)``, for example one minus the confidence, or the entropy.
        correct: whether the answer is right, ``(N,)`` bool.

    Returns:
        By increasing ``coverage``, the share of questions that are answered: ``risk``, the error rate among them, and
        ``threshold``, the largest uncertainty among them. ``attrs`` has ``aurc``, the average of the risk over all
        coverages, and ``excess_aurc``, the same minus that of the best possible order, which has all errors last.

    Raises:
        ValueError: there are no answers, the shapes differ, or an uncertainty is not finite.
    """
    import pandas  # takes long to import

    values, right = checked_scores(uncertainty, correct)
    groups = TieGroups(values, 1.0 - right)
    weights = np.ones((1, len(values)))
    coverage, errors = (one[0] for one in groups.curve(weights))
    frame = pandas.DataFrame({"coverage": coverage, "risk": errors / coverage, "threshold": groups.levels})
    frame.attrs |= {"aurc": float(groups.aurc(weights)[0]), "excess_aurc": float(groups.excess_aurc(weights)[0])}
    return frame


@dataclass(frozen=True, slots=True)
class OODMetrics:
    """How well a score tells questions of another distribution (OOD) from those of the same one.

    Attributes:
        auroc: Probability that an OOD question has the higher score, ties counting one half; 0.5 is chance.
        aupr_out: Average precision with OOD questions as positives; chance is their share.
        aupr_in: Average precision of the negative score, with the other questions as positives; chance is their share.
        fpr95: Share of OOD questions below or at the lowest threshold that keeps at least 95 % of the others; lower is
            better, chance is about 0.95.
        num_in: Number of questions of the same distribution.
        num_out: Number of OOD questions.
    """

    auroc: float
    aupr_out: float
    aupr_in: float
    fpr95: float
    num_in: int
    num_out: int

    def to_dict(self) -> dict[str, float]:
        """Return the fields by name, ready for JSON."""
        return asdict(self)


def ood_metrics(in_scores: Any, out_scores: Any) -> OODMetrics:
    """Compare the uncertainty of questions of the same distribution with that of others.

    Args:
        in_scores: uncertainty of questions of the same distribution, ``(N,)``; high means other.
        out_scores: that of OOD questions, ``(M,)``.

    Raises:
        ValueError: one of both is empty, or a score is not finite.
    """
    from torchmetrics.functional.classification import binary_auroc, binary_average_precision  # takes long to import

    names = "in_scores", "out_scores"
    both = [tensor_of(one, name).double() for name, one in zip(names, (in_scores, out_scores), strict=True)]
    for name, one in zip(names, both, strict=True):
        if one.ndim != 1 or len(one) < 1 or not bool(one.isfinite().all()):
            raise ValueError(f"`{name}` must be (N,) finite numbers with N >= 1, got {tuple(one.shape)}")
    inside, outside = both
    scores, target = torch.cat(both), torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))]).long()
    # Ranks in [0, 1], because torchmetrics takes other numbers for logits, whose sigmoid may round to 1.
    rank = torch.unique(scores, return_inverse=True)[1].double() / len(scores)
    threshold = inside.sort().values[-(-95 * len(inside) // 100) - 1]
    return OODMetrics(
        auroc=float(binary_auroc(rank, target)),
        aupr_out=float(binary_average_precision(rank, target)),
        aupr_in=float(binary_average_precision(1.0 - rank, 1 - target)),
        fpr95=float((outside <= threshold).double().mean()),
        num_in=len(inside),
        num_out=len(outside),
    )


def checked_scores(scores: Any, correct: Any) -> tuple[Array, Array]:
    """Check scores and outcomes, ``(N,)`` each; return both in float64."""
    values, right = tensor_of(scores, "scores").double(), tensor_of(correct, "correct")
    if values.ndim != 1 or values.shape != right.shape or len(values) < 1:
        raise ValueError(
            f"scores and `correct` must both be (N,) with N >= 1, got {tuple(values.shape)} and {tuple(right.shape)}"
        )
    if right.dtype != torch.bool:
        raise ValueError(f"`correct` must be bool, got {right.dtype}")
    if not bool(values.isfinite().all()):
        raise ValueError(f"scores must be finite, got {float(values[~values.isfinite()][0])}")
    return values.numpy(), right.double().numpy()

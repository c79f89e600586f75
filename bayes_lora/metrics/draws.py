"""Predictions of several posterior draws: the checks, the predictive mean, and the parts of its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["SUM_TOLERANCE", "Draws", "checked_answers", "checked_draws", "tensor_of"]

SUM_TOLERANCE = 2e-2
"""bfloat16 log-probabilities of a few nats are off by about 1 %."""

# Absent options have -inf, or half the lowest value of their dtype, which is -32752 in float16.
_ABSENT = -3e4


@dataclass(frozen=True)
class Draws:
    """Log-probabilities of N questions under S draws, float64 on the CPU.

    Attributes:
        log_probs: ``(S, N, K)``, nats, -inf for absent options.
        present: whether an option exists, ``(N, K)``.
    """

    log_probs: Tensor
    present: Tensor

    @property
    def count(self) -> int:
        """Number of draws, S."""
        return len(self.log_probs)

    @cached_property
    def mean(self) -> Tensor:
        """Logarithm of the average probability, ``(N, K)`` nats: the prediction."""
        return torch.logsumexp(self.log_probs, 0) - math.log(self.count)

    @cached_property
    def predicted(self) -> Tensor:
        """Index of the most probable option, ``(N,)``; the first of equal ones."""
        return self.mean.argmax(-1)

    @cached_property
    def confidence(self) -> Tensor:
        """Probability of the predicted option, ``(N,)``."""
        return self.mean.amax(-1).exp().clamp(max=1.0)

    @cached_property
    def entropy(self) -> Tensor:
        """Entropy of the prediction, ``(N,)`` nats."""
        found: Tensor = torch.special.entr(self.mean.exp()).sum(-1)
        return found

    @cached_property
    def aleatoric(self) -> Tensor:
        """Mean entropy of a draw, ``(N,)`` nats; NaN for one draw."""
        return self._several(torch.special.entr(self.log_probs.exp()).sum(-1).mean(0))

    @cached_property
    def epistemic(self) -> Tensor:
        """Mutual information of answer and draw, ``(N,)`` nats; NaN for one draw."""
        # It is not negative, because entropy is concave; rounding errors are.
        return (self.entropy - self.aleatoric).clamp(min=0.0)

    @cached_property
    def variation_ratio(self) -> Tensor:
        """Share of draws that do not predict the option that most draws predict, ``(N,)``; NaN for one draw."""
        votes = torch.nn.functional.one_hot(self.log_probs.argmax(-1), self.log_probs.shape[-1]).sum(0)
        return self._several(1.0 - votes.amax(-1).double() / self.count)

    def interval(self, level: float) -> tuple[Tensor, Tensor]:
        """Return the equal-tailed interval of each option's probability, ``(N, K)`` each.

        NaN for absent options and for one draw.
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"`level` must be between 0 and 1, got {level}")
        tails = torch.tensor([(1.0 - level) / 2.0, (1.0 + level) / 2.0], dtype=torch.float64)
        # One option at a time: quantile refuses more than 16 million values.
        ends = [torch.quantile(one.exp(), tails, dim=0) for one in self.log_probs.unbind(-1)]
        low, high = torch.stack(ends, -1).masked_fill(~self.present, torch.nan)
        return self._several(low), self._several(high)

    def _several(self, values: Tensor) -> Tensor:
        return values if self.count > 1 else torch.full_like(values, torch.nan)


def checked_draws(log_probs: Any, option_mask: Any = None, name: str = "log_probs") -> Draws:
    """Check log-probabilities ``(S, N, K)``, or ``(N, K)`` for one draw.

    Args:
        log_probs: nats; a tensor, an array, or a sequence of S of them.
        option_mask: True for options that exist, ``(N, K)``. None means every option that is above -3e4 nats in a draw.
        name: what errors call the log-probabilities.

    Raises:
        ValueError: a shape is wrong, the draws have different shapes, or a row is NaN or not normalised.
    """
    values = _stacked(log_probs, name)
    if values.ndim == 2:
        values = values[None]
    if values.ndim != 3 or min(values.shape[:2]) < 1 or values.shape[2] < 2:
        raise ValueError(
            f"`{name}` must be (S, N, K) or (N, K) with S, N >= 1 and K >= 2 options, got {tuple(values.shape)}"
        )
    if option_mask is None:
        present = (values > _ABSENT).any(0)
    else:
        present = tensor_of(option_mask, "option_mask")
        if present.shape != values.shape[1:] or present.dtype != torch.bool:
            raise ValueError(
                f"`option_mask` must be {tuple(values.shape[1:])} bool, got {tuple(present.shape)} of {present.dtype}"
            )
        values = values.masked_fill(~present, -torch.inf)
    values = values.masked_fill(values <= _ABSENT, -torch.inf)
    error = (values.exp().sum(-1) - 1).abs().nan_to_num(torch.inf)
    if not bool((error <= SUM_TOLERANCE).all()):
        draw, row = divmod(int(error.argmax()), values.shape[1])
        total = float(values[draw, row].exp().sum())
        raise ValueError(
            f"`{name}` must be normalised over the options, but row {row} of draw {draw} sums to {total:.4g}; apply "
            "log_softmax first"
        )
    return Draws(values, present)


def checked_answers(answers: Any, draws: Draws) -> Tensor:
    """Check the indices of the gold options, ``(N,)``; return them as int64.

    Raises:
        ValueError: the shape or the type is wrong, or an index is out of range or of an absent option.
    """
    gold = tensor_of(answers, "answers")
    size, options = draws.present.shape
    if gold.shape != (size,) or gold.is_floating_point() or gold.dtype == torch.bool:
        raise ValueError(f"`answers` must be ({size},) integers, got {tuple(gold.shape)} of {gold.dtype}")
    gold = gold.long()
    if bool(((gold < 0) | (gold >= options)).any()):
        raise ValueError(f"`answers` must be in 0..{options - 1}, got {int(gold.min())}..{int(gold.max())}")
    return gold


def tensor_of(values: Any, name: str = "values") -> Tensor:
    """Return a tensor, an array, a column of a frame or numbers as a tensor on the CPU.

    Args:
        values: the numbers.
        name: what errors call them.

    Raises:
        ValueError: they are no numbers, or their rows have different lengths.
    """
    if isinstance(values, Tensor):
        return values.detach().cpu()
    try:
        return torch.from_numpy(np.array(values))  # a copy, because arrays of pandas are read-only
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` must be numbers in rows of one length, got {values!r:.60}") from error


def _stacked(log_probs: Any, name: str) -> Tensor:
    if isinstance(log_probs, Sequence) and log_probs and not isinstance(log_probs, str):
        draws = [tensor_of(one, name) for one in log_probs]
        shapes = {tuple(one.shape) for one in draws}
        if len(shapes) > 1:
            raise ValueError(f"`{name}` must be draws of one shape, got {', '.join(map(str, sorted(shapes)))}")
        log_probs = torch.stack(draws)
    return tensor_of(log_probs, name).double()

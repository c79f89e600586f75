r"""A point mass with dropout on the inputs of a LoRA (Gal and Ghahramani, arXiv 1506.02142; PEFT: ``lora_dropout``).

.. math:: W = V\, \mathrm{diag}(m / k), \qquad m_j \sim \mathrm{Bernoulli}(k)

for each layer. Whole columns are dropped, for all tokens of all questions, so that a draw is one model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayes_lora.distributions.weight_distribution import Noise, WeightDistribution

__all__ = ["DroppedPoint"]


class DroppedPoint(WeightDistribution):
    """A point mass whose columns are dropped at random, see above. It has no density.

    Args:
        value: V, ``(*batch, layers, out, in)``; the mean.
        keep: k, ``(*batch,)``, between 0 and 1.
        validate_args: whether to check values.
    """

    dims = {"value": 3, "keep": 0}
    fixed = frozenset({"keep"})
    value: Tensor
    keep: Tensor

    def __init__(self, value: Tensor, keep: Tensor, *, validate_args: bool | None = None) -> None:
        super().__init__(value=value, keep=keep, validate_args=validate_args)

    def drawn(self, count: int, noise: Noise) -> Tensor:
        """Sample ``(count, *batch, layers, out, in)``."""
        keep = self.keep[..., None, None, None]
        uniform = torch.special.ndtr(noise(torch.Size((count, *self.value[..., :1, :].shape))))
        mask: Tensor = (uniform < keep).to(self.value.dtype) / keep
        return self.value * mask

    def scaled(self, factor: float) -> DroppedPoint:
        """Return self, because dropout has no scale."""
        return self

    def kl_from(self, normal: torch.distributions.Normal) -> Tensor:
        """Return -E[log p], in nats; the entropy of the mask does not depend on V and is left out."""
        constant = 0.5 * math.log(2 * math.pi)
        return (0.5 * self.squared_distance(normal) + normal.scale.log() + constant).sum((-3, -2, -1))

    @property
    def mean(self) -> Tensor:
        """The mean, V."""
        return self.value

    @property
    def variance(self) -> Tensor:
        """Marginal variance of each weight."""
        keep = self.keep[..., None, None, None]
        return self.value.square() * (1.0 - keep) / keep

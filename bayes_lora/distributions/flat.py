"""An improper flat density."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor

from bayes_lora.distributions.weight_distribution import Noise, Parameters, WeightDistribution

__all__ = ["Flat"]


class Flat(WeightDistribution):
    """An improper flat density over ``(layers, out, in)``, whose draws are ``value``. Gradient steps start there.

    Args:
        value: ``(*batch, layers, out, in)``.
        validate_args: whether to check values.
    """

    dims = {"value": 3}
    value: Tensor

    def __init__(self, value: Tensor, *, validate_args: bool | None = None) -> None:
        super().__init__(value=value, validate_args=validate_args)

    def constrained(self, values: Parameters) -> dist.TorchDistribution:
        """Return a point mass."""
        return dist.Delta(values["value"], event_dim=3)

    def drawn(self, count: int, noise: Noise) -> Tensor:
        """Repeat ``value``, ``(count, *batch, layers, out, in)``."""
        return self.value.expand(count, *self.value.shape)

    def scaled(self, factor: float) -> Flat:
        """Return self, because a flat density has no scale."""
        return self

    @property
    def mean(self) -> Tensor:
        """The point ``value``, which stands in for the mean."""
        return self.value

    @property
    def variance(self) -> Tensor:
        """Infinite."""
        return torch.full_like(self.value, torch.inf)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return zero: the density is constant."""
        shape = torch.broadcast_shapes(self.batch_shape, value.shape[:-3])
        return value.new_zeros(()).expand(shape)

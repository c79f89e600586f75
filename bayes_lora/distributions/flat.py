"""An improper flat density."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from bayes_lora.distributions.unconstrained import Parts, from_parts, to_parts

__all__ = ["Flat"]


class Flat(dist.TorchDistribution):
    """An improper flat density over tensors of three event dimensions; what it draws is ``at``.

    Args:
        at: ``(*batch, layers, out, in)``.
    """

    arg_constraints = {"at": constraints.independent(constraints.real, 3)}
    support = constraints.independent(constraints.real, 3)
    has_rsample = True

    def __init__(self, at: Tensor) -> None:
        self.at = at
        super().__init__(at.shape[:-3], at.shape[-3:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Flat:
        """The same for a larger batch."""
        return Flat(self.at.expand(*batch_shape, *self.event_shape))

    @property
    def mean(self) -> Tensor:
        """``at``."""
        return self.at

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """``at``."""
        return self.at.expand(self._extended_shape(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Zero."""
        shape = torch.broadcast_shapes(self.batch_shape, value.shape[:-3])
        return value.new_zeros(()).expand(shape)


@to_parts.register
def _(fn: Flat) -> Parts:
    return {"value": fn.at}


@from_parts.register
def _(fn: Flat, parts: Parts) -> Any:
    return dist.Delta(parts["value"], event_dim=3)

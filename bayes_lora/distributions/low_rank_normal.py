r"""A normal over all weights of a site, whose covariance is diagonal plus low rank.

.. math:: w \sim \mathcal N(\mu,\; \mathrm{diag}(\sigma^2) + F F^\top), \qquad w = \mu + \sigma \epsilon + F z

with F of shape ``(layers * out * in, k)``: k directions that correlate the weights of all layers (Ong, Nott and Smith,
JCGS 2018).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayes_lora.distributions.weight_distribution import Noise, WeightDistribution

__all__ = ["LowRankNormal"]


class LowRankNormal(WeightDistribution):
    """A normal with diagonal plus low-rank covariance, see above.

    Args:
        loc: mu, ``(*batch, layers, out, in)``.
        scale: sigma, of the same shape.
        factor: F, ``(*batch, layers, out, in, k)``.
        validate_args: whether to check values.
    """

    dims = {"loc": 3, "scale": 3, "factor": 4}
    positive = frozenset({"scale"})
    loc: Tensor
    scale: Tensor
    factor: Tensor

    def __init__(self, loc: Tensor, scale: Tensor, factor: Tensor, *, validate_args: bool | None = None) -> None:
        super().__init__(loc=loc, scale=scale, factor=factor, validate_args=validate_args)

    def drawn(self, count: int, noise: Noise) -> Tensor:
        """Sample ``mu + sigma eps + F z``, ``(count, *batch, layers, out, in)``."""
        z = noise(torch.Size((count, *self.batch_shape, self.factor.shape[-1])))
        moved = self.loc + self.scale * noise(torch.Size((count, *self.loc.shape)))
        return moved + torch.einsum("...loik,s...k->s...loi", self.factor, z)

    def scaled(self, factor: float) -> LowRankNormal:
        """Return the distribution with both parts of the covariance multiplied by ``factor`` squared."""
        return LowRankNormal(self.loc, factor * self.scale, factor * self.factor, validate_args=False)

    def kl_from(self, normal: torch.distributions.Normal) -> Tensor:
        """Return KL(self || normal), in nats."""
        each = 0.5 * (self.squared_distance(normal) - 1.0) - (self.scale / normal.scale).log()
        return each.sum((-3, -2, -1)) - self.log_volume()

    @property
    def mean(self) -> Tensor:
        """The mean, ``mu``."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Marginal variance of each weight."""
        return self.scale.square() + self.factor.square().sum(-1)

    def flat(self) -> torch.distributions.LowRankMultivariateNormal:
        """Return the same distribution over flat vectors of all weights of the site."""
        flat: Any = torch.distributions.LowRankMultivariateNormal
        values = self.loc.flatten(-3), self.factor.flatten(-4, -2), self.scale.square().flatten(-3)
        return flat(*values, validate_args=False)  # type: ignore[no-any-return]

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density, in nats."""
        found: Tensor = self.flat().log_prob(value.flatten(-3))
        return found

    def entropy(self) -> Tensor:
        """Return the entropy, in nats."""
        found: Tensor = self.flat().entropy()
        return found

    def log_volume(self) -> Tensor:
        r"""Return :math:`\tfrac12 \log\det(I + F^\top \mathrm{diag}(\sigma^{-2}) F)`, the entropy due to F."""
        # In 64 bits, because directions may be nearly parallel, and the sums run over millions of weights.
        scaled = (self.factor / self.scale[..., None]).flatten(-4, -2).double()
        inside = scaled.mT @ scaled + torch.eye(scaled.shape[-1], dtype=scaled.dtype, device=scaled.device)
        root: Tensor = torch.linalg.cholesky(inside)
        return root.diagonal(dim1=-2, dim2=-1).log().sum(-1).to(self.loc.dtype)

r"""A normal whose covariance is diagonal plus low rank, over all weights of a site.

.. math:: w \sim \mathcal N(\mu,\; \mathrm{diag}(\sigma^2) + F F^\top), \qquad w = \mu + \sigma \epsilon + F z

with F of ``(layers * out * in, k)``: k directions in which weights of all layers move together (Ong, Nott and Smith,
JCGS 2018).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayes_lora.distributions.weight_distribution import Noise, WeightDistribution

__all__ = ["LowRankNormal"]


class LowRankNormal(WeightDistribution):
    """The distribution above.

    Args:
        loc: mu, ``(*batch, layers, out, in)``.
        scale: sigma, likewise.
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
        """``mu + sigma eps + F z``, ``(count, *batch, layers, out, in)``."""
        z = noise(torch.Size((count, *self.batch_shape, self.factor.shape[-1])))
        moved = self.loc + self.scale * noise(torch.Size((count, *self.loc.shape)))
        return moved + torch.einsum("...loik,s...k->s...loi", self.factor, z)

    def scaled(self, factor: float) -> LowRankNormal:
        """Both parts of the covariance, times ``factor`` squared."""
        return LowRankNormal(self.loc, factor * self.scale, factor * self.factor, validate_args=False)

    def kl_from(self, normal: torch.distributions.Normal) -> Tensor:
        """KL(self || normal), nats."""
        each = 0.5 * (self.squared_distance(normal) - 1.0) - (self.scale / normal.scale).log()
        return each.sum((-3, -2, -1)) - self.log_volume()

    @property
    def mean(self) -> Tensor:
        """Mu."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Of each weight by itself."""
        return self.scale.square() + self.factor.square().sum(-1)

    def flat(self) -> torch.distributions.LowRankMultivariateNormal:
        """The same over vectors of all the site's weights."""
        flat: Any = torch.distributions.LowRankMultivariateNormal
        values = self.loc.flatten(-3), self.factor.flatten(-4, -2), self.scale.square().flatten(-3)
        return flat(*values, validate_args=False)  # type: ignore[no-any-return]

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, nats."""
        found: Tensor = self.flat().log_prob(value.flatten(-3))
        return found

    def entropy(self) -> Tensor:
        """In nats."""
        found: Tensor = self.flat().entropy()
        return found

    def log_volume(self) -> Tensor:
        r""":math:`\tfrac12 \log\det(I + F^\top \mathrm{diag}(\sigma^{-2}) F)`, by which F adds to the entropy."""
        # In 64 bits: directions may be nearly alike, and the sums run over millions of weights.
        scaled = (self.factor / self.scale[..., None]).flatten(-4, -2).double()
        inside = scaled.mT @ scaled + torch.eye(scaled.shape[-1], dtype=scaled.dtype, device=scaled.device)
        root: Tensor = torch.linalg.cholesky(inside)
        return root.diagonal(dim1=-2, dim2=-1).log().sum(-1).to(self.loc.dtype)

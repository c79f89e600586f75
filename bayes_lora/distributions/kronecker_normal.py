r"""A matrix normal per layer: correlations between rows and between columns.

.. math:: W = M + \sigma \circ \big(L\, (S \circ E)\, R^\top\big), \qquad E_{ij} \sim \mathcal N(0, 1)

with covariance :math:`\mathrm{diag}(\sigma) (R \otimes L) \mathrm{diag}(S^2) (R \otimes L)^\top \mathrm{diag}(\sigma)`
(Louizos and Welling, arXiv 1603.04733, for S = 1; George et al., arXiv 1806.03884, for orthogonal L and R). A side
without a matrix is uncorrelated.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayes_lora.distributions.weight_distribution import Noise, WeightDistribution

__all__ = ["KroneckerNormal"]


class KroneckerNormal(WeightDistribution):
    """A matrix normal per layer, see above.

    Args:
        loc: M, ``(*batch, layers, out, in)``.
        scale: sigma, of the same shape.
        left: L, any invertible matrix, ``(*batch, layers, out, out)``; None for the identity.
        right: R, any invertible matrix, ``(*batch, layers, in, in)``; None for the identity.
        spectrum: S, ``(*batch, layers, out, in)``; None for ones.
        validate_args: whether to check values.
    """

    dims = {"loc": 3, "scale": 3, "left": 3, "right": 3, "spectrum": 3}
    positive = frozenset({"scale", "spectrum"})
    loc: Tensor
    scale: Tensor
    left: Tensor | None
    right: Tensor | None
    spectrum: Tensor | None

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        left: Tensor | None = None,
        right: Tensor | None = None,
        spectrum: Tensor | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        tensors = dict(loc=loc, scale=scale, left=left, right=right, spectrum=spectrum)
        super().__init__(validate_args=validate_args, **tensors)

    def drawn(self, count: int, noise: Noise) -> Tensor:
        """Sample ``M + sigma o (L (S o E) R^T)``, ``(count, *batch, layers, out, in)``."""
        inside = noise(torch.Size((count, *self.loc.shape)))
        if self.spectrum is not None:
            inside = self.spectrum * inside
        if self.left is not None:
            inside = torch.einsum("...op,s...pi->s...oi", self.left, inside)
        if self.right is not None:
            inside = torch.einsum("...ip,s...op->s...oi", self.right, inside)
        return self.loc + self.scale * inside

    def scaled(self, factor: float) -> KroneckerNormal:
        """Return the distribution with sigma multiplied by ``factor``."""
        return self.map(lambda name, value: factor * value if name == "scale" else value)

    def kl_from(self, normal: torch.distributions.Normal) -> Tensor:
        """Return KL(self || normal), in nats."""
        each = 0.5 * (self.squared_distance(normal) - 1.0) + normal.scale.log()
        return each.sum((-3, -2, -1)) - self.log_det()

    @property
    def mean(self) -> Tensor:
        """The mean, ``M``."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Marginal variance of each weight."""
        inside = torch.ones_like(self.loc) if self.spectrum is None else self.spectrum.square()
        sides = (None if side is None else side.square() for side in (self.left, self.right))
        left, right = sides
        return self.scale.square() * sandwich(left, inside, right)

    def log_det(self) -> Tensor:
        """Return the log-determinant of the map from E to W, ``(*batch,)``."""
        out, inside = self.event_shape[-2:]
        total = self.scale.log().sum((-3, -2, -1))
        if self.spectrum is not None:
            total = total + self.spectrum.log().sum((-3, -2, -1))
        for side, count in ((self.left, inside), (self.right, out)):
            if side is not None:
                total = total + count * torch.linalg.slogdet(side).logabsdet.sum(-1)
        return total

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density, in nats."""
        noise = (value - self.loc) / self.scale
        if self.left is not None:
            noise = torch.linalg.solve(self.left, noise)
        if self.right is not None:
            noise = torch.linalg.solve(self.right, noise.mT).mT
        if self.spectrum is not None:
            noise = noise / self.spectrum
        constant = 0.5 * self.event_shape.numel() * math.log(2 * math.pi)
        return -0.5 * noise.square().sum((-3, -2, -1)) - constant - self.log_det()

    def entropy(self) -> Tensor:
        """Return the entropy, in nats."""
        return 0.5 * self.event_shape.numel() * math.log(2 * math.pi * math.e) + self.log_det()


def sandwich(left: Tensor | None, inside: Tensor, right: Tensor | None) -> Tensor:
    """Return ``L X R^T``; None is the identity."""
    inside = inside if left is None else left @ inside
    return inside if right is None else inside @ right.mT

r"""A normal over the weights of all sites together, whose precision is that of independent normals plus low rank.

.. math:: w = \mu + \sigma u, \qquad u \sim \mathcal N\big(0,\; (I + G G^\top)^{-1}\big)
    = \mathcal N(0, I - G S G^\top), \qquad S = (I + G^\top G)^{-1}

G has r columns, and its rows are the weights of all sites. This is the posterior of weights with independent normal
priors that are seen through r linear functions, such as option scores in their tangent space. S is r x r, and nothing
larger than G is stored. A draw corrects one of the prior by what is seen of it (Matheron's rule):

.. math:: u = \epsilon - G S (G^\top \epsilon + \eta), \qquad \epsilon \sim \mathcal N(0, I), \quad
    \eta \sim \mathcal N(0, I_r)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bayes_lora.distributions.weight_distribution import Noise, WeightDistribution

__all__ = ["JointNormal", "SiteNormal"]


class SiteNormal(WeightDistribution):
    """The marginal of one site of a :class:`JointNormal`.

    Args:
        loc: mu, ``(*batch, layers, out, in)``.
        scale: sigma, of the same shape.
        factor: the rows of G of this site, ``(*batch, layers, out, in, r)``.
        inner: S, of all sites, ``(*batch, r, r)``.
        origin: the point at which scores were linearised to find this distribution, of the shape of ``loc``; None if
            there is none. It does not affect the distribution.
        validate_args: whether to check values.
    """

    dims = {"loc": 3, "scale": 3, "factor": 4, "inner": 2, "origin": 3}
    positive = frozenset({"scale"})
    fixed = frozenset({"factor", "inner", "origin"})
    loc: Tensor
    scale: Tensor
    factor: Tensor
    inner: Tensor
    origin: Tensor | None

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        factor: Tensor,
        inner: Tensor,
        origin: Tensor | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(loc=loc, scale=scale, factor=factor, inner=inner, origin=origin, validate_args=validate_args)

    def drawn(self, count: int, noise: Noise) -> Tensor:
        """Sample this site alone; draws of several sites are independent of each other, see ``JointNormal.drawn``."""
        own: Tensor = JointNormal({"site": self._alone()}).drawn(count, noise)["site"]
        return own

    def _alone(self) -> SiteNormal:
        """Return the same distribution as a joint normal of one site."""
        values, vectors = torch.linalg.eigh(self.gram())
        root = vectors * values.clamp_min(0.0).sqrt()[..., None, :]  # H with H H^T = G^T G
        # I - G S G^T = I - U (H^T S H) U^T with U orthonormal; its precision is I + U K U^T.
        removed = root.mT @ self.inner @ root
        eye = torch.eye(removed.shape[-1], dtype=removed.dtype, device=removed.device)
        added = torch.linalg.solve(eye - removed, removed)
        shares, basis = torch.linalg.eigh(0.5 * (added + added.mT))
        inverse = vectors * _inverse_root(values)[..., None, :]
        change = inverse @ basis * shares.clamp_min(0.0).sqrt()[..., None, :]
        factor = self.factor @ change[..., None, None, :, :]
        inner = torch.diag_embed(1.0 / (1.0 + shares.clamp_min(0.0)))
        return SiteNormal(self.loc, self.scale, factor, inner, validate_args=False)

    def gram(self) -> Tensor:
        """Return the inner products of the columns of G over this site, ``(*batch, r, r)``."""
        rows = self.factor.flatten(-4, -2)
        return rows.mT @ rows

    def scaled(self, factor: float) -> SiteNormal:
        """Return the distribution with standard deviations multiplied by ``factor``."""
        return SiteNormal(self.loc, factor * self.scale, self.factor, self.inner, self.origin, validate_args=False)

    def without_origin(self) -> SiteNormal:
        """Return the same distribution without an origin."""
        return SiteNormal(self.loc, self.scale, self.factor, self.inner, validate_args=False)

    def kl_from(self, normal: torch.distributions.Normal) -> Tensor:
        """Return KL(self || normal) of this site alone, in nats."""
        each = 0.5 * (self.squared_distance(normal) - 1.0) - (self.scale / normal.scale).log()
        eye = torch.eye(self.inner.shape[-1], dtype=self.inner.dtype, device=self.inner.device)
        log_det = torch.linalg.slogdet(eye - self.inner @ self.gram())[1]
        found: Tensor = each.sum((-3, -2, -1)) - 0.5 * log_det
        return found

    @property
    def mean(self) -> Tensor:
        """The mean, ``mu``."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Marginal variance of each weight."""
        removed = torch.einsum("...loir,...rs,...lois->...loi", self.factor, self.inner, self.factor)
        return self.scale.square() * (1.0 - removed)


class JointNormal(dict[str, Any]):
    """From site name to :class:`SiteNormal`, with the same S for all: a draw takes all sites together."""

    @property
    def inner(self) -> Tensor:
        """S, ``(*batch, r, r)``."""
        inner: Tensor = next(iter(self.values())).inner
        return inner

    def drawn(self, count: int, noise: Noise) -> dict[str, Tensor]:
        """Sample all sites, ``(count, *batch, layers, out, in)`` each, from the given standard normal noise."""
        drawn = {site: noise(torch.Size((count, *fn.loc.shape))) for site, fn in self.items()}
        seen: Any = noise(torch.Size((count, *self.inner.shape[:-1])))
        for site, fn in self.items():
            seen = seen + torch.einsum("...loir,s...loi->s...r", fn.factor, drawn[site])
        moved = torch.einsum("...rq,s...q->s...r", self.inner, seen)
        return {
            site: fn.loc + fn.scale * (drawn[site] - torch.einsum("...loir,s...r->s...loi", fn.factor, moved))
            for site, fn in self.items()
        }

    def rsample(self, sample_shape: Sequence[int] = ()) -> dict[str, Tensor]:
        """Sample all sites, ``(*sample, *batch, layers, out, in)`` each."""
        like = next(iter(self.values())).loc
        draws = self.drawn(
            math.prod(sample_shape), lambda shape: torch.randn(shape, dtype=like.dtype, device=like.device)
        )
        return {site: value.view(*sample_shape, *value.shape[1:]) for site, value in draws.items()}

    def divergence(self, prior: Mapping[str, Any]) -> Tensor:
        """Return KL(self || prior) in nats, ``(*batch,)``, for independent normals of all sites."""
        total: Any = -0.5 * torch.linalg.slogdet(self.inner)[1]
        for site, fn in self.items():
            normal = prior[site].base_dist if hasattr(prior[site], "base_dist") else prior[site]
            each = 0.5 * (fn.squared_distance(normal) - 1.0) - (fn.scale / normal.scale).log()
            total = total + each.sum((-3, -2, -1))
        found: Tensor = total
        return found


def _inverse_root(values: Tensor) -> Tensor:
    """Return one over the square root of eigenvalues, 0 for those that are 0 up to rounding."""
    smallest = values.amax(-1, keepdim=True).clamp_min(0.0) * values.shape[-1] * torch.finfo(values.dtype).eps
    kept = values > smallest
    return torch.where(kept, torch.where(kept, values, 1.0).rsqrt(), 0.0)

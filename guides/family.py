"""The family of q(phi), for guides that optimise its parameters directly.

A family maps p(phi | theta) of one site to the initial q(phi) of that site.

Usage::

    guide = SharedMeanField(model, family=LowRank(4))
    guide = GradientGuide(model, family=MatrixNormal())
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch

from bayes_lora.distributions.dropped_point import DroppedPoint
from bayes_lora.distributions.flat import Flat
from bayes_lora.distributions.kronecker_normal import KroneckerNormal
from bayes_lora.distributions.low_rank_normal import LowRankNormal
from bayes_lora.distributions.moments import moment_matched
from bayes_lora.distributions.unconstrained import has_parameters
from bayes_lora.errors import ConfigError
from bayes_lora.utils.ranges import Count, Positive, Rate

__all__ = ["Dropout", "Family", "LowRank", "MatrixNormal", "Point", "same_as_prior"]

Family = Callable[[str, Any], Any]
"""Maps a site name and its p(phi | theta) to the initial q(phi) of the site."""


def same_as_prior(site: str, prior: Any) -> Any:
    """Return the prior if gradient steps can move its family, else normals with its mean and standard deviation."""
    return prior if has_parameters(prior) else moment_matched(prior).to_event(3)


@dataclass(frozen=True)
class Point:
    """A point mass at the prior's mean: q is then MAP estimation, and a gradient guide fine-tunes a LoRA."""

    def __call__(self, site: str, prior: Any) -> Any:
        """Return the initial q(phi) of one site."""
        return prior if isinstance(prior, dist.Delta) else dist.Delta(_normal(self, site, prior).mean, event_dim=3)


@dataclass(frozen=True)
class LowRank:
    """A normal with diagonal plus low-rank covariance.

    See :class:`bayes_lora.distributions.low_rank_normal.LowRankNormal`.

    Attributes:
        rank: k.
        start: initial scale of the factor, in prior standard deviations.
    """

    rank: Count = 4
    start: Positive = 0.1

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.start > 0:
            raise ConfigError(f"LowRank: expected rank of at least 1 and a positive start, got {self}.")

    def __call__(self, site: str, prior: Any) -> Any:
        """Return the initial q(phi) of one site.

        The factor is random, because at zero it has no gradient, and drawn with a fixed seed.
        """
        normal = _normal(self, site, prior)
        generator = torch.Generator().manual_seed(0)
        shape = (*prior.event_shape, self.rank)
        noise = torch.randn(shape, generator=generator, dtype=normal.loc.dtype).to(normal.loc.device)
        factor = (self.start / self.rank**0.5) * normal.scale[..., None] * noise
        return LowRankNormal(normal.loc, normal.scale, factor)


@dataclass(frozen=True)
class MatrixNormal:
    """A matrix normal per layer: correlations between rows and between columns.

    See :class:`bayes_lora.distributions.kronecker_normal.KroneckerNormal`.

    Attributes:
        largest: sides longer than this stay independent, because their matrices would be larger than the weights.
    """

    largest: Count = 64

    def __call__(self, site: str, prior: Any) -> Any:
        """Return the initial q(phi) of one site."""
        normal = _normal(self, site, prior)
        layers, *sides = prior.event_shape
        eyes = (torch.eye(side, dtype=normal.loc.dtype, device=normal.loc.device) for side in sides)
        left, right = (eye.repeat(layers, 1, 1) if len(eye) <= self.largest else None for eye in eyes)
        return KroneckerNormal(normal.loc, normal.scale, left, right)


@dataclass(frozen=True)
class Dropout:
    """A point mass with dropout on the columns of A; a point mass for B.

    See :class:`bayes_lora.distributions.dropped_point.DroppedPoint`.

    Attributes:
        rate: probability with which a column is dropped.
        sites: the sites with dropout; by default every A.
    """

    rate: Rate = 0.1
    sites: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise ConfigError(f"Dropout: expected a rate between 0 and 1, got {self.rate}.")

    def __call__(self, site: str, prior: Any) -> Any:
        """Return the initial q(phi) of one site."""
        mean = _normal(self, site, prior).mean
        if site not in self.sites if self.sites is not None else ".lora_A" not in site:
            return dist.Delta(mean, event_dim=3)
        return DroppedPoint(mean, mean.new_full((), 1.0 - self.rate))


def _normal(family: Any, site: str, prior: Any) -> Any:
    if ".delta_weight" in site or isinstance(prior, Flat):
        raise ConfigError(
            f"{type(family).__name__}: expected p(phi | theta) of LoRA factors for site {site!r}, got {prior}. "
            "Leave family at its default, or use a model of LoRA factors (HierarchicalNormal)."
        )
    return moment_matched(prior)

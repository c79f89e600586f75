"""Moment matching: independent normals with the means and standard deviations of a distribution."""

from __future__ import annotations

import torch
from pyro.distributions import Normal, TorchDistribution

__all__ = ["moment_matched"]


def moment_matched(fn: TorchDistribution) -> Normal:
    """Return elementwise normals with the moments of each weight, of batch ``(*batch, layers, out, in)``.

    Independent normals are returned as they are.
    """
    base = fn.base_dist if isinstance(fn, torch.distributions.Independent) else fn
    return base if isinstance(base, torch.distributions.Normal) else Normal(fn.mean, fn.stddev)  # type: ignore[return-value]

"""q(theta): a point mass, or independent normals. These guides sample the theta sites only."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints

from bayes_lora.types import Model, Sites
from bayes_lora.utils.ranges import Positive

__all__ = ["NormalTheta", "PointTheta", "parameter_name"]


def parameter_name(prefix: str, site: str) -> str:
    """Return the attribute name for a site's parameter, without dots, which module attributes may not contain."""
    return f"{prefix}_{site}".replace(".", "_")


class PointTheta(PyroModule):
    """q(theta) is a point mass, as in ABMLL: KL(q || p) = -log p(theta).

    Args:
        model: a hierarchical model; its ``theta()`` is p(theta), and ``initial_theta()`` gives the initial values.
        locations_only: learn the locations (``theta.loc.*``) only, and keep the other sites at their initial values.
    """

    def __init__(self, model: Model, *, locations_only: bool = False) -> None:
        super().__init__()
        self._locations_only = locations_only
        initial = model.initial_theta()
        # Initial values are given, because not every family can draw on every device, and draws are not needed.
        with torch.no_grad():
            sites = pyro.poutine.trace(pyro.poutine.condition(model.theta, initial)).get_trace().nodes
        self.positive: dict[str, bool] = {}
        for site, value in initial.items():
            fn: Any = sites[site]["fn"]
            support = fn.support
            while isinstance(support, constraints.independent):
                support = support.base_constraint
            self.positive[site] = support is not constraints.real
            self._create(site, value.log() if self.positive[site] else value)

    def _create(self, site: str, value: Tensor) -> None:
        learned = site.startswith("theta.loc.") or not self._locations_only
        setattr(self, parameter_name("loc", site), nn.Parameter(value.clone(), requires_grad=learned))

    def forward(self) -> Sites:
        """Sample every theta site, ``(layers, out, in)`` each."""
        return {site: pyro.sample(site, self.distribution(site)) for site in self.positive}

    def distribution(self, site: str) -> dist.TorchDistribution:
        """Return q(theta) of one site."""
        value = getattr(self, parameter_name("loc", site))
        return dist.Delta(value.exp() if self.positive[site] else value, event_dim=value.ndim)


class NormalTheta(PointTheta):
    """q(theta) is Normal for real sites and LogNormal for positive sites, elementwise.

    Args:
        model: as in :class:`PointTheta`.
        initial_scale: initial standard deviation; of the logarithm, for positive sites.
    """

    def __init__(self, model: Model, *, initial_scale: Positive = 1e-3) -> None:
        self._initial_scale = initial_scale
        super().__init__(model)

    def _create(self, site: str, value: Tensor) -> None:
        super()._create(site, value)
        log_scale = torch.full_like(value, self._initial_scale).log()
        setattr(self, parameter_name("log_scale", site), nn.Parameter(log_scale))

    def distribution(self, site: str) -> dist.TorchDistribution:
        """Return q(theta) of one site."""
        loc, log_scale = getattr(self, parameter_name("loc", site)), getattr(self, parameter_name("log_scale", site))
        family = dist.LogNormal if self.positive[site] else dist.Normal
        normal: dist.TorchDistribution = family(loc, log_scale.exp()).to_event(loc.ndim)  # type: ignore[no-untyped-call]
        return normal

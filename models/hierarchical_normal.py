r"""Hierarchical normal prior over per-task LoRA factors (the *factor* form of ABMLL, arXiv 2508.14285).

.. math::
    \mu_\theta &\sim \mathcal N(0, s_0^2), \qquad 1 / \sigma_\theta^2 \sim \mathrm{Gamma}(a_0, b_0) \\
    \phi_i \mid \theta &\sim \mathcal N(\mu_\theta, \sigma_\theta^2) \quad\text{for each task } i \\
    y_{ij} \mid x_{ij}, \phi_i &\sim \mathrm{Categorical}(p_{W_0 + \mathrm{LoRA}(\phi_i)}(\cdot \mid x_{ij}))

elementwise over the factors A and B of every adapted layer.
"""

from __future__ import annotations

from typing import Literal

import pyro
import pyro.distributions as dist
import torch

from bayes_lora.errors import ConfigError
from bayes_lora.models.factor_model import FactorModel
from bayes_lora.types import Distributions, Likelihood, Sites
from bayes_lora.utils.ranges import Positive

__all__ = ["HierarchicalNormal"]


class HierarchicalNormal(FactorModel):
    """p(theta) p(phi_i | theta) p(y | x, phi_i) as a Pyro program.

    Sites: ``theta.loc.<site>`` for every LoRA site; ``theta.precision.<site>`` and ``phi.<site>`` for the random ones;
    ``answer``. If only A or only B is random, all tasks share the other factor: ``phi = theta.loc``.

    Args:
        likelihood: the language model; not a submodule, so that Pyro does not see its parameters.
        initial: a value per LoRA site, ``(layers, out, in)``, at which guides start ``theta.loc``.
        random: which factors are random: ``"A"``, ``"B"`` or ``"AB"``.
        initial_scale: sigma_theta at which guides start, for ``lora_A`` and ``lora_B``.
        loc_scale: s_0.
        concentration: a_0.
        rate: b_0.
    """

    def __init__(
        self,
        likelihood: Likelihood,
        initial: Sites | None = None,
        *,
        random: Literal["A", "B", "AB"] = "AB",
        initial_scale: tuple[Positive, Positive] = (0.1, 0.05),
        loc_scale: Positive = 1.0,
        concentration: Positive = 1.0,
        rate: Positive = 0.01,
    ) -> None:
        super().__init__(likelihood, initial, random=random, loc_scale=loc_scale)
        if min(initial_scale) <= 0:
            raise ConfigError(f"initial_scale: expected two positive numbers (for A and B), got {initial_scale}.")
        self.initial_scale = initial_scale
        self.set_hyperparameters(concentration=concentration, rate=rate)

    def initial_theta(self) -> Sites:
        """Return the value at which guides start each theta site."""
        theta = super().initial_theta()
        for site in self.random_sites:
            scale = self.initial_scale[".lora_B" in site]
            theta[f"theta.precision.{site}"] = self.initial[site].new_full(self.precision_shape(site), scale**-2)
        return theta

    def precision_shape(self, site: str) -> tuple[int, ...]:
        """Return the event shape of ``theta.precision.<site>``, which broadcasts to that of the site."""
        return tuple(self.initial[site].shape)

    def theta(self) -> Sites:
        """Sample p(theta): locations, and precisions of the random sites."""
        theta: Sites = {}
        for site, value in self.initial.items():
            prior = dist.Normal(torch.zeros_like(self.loc_scale), self.loc_scale).expand(value.shape).to_event(3)
            theta[f"theta.loc.{site}"] = pyro.sample(f"theta.loc.{site}", prior)
        for site in self.random_sites:
            gamma = dist.Gamma(self.concentration, self.rate).expand(self.precision_shape(site)).to_event(3)
            theta[f"theta.precision.{site}"] = pyro.sample(f"theta.precision.{site}", gamma)
        return theta

    def phi_prior(self, theta: Sites) -> Distributions:
        """Return p(phi | theta) of one task, per random site."""
        prior: Distributions = {}
        for site in self.random_sites:
            loc, precision = theta[f"theta.loc.{site}"], theta[f"theta.precision.{site}"]
            prior[site] = dist.Normal(loc, precision.rsqrt()).to_event(3)
        return prior

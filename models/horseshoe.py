r"""Regularised horseshoe: most weights differ little between tasks, and a few differ a lot (arXiv 1707.01694).

.. math::
    \mu_\theta &\sim \mathcal N(0, s_0^2), \qquad \tau_l \sim \mathrm{C}^+(0, \tau_0), \qquad
    \lambda \sim \mathrm{C}^+(0, 1) \\
    \phi_i \mid \theta &\sim \mathcal N(\mu_\theta, \tau_l^2 \tilde\lambda^2), \qquad
    \tilde\lambda^2 = \frac{c^2 \lambda^2}{c^2 + \tau_l^2 \lambda^2}

with a global scale tau per layer l of a site, and a local scale lambda per weight. c is the width of the slab, an upper
bound on the standard deviation of a weight.
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

__all__ = ["RegularizedHorseshoe"]


class RegularizedHorseshoe(FactorModel):
    """p(theta) p(phi_i | theta) p(y | x, phi_i) as a Pyro program.

    Sites: ``theta.loc.<site>`` for every LoRA site; ``theta.local.<site>`` (lambda), ``theta.global.<site>`` (tau,
    ``(layers, 1, 1)``) and ``phi.<site>`` for the random ones; ``answer``.

    Args:
        likelihood: the language model; not a submodule, so that Pyro does not see its parameters.
        initial: a value per LoRA site, ``(layers, out, in)``, at which guides start ``theta.loc``.
        random: which factors are random: ``"A"``, ``"B"`` or ``"AB"``.
        global_scale: tau_0, at which guides start tau, for ``lora_A`` and ``lora_B``.
        slab: c.
        loc_scale: s_0.
    """

    def __init__(
        self,
        likelihood: Likelihood,
        initial: Sites | None = None,
        *,
        random: Literal["A", "B", "AB"] = "AB",
        global_scale: tuple[Positive, Positive] = (0.1, 0.05),
        slab: Positive = 1.0,
        loc_scale: Positive = 1.0,
    ) -> None:
        super().__init__(likelihood, initial, random=random, loc_scale=loc_scale)
        if min(*global_scale, slab) <= 0:
            raise ConfigError(f"expected positive global_scale and slab, got {global_scale} and {slab}.")
        self.global_scale, self.slab = global_scale, slab

    def initial_theta(self) -> Sites:
        """Return the value at which guides start each theta site."""
        theta = super().initial_theta()
        for site in self.random_sites:
            value = self.initial[site]
            theta[f"theta.local.{site}"] = torch.ones_like(value)
            theta[f"theta.global.{site}"] = value.new_full((len(value), 1, 1), self.global_scale[".lora_B" in site])
        return theta

    def theta(self) -> Sites:
        """Sample p(theta): locations, local and global scales."""
        theta: Sites = {}
        for name, value in self.initial_theta().items():
            _, part, site = name.split(".", 2)
            prior: dist.TorchDistribution = dist.Normal(torch.zeros_like(self.loc_scale), self.loc_scale)
            if part != "loc":
                scale = self.global_scale[".lora_B" in site] if part == "global" else 1.0
                prior = dist.HalfCauchy(torch.full_like(self.loc_scale, scale))
            theta[name] = pyro.sample(name, prior.expand(value.shape).to_event(3))
        return theta

    def phi_prior(self, theta: Sites) -> Distributions:
        """Return p(phi | theta) of one task, per random site."""
        prior: Distributions = {}
        for site in self.random_sites:
            free = theta[f"theta.global.{site}"] * theta[f"theta.local.{site}"]
            scale = self.slab * free / (self.slab**2 + free.square()).sqrt()
            prior[site] = dist.Normal(theta[f"theta.loc.{site}"], scale).to_event(3)
        return prior

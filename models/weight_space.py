r"""Hierarchical prior over whole weight updates, the *weight* form of ABMLL (arXiv 2508.14285).

.. math::
    B^\theta_\mu, A^\theta_\mu, B^\theta_\sigma, A^\theta_\sigma &\sim \mathcal N(0, s_0^2), \qquad
    1 / \sigma_\theta^2 \propto \mathrm{Gamma}(a_0, b_0) \\
    \Delta W_i \mid \theta &\sim \mathcal N(B^\theta_\mu A^\theta_\mu,\; \sigma_\theta^2), \qquad
    \sigma_\theta = B^\theta_\sigma A^\theta_\sigma + c \\
    y_{ij} \mid x_{ij}, \Delta W_i &\sim \mathrm{Categorical}(p_{W_0 + \Delta W_i}(\cdot \mid x_{ij}))

elementwise over the update of every adapted layer. Two pairs of LoRA factors parametrise theta, and two more each
task's posterior. Entries are normal, whereas in the *factor* form they are sums of products of normals.
"""

from __future__ import annotations

import pyro
import torch
from torch import Tensor

from bayes_lora.distributions.factored_normal import FactoredNormal, sum_in_chunks
from bayes_lora.errors import ConfigError
from bayes_lora.infer.handlers import LocalReparameterization
from bayes_lora.lm.sites import delta_site, factor_sites
from bayes_lora.models.hierarchical_model import HierarchicalModel, sample_normal
from bayes_lora.types import Distributions, Likelihood, Sites
from bayes_lora.utils.ranges import Positive

__all__ = ["WeightSpace"]


class WeightSpace(HierarchicalModel):
    """p(theta) p(dW_i | theta) p(y | x, dW_i) as a Pyro program.

    Sites: ``theta.loc.<site>`` and ``theta.scale.<site>`` for every LoRA site, ``theta.precision.<update>`` (a factor);
        ``phi.<update>`` for every update, ``q_proj.delta_weight``; ``answer``. PEFT's scaling applies to the noise as
        well. The model's ``context`` is :class:`bayes_lora.infer.handlers.LocalReparameterization`, so that no task has
        full
    matrices in memory.

    Args:
        likelihood: the language model; not a submodule, so that Pyro does not see its parameters.
        initial: a value per LoRA site, ``(layers, out, in)``, at which guides start both pairs of
            factors (B of the scales at zero).
        offset: c, the initial standard deviation of every entry.
        loc_scale: s_0.
        concentration: a_0.
        rate: b_0. The Gamma density of each entry's precision, evaluated at the precision that the factors give, is a
            factor of p(theta). The default makes a scale of 1e-3 typical; the paper's 0.01 makes 0.1 typical, and
            belongs to its gamma of 1e-8.
    """

    context = LocalReparameterization

    def __init__(
        self,
        likelihood: Likelihood,
        initial: Sites | None = None,
        *,
        offset: Positive = 1e-3,
        loc_scale: Positive = 1.0,
        concentration: Positive = 1.0,
        rate: Positive = 1e-6,
    ) -> None:
        super().__init__(likelihood, initial)
        for name, value in dict(offset=offset, loc_scale=loc_scale, concentration=concentration, rate=rate).items():
            if not value > 0:
                raise ConfigError(f"{name}: expected a positive number, got {value}.")
        self.random_sites = [delta_site(site) for site in self.initial if ".lora_A" in site]
        self.offset, self.concentration, self.rate = offset, concentration, rate
        self.register_buffer("loc_scale", torch.tensor(loc_scale, dtype=next(iter(self.initial.values())).dtype))

    def initial_theta(self) -> Sites:
        """Return the value at which guides start each theta site."""
        theta = {f"theta.loc.{site}": value for site, value in self.initial.items()}
        for site, value in self.initial.items():
            theta[f"theta.scale.{site}"] = torch.zeros_like(value) if ".lora_B" in site else value
        return theta

    def theta(self) -> Sites:
        """Sample p(theta): two pairs of factors for every update."""
        theta = sample_normal(self.initial_theta(), self.loc_scale)
        for site, prior in self.phi_prior(theta).items():
            pyro.factor(f"theta.precision.{site}", self._log_gamma(prior))
        return theta

    def _log_gamma(self, prior: FactoredNormal) -> Tensor:
        """Return the log-density of each entry's precision, up to a constant, summed over entries; nats."""

        def log_density(entries: Tensor) -> Tensor:
            variance = entries.square()
            return (1.0 - self.concentration) * variance.log() - self.rate / variance

        return sum_in_chunks(lambda q: log_density(q.scale_B @ q.scale_A + self.offset), prior).sum(-1)

    def phi_prior(self, theta: Sites) -> Distributions:
        """Return p(dW | theta) of one task, per update."""
        prior: Distributions = {}
        for site in self.random_sites:
            a, b = factor_sites(site)
            factors = [theta[f"theta.{part}.{factor}"] for part in ("loc", "scale") for factor in (a, b)]
            prior[site] = FactoredNormal(*factors, offset=self.offset)
        return prior

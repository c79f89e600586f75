r"""A hierarchy of adapters with noise on activations, the *activation* form of ABMLL (the code of arXiv 2508.14285).

.. math::
    \theta = (B_\mu, A_\mu, B_v, A_v) &\sim \mathcal N(0, s_0^2), \qquad p(\phi_i \mid \theta) \propto 1 \\
    h \mid x, \theta &\sim \mathcal N(B^\theta_\mu A^\theta_\mu x,\; e^{B^\theta_v A^\theta_v x + c})
        \quad\text{a priori, and with } \phi_i \text{ in place of } \theta \text{ a posteriori}

for every token and adapted layer. The four factors of a task are point estimates. They are kept near theta's by the
divergence between the two distributions of activations, estimated from the language model's single draw, summed over
tokens and layers, and scaled from the episode's n examples to the task's N, because each example has its own
activations.
"""

from __future__ import annotations

from typing import Any

import pyro
import torch
from torch import Tensor

from bayes_lora.distributions.deferred_activation import DeferredActivation, LogRatios
from bayes_lora.distributions.flat import Flat
from bayes_lora.episodes.episode import Episode
from bayes_lora.errors import ConfigError
from bayes_lora.infer.plates import examples_scale, same_task_plate, task_plate
from bayes_lora.lm.sites import delta_site, factor_sites
from bayes_lora.models.hierarchical_model import HierarchicalModel, sample_normal
from bayes_lora.types import Distributions, Likelihood, Sites
from bayes_lora.utils.ranges import Positive

__all__ = ["ActivationSpace"]


class ActivationSpace(HierarchicalModel):
    """p(theta) p(h | x, theta) p(y | x, h) as a Pyro program.

    Sites: ``theta.loc.<site>`` and ``theta.log_variance.<site>`` for every LoRA site, ``phi.<site>`` and
    ``phi.log_variance.<site>``, ``phi.activations`` (a factor, the divergence); ``answer``. PEFT's scaling applies to
    the noise as well. Predictions use the mean: :meth:`sample_phi` returns plain LoRAs.

    Args:
        likelihood: the language model; not a submodule, so that Pyro does not see its parameters.
        initial: a value per LoRA site, ``(layers, out, in)``, at which guides start both pairs of
            factors (B of the log-variances at 0).
        offset: c, the initial log-variance.
        loc_scale: s_0.
    """

    def __init__(
        self, likelihood: Likelihood, initial: Sites | None = None, *, offset: float = -20.0, loc_scale: Positive = 1.0
    ) -> None:
        super().__init__(likelihood, initial)
        self.random_sites = [*self.initial, *(f"log_variance.{site}" for site in self.initial)]
        like = next(iter(self.initial.values()))
        self.register_buffer("offset", torch.full((1, 1, 1), offset, dtype=like.dtype))
        self.register_buffer("loc_scale", torch.tensor(loc_scale, dtype=like.dtype))

    def initial_theta(self) -> Sites:
        """Return the value at which guides start each theta site."""
        theta = {f"theta.loc.{site}": value for site, value in self.initial.items()}
        for site, value in self.initial.items():
            theta[f"theta.log_variance.{site}"] = torch.zeros_like(value) if ".lora_B" in site else value
        return theta

    def theta(self) -> Sites:
        """Sample p(theta): two pairs of factors for every adapted module."""
        return sample_normal(self.initial_theta(), self.loc_scale)

    def phi_prior(self, theta: Sites) -> Distributions:
        """Return flat densities, whose draws are theta's values."""
        prior: Distributions = {}
        for site in self.random_sites:
            prior[site] = Flat(theta[f"theta.{site}" if site.startswith("log_variance.") else f"theta.loc.{site}"])
        return prior

    def render(self, episode: Episode, filename: str | None = None) -> Any:
        """Not supported: a plate diagram cannot show noise that enters at every token.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("render: a plate diagram cannot show ActivationSpace, whose noise enters at every token.")

    def sample_phi(self, episode: Episode) -> Sites:
        """Sample theta and phi, and return the LoRA of each task's mean."""
        _, phi = self._sample(episode)
        return {site: phi[site] for site in self.initial}

    def _sample(self, episode: Episode) -> tuple[Distributions, Sites]:
        prior = self.phi_prior(self.theta())
        with task_plate(episode):
            return prior, {site: pyro.sample(f"phi.{site}", fn) for site, fn in prior.items()}

    def forward(self, episode: Episode) -> Tensor:
        """Run the program, and return the option log-likelihoods ``(T, N, K)`` in nats."""
        prior, phi = self._sample(episode)
        updates = {delta_site(site): factor_sites(delta_site(site)) for site in self.initial if ".lora_A" in site}
        deferred: dict[str, Any] = {}
        for update, factors in updates.items():
            names = [*factors, *(f"log_variance.{site}" for site in factors)]
            values = [*(phi[name] for name in names), *(prior[name].mean for name in names)]
            values.append(self.offset.expand(len(self.initial[factors[0]]), 1, 1))
            deferred[update] = DeferredActivation(*values)
        layers = sum(len(self.initial[a]) for a, _ in updates.values())
        with LogRatios(episode.padded.segments >= 0, layers, episode.rows_per_task) as ratios:
            log_lik = self.likelihood(deferred, episode)
        with same_task_plate(episode), pyro.poutine.scale(scale=examples_scale(episode, log_lik)):
            pyro.factor("phi.activations", -ratios.total(log_lik.shape[:-2])[..., None])
        self.observe(log_lik, episode)
        return log_lik

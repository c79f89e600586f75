r"""Finite mixture over clusters of tasks: which tasks are alike is learnt with what they have in common.

.. math::
    \pi &= \mathrm{softmax}(\ell), \qquad \ell \sim \mathcal N(0, 1), \qquad
        \mu_k \sim \mathcal N(0, s_0^2), \qquad 1 / \sigma_k^2 \sim \mathrm{Gamma}(a_0, b_0) \\
    \phi_i \mid \theta &\sim \textstyle\sum_k \pi_k \prod_s \mathcal N(\mu_{k,s}, \sigma_{k,s}^2)

over K clusters and all sites s of a task together. No site is discrete: by the chain rule the sites are sampled in
turn, each from a mixture whose weights are the clusters' probabilities given the sites before it,

.. math:: p(\phi_s \mid \phi_{<s}) = \textstyle\sum_k w_k\, \mathcal N(\mu_{k,s}, \sigma_{k,s}^2), \qquad
    w_k \propto \pi_k \textstyle\prod_{s' < s} \mathcal N(\phi_{s'}; \mu_{k,s'}, \sigma_{k,s'}^2)

whose product is the mixture above, so that every ELBO of Pyro is right.
"""

from __future__ import annotations

from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from bayes_lora.distributions.mixture import Mixture
from bayes_lora.episodes.episode import Episode
from bayes_lora.errors import ConfigError, SiteError
from bayes_lora.infer.plates import task_plate
from bayes_lora.models.factor_model import FactorModel
from bayes_lora.types import Distributions, Likelihood, Sites
from bayes_lora.utils.ranges import Count, Positive

__all__ = ["ClusterMixture"]


class ClusterMixture(FactorModel):
    """p(theta) p(phi_i | theta) p(y | x, phi_i) as a Pyro program.

    Sites: ``theta.logits`` ``(K, 1, 1)``; ``theta.loc.<site>`` and ``theta.precision.<site>``, with K before the layers
    where the site is random; ``phi.<site>``; ``answer``. A precision is that of a cluster and layer: a cluster of few
    tasks has little to learn more from.

    Args:
        likelihood: the language model; a plain object, so that Pyro cannot reach its parameters.
        initial: a value per LoRA site, ``(layers, out, in)``, around which guides start the clusters' locations.
        num_clusters: K.
        random: which factors are random: ``"A"``, ``"B"`` or ``"AB"``.
        initial_scale: sigma_k at which guides start, for ``lora_A`` and ``lora_B``.
        spread: how far apart the clusters start, in units of it.
        loc_scale: s_0.
        concentration: a_0.
        rate: b_0.

    Raises:
        ConfigError: a setting is out of range.
    """

    def __init__(
        self,
        likelihood: Likelihood,
        initial: Sites | None = None,
        *,
        num_clusters: Count = 4,
        random: Literal["A", "B", "AB"] = "AB",
        initial_scale: tuple[Positive, Positive] = (0.1, 0.05),
        spread: Positive = 0.3,
        loc_scale: Positive = 1.0,
        concentration: Positive = 1.0,
        rate: Positive = 0.01,
    ) -> None:
        super().__init__(likelihood, initial, random=random, loc_scale=loc_scale)
        if num_clusters < 1 or min(*initial_scale, spread) <= 0:
            raise ConfigError(
                "expected num_clusters of at least 1 and positive initial_scale and spread; got "
                f"num_clusters={num_clusters}, initial_scale={initial_scale}, spread={spread}."
            )
        self.num_clusters, self.initial_scale, self.spread = num_clusters, initial_scale, spread
        self.set_hyperparameters(concentration=concentration, rate=rate)

    def initial_theta(self) -> Sites:
        """Where guides start each theta site: clusters apart, always in the same way, or they would stay alike."""
        generator = torch.Generator().manual_seed(0)
        like, shapes = next(iter(self.initial.values())), self.theta_shapes()
        theta = {"theta.logits": like.new_zeros(shapes["theta.logits"])}
        for site, value in self.initial.items():
            loc, precision = f"theta.loc.{site}", f"theta.precision.{site}"
            theta[loc] = value
            if site in self.random_sites:
                scale = self.initial_scale[".lora_B" in site]
                noise = torch.randn(shapes[loc], generator=generator, dtype=value.dtype).to(value.device)
                theta[loc] = value + self.spread * scale * noise
                theta[precision] = value.new_full(shapes[precision], scale**-2)
        return theta

    def theta_shapes(self) -> dict[str, tuple[int, ...]]:
        """Event shape of each theta site, without the noise of their start, which costs as much as a draw of phi."""
        shapes: dict[str, tuple[int, ...]] = {"theta.logits": (self.num_clusters, 1, 1)}
        for site, value in self.initial.items():
            shapes[f"theta.loc.{site}"] = tuple(value.shape)
            if site in self.random_sites:
                shapes[f"theta.loc.{site}"] = (self.num_clusters, *value.shape)
                shapes[f"theta.precision.{site}"] = (self.num_clusters, len(value), 1, 1)
        return shapes

    def theta(self) -> Sites:
        """Sample p(theta)."""
        theta: Sites = {}
        for name, shape in self.theta_shapes().items():
            prior: dist.TorchDistribution = dist.Normal(torch.zeros_like(self.loc_scale), self.loc_scale)
            if name == "theta.logits":
                prior = dist.Normal(torch.zeros_like(self.loc_scale), 1.0)
            elif name.startswith("theta.precision."):
                prior = dist.Gamma(self.concentration, self.rate)
            theta[name] = pyro.sample(name, prior.expand(shape).to_event(len(shape)))
        return theta

    def components(self, theta: Sites) -> dict[str, Any]:
        """The clusters' normals per random site: batch ``(*draws, K)``, event ``(layers, out, in)``."""
        return {
            site: dist.Normal(theta[f"theta.loc.{site}"], theta[f"theta.precision.{site}"].rsqrt()).to_event(3)
            for site in self.random_sites
        }

    def phi_prior(self, theta: Sites) -> Distributions:
        """p(phi | theta) of one task, per random site by itself: its weights are pi."""
        logits = self.log_weights(theta)
        return {site: Mixture(logits, fn) for site, fn in self.components(theta).items()}

    def log_weights(self, theta: Sites) -> Tensor:
        """Log pi, ``(*draws, K)``."""
        return theta["theta.logits"][..., 0, 0].log_softmax(-1)

    def sample_phi(self, episode: Episode) -> Sites:
        """Sample theta and phi, site after site, each from a mixture whose weights are given those before."""
        theta = self.theta()
        phi, log_weights = self.shared(theta), self.log_weights(theta)
        with task_plate(episode):
            for site, fn in self.components(theta).items():
                phi[site] = value = pyro.sample(f"phi.{site}", Mixture(log_weights, fn))
                # What a cluster's normals say of the site, for every draw and task.
                log_weights = (log_weights + fn.log_prob(value.unsqueeze(-4))).log_softmax(-1)
        return phi

    def cluster_probs(self, q: dict[str, Any], theta: Sites) -> Tensor:
        r"""Each task's cluster probabilities under its posterior, ``(T, K)``; leading draws or components are kept.

        .. math:: r_{ik} \propto \pi_k \exp\big(-\textstyle\sum_s \mathrm{KL}(q_i(\phi_s) \,\|\, p_k(\phi_s))\big)

        The weights that make the bound: up to their sum, p(k | data) times exp(-KL(q || p(phi | data, k))). They are
        exact where q is as far from the posteriors given each cluster, as with many examples or clusters far apart.

        Args:
            q: per random site a distribution with batch ``(T, 1)``, such as ``TaskPosterior.distributions()``.
            theta: values of the theta sites.

        Raises:
            SiteError: q lacks a site, as a point does, which has no divergence.
        """
        prior = self.phi_prior(theta)
        missing = [site for site in prior if site not in q]
        if missing:
            raise SiteError(f"cluster_probs: expected q of {list(prior)}, got none of {missing}. A point has none.")
        total: Any = sum(-fn.divergences(q[site]) for site, fn in prior.items())
        probs: Tensor = (self.log_weights(theta) + total).softmax(-1)
        return probs.squeeze(-2)  # of the examples' dimension

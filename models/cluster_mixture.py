r"""A finite mixture over clusters of tasks: which tasks are alike is learned together with what they share.

.. math::
    \pi &= \mathrm{softmax}(\ell), \qquad \ell \sim \mathcal N(0, 1), \qquad
        \mu_k \sim \mathcal N(0, s_0^2), \qquad 1 / \sigma_k^2 \sim \mathrm{Gamma}(a_0, b_0) \\
    \phi_i \mid \theta &\sim \textstyle\sum_k \pi_k \prod_s \mathcal N(\mu_{k,s}, \sigma_{k,s}^2)

with one cluster k for all sites s of a task. There is no discrete sample site: by the chain rule the sites are sampled
in turn, each from a mixture whose weights are the cluster probabilities given the sites before it,

.. math:: p(\phi_s \mid \phi_{<s}) = \textstyle\sum_k w_k\, \mathcal N(\mu_{k,s}, \sigma_{k,s}^2), \qquad
    w_k \propto \pi_k \textstyle\prod_{s' < s} \mathcal N(\phi_{s'}; \mu_{k,s'}, \sigma_{k,s'}^2)

The product of these densities is the mixture above, so every ELBO of Pyro applies.
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

    Sites: ``theta.logits`` ``(K, 1, 1)``; ``theta.loc.<site>`` and ``theta.precision.<site>``, with a leading dimension
    K if the site is random; ``phi.<site>``; ``answer``. There is one precision per cluster and layer, because a cluster
    of a few tasks does not determine more.

    Args:
        likelihood: the language model; not a submodule, so that Pyro does not see its parameters.
        initial: a value per LoRA site, ``(layers, out, in)``, around which guides start the clusters' locations; by
            default the likelihood's own.
        num_clusters: K.
        random: which factors are random: ``"A"``, ``"B"`` or ``"AB"``.
        initial_scale: sigma_k at which guides start, for ``lora_A`` and ``lora_B``.
        spread: standard deviation of the clusters' initial locations, in units of ``initial_scale``.
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
        """Return the value at which guides start each theta site.

        The clusters start at different locations, drawn with a fixed seed, because equal ones would stay equal.
        """
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
        """Return the event shape of each theta site; cheaper than :meth:`initial_theta`, which samples noise."""
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
        """Return the clusters' normals per random site: batch ``(*draws, K)``, event ``(layers, out, in)``."""
        return {
            site: dist.Normal(theta[f"theta.loc.{site}"], theta[f"theta.precision.{site}"].rsqrt()).to_event(3)
            for site in self.random_sites
        }

    def phi_prior(self, theta: Sites) -> Distributions:
        """Return the marginal p(phi | theta) of one task per random site, a mixture with weights pi."""
        logits = self.log_weights(theta)
        return {site: Mixture(logits, fn) for site, fn in self.components(theta).items()}

    def log_weights(self, theta: Sites) -> Tensor:
        """Return log pi, ``(*draws, K)``."""
        return theta["theta.logits"][..., 0, 0].log_softmax(-1)

    def sample_phi(self, episode: Episode) -> Sites:
        """Sample theta and phi; each site is a mixture with the cluster probabilities given the sites before it."""
        theta = self.theta()
        phi, log_weights = self.shared(theta), self.log_weights(theta)
        with task_plate(episode):
            for site, fn in self.components(theta).items():
                phi[site] = value = pyro.sample(f"phi.{site}", Mixture(log_weights, fn))
                # Log-density of the value under each cluster, for every draw and task.
                log_weights = (log_weights + fn.log_prob(value.unsqueeze(-4))).log_softmax(-1)
        return phi

    def cluster_probs(self, q: dict[str, Any], theta: Sites) -> Tensor:
        r"""Return the cluster probabilities under each task's posterior, ``(T, K)``; keeps leading draws or components.

        .. math:: r_{ik} \propto \pi_k \exp\big(-\textstyle\sum_s \mathrm{KL}(q_i(\phi_s) \,\|\, p_k(\phi_s))\big)

        These are the weights at which the bound on the divergence is attained; they are proportional to p(k | data)
        times exp(-KL(q || p(phi | data, k))), and equal p(k | data) if q is equally far from every p(phi | data, k).

        Args:
            q: per random site a distribution with batch ``(T, 1)``, such as ``TaskPosterior.distributions()``.
            theta: values of the theta sites.

        Raises:
            SiteError: q lacks a site, as a point estimate does, because it has no divergence.
        """
        prior = self.phi_prior(theta)
        missing = [site for site in prior if site not in q]
        if missing:
            raise SiteError(
                f"cluster_probs: expected q of {list(prior)}, but {missing} are missing. A point has no density."
            )
        total: Any = sum(-fn.divergences(q[site]) for site, fn in prior.items())
        probs: Tensor = (self.log_weights(theta) + total).softmax(-1)
        return probs.squeeze(-2)  # the dimension of examples

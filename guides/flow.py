r"""A guide network with a normalising flow over its coefficients (Rezende and Mohamed, arXiv 1505.05770).

.. math::
    c &= f(\epsilon), \qquad \epsilon \sim \mathcal N(0, I) \\
    q(\phi_i \mid S_i, c) &= \mathcal N\big(\mu_\theta + \sigma_\theta \textstyle\sum_m (c_m(z_i) + s c_m) D_m + \dots,
        (\sigma_\theta e^{\rho + s(z_i)})^2\big)

The vector c holds the coefficients of all sites and layers, so their weights are correlated. f is a composition of
inverse autoregressive flows (Kingma et al., arXiv 1606.04934) conditioned on the support's code z. The marginal of phi
has no closed-form density, so the ELBO is bounded with a reverse model r (Ranganath, Tran and Blei, arXiv 1511.02386):

.. math:: \log p(y) \ge \mathbb E\big[\log p(y, \phi) - \log q(\phi \mid c) - \log q(c) + \log r(c \mid \phi)\big]

where r is a normal centred on the least-squares estimate of the coefficients from phi.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from bayes_lora.distributions.moments import moment_matched
from bayes_lora.episodes.episode import Episode
from bayes_lora.errors import ConfigError
from bayes_lora.guides.network import Code, GuideNetwork
from bayes_lora.guides.theta import PointTheta
from bayes_lora.infer.components import Components
from bayes_lora.infer.plates import task_plate
from bayes_lora.types import Model, Sites, ThetaFactory
from bayes_lora.utils.ranges import Count, Positive

__all__ = ["FlowNetwork"]

Flows: Any = PyroModule[nn.ModuleList]


class FlowNetwork(GuideNetwork):
    """An amortised q(theta) q(phi | support) whose weights are correlated across sites and need not be normal.

    Args:
        model: as in :class:`bayes_lora.guides.GuideNetwork`.
        theta_guide: as in :class:`bayes_lora.guides.GuideNetwork`.
        num_flows: number of autoregressive maps in f.
        num_components: number of draws of c that represent its distribution in a task's posterior.
        start: initial value of s, the scale of c's effect; learned per coefficient.
        settings: the other arguments of :class:`bayes_lora.guides.GuideNetwork`.

    Raises:
        ConfigError: p(phi | theta) has no mean or no standard deviation, or a setting is out of range.
    """

    def __init__(
        self,
        model: Model,
        *,
        theta_guide: ThetaFactory = PointTheta,
        num_flows: Count = 2,
        num_components: Count = 16,
        start: Positive = 0.1,
        **settings: Any,
    ) -> None:
        if min(num_flows, num_components) < 1 or not start > 0:
            raise ConfigError(
                "expected num_flows and num_components of at least 1 and a positive start; got "
                f"num_flows={num_flows}, num_components={num_components}, start={start}."
            )
        super().__init__(model, theta_guide=theta_guide, **settings)
        self.num_components = num_components
        self.splits = {site: tuple(self._get("directions", site).shape[:2]) for site in model.random_sites}
        count = sum(layers * m for layers, m in self.splits.values())
        self.flows = Flows(
            transforms.conditional_affine_autoregressive(count, self.mix.out_features, [count + 8])
            for _ in range(num_flows)
        )
        self.log_size = nn.Parameter(torch.full((count,), start).log())
        self.log_reverse = nn.Parameter(torch.zeros(count))

    def forward(self, episode: Episode) -> Sites:
        """Sample theta, the coefficients (an auxiliary site) and phi; reads only ``episode.support``."""
        priors, code = self.prior(self.theta()), self.code(episode.support)
        with task_plate(episode):
            drawn = pyro.sample("phi.coefficients", self.flow(code), infer={"is_auxiliary": True})
            added = self.split(drawn[..., 0, :])
            phi = {
                site: pyro.sample(f"phi.{site}", self.normal(site, prior, code, added[site]))
                for site, prior in priors.items()
            }
            # The ELBO subtracts a guide's factors, and log r must be added.
            pyro.factor("phi.reverse", -self.log_reverse_density(drawn, phi, priors, code), has_rsample=True)
        return phi

    def posterior(self, support: Episode, theta: Sites) -> Components:
        """Return normals, one per draw of the coefficients: batch ``(K, T, 1)``, event ``(layers, out, in)``."""
        code = self.code(support)
        added = self.split(self.flow(code).rsample((self.num_components,))[..., 0, :])
        priors = self.prior(theta)
        return Components({site: self.normal(site, prior, code, added[site]) for site, prior in priors.items()})

    def flow(self, code: Code) -> dist.TorchDistribution:
        """Return q(c | S), of batch ``(T, 1)`` and event ``(coefficients,)``."""
        context = code.pooled[:, None]
        count = len(self.log_size)
        base = dist.Normal(context.new_zeros(()), 1.0).expand([*context.shape[:-1], count]).to_event(1)
        maps: list[Any] = []
        for flow in self.flows:
            maps += [flow.condition(context), transforms.Permute(torch.arange(count, device=context.device).flip(0))]
        made: dist.TorchDistribution = dist.TransformedDistribution(base, maps)
        return made

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Split c into what is added to the coefficients of each site, ``(..., layers, m)``."""
        sizes = [layers * m for layers, m in self.splits.values()]
        parts = (vector * self.log_size.exp()).split(sizes, -1)
        return {site: part.unflatten(-1, self.splits[site]) for part, site in zip(parts, self.splits, strict=True)}

    def log_reverse_density(self, drawn: Tensor, phi: Sites, priors: dict[str, Any], code: Code) -> Tensor:
        """Return log r(c | phi), ``(..., T, 1)`` nats."""
        found = []
        for site, prior in priors.items():
            normal, basis = moment_matched(prior), self._get("directions", site).flatten(-2)
            # The part of phi, in prior standard deviations, that the directions have to explain.
            rest, written = ((phi[site] - normal.loc) / normal.scale).squeeze(-4), self.residual_write(site, code)
            rest = rest if written is None else rest - written
            gram = basis @ basis.mT + 1e-6 * torch.eye(basis.shape[-2], dtype=basis.dtype, device=basis.device)
            projected = torch.einsum("lmw,...lw->...lm", basis, rest.flatten(-2))
            solved = torch.linalg.solve(gram, projected[..., None])[..., 0]
            found.append((solved - self.coefficients(site, code)[..., :-1]).flatten(-2))
        guess = torch.cat(found, -1) / self.log_size.exp()
        density: Tensor = dist.Normal(guess, self.log_reverse.exp()).log_prob(drawn[..., 0, :])
        return density.sum(-1, keepdim=True)

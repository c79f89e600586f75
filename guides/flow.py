r"""A normalising flow on the coefficients of the guide network (Rezende and Mohamed, arXiv 1505.05770).

.. math::
    c &= f(\epsilon), \qquad \epsilon \sim \mathcal N(0, I) \\
    q(\phi_i \mid S_i, c) &= \mathcal N\big(\mu_\theta + \sigma_\theta \textstyle\sum_m (c_m(z_i) + s c_m) D_m + \dots,
        (\sigma_\theta e^{\rho + s(z_i)})^2\big)

One vector c holds the coefficients of all sites and layers, so that their weights move together. f are inverse
autoregressive flows (Kingma et al., arXiv 1606.04934) that see the support's code z. The marginal of phi has no density
in closed form; the ELBO is bounded with a reverse model r (Ranganath, Tran and Blei, arXiv 1511.02386):

.. math:: \log p(y) \ge \mathbb E\big[\log p(y, \phi) - \log q(\phi \mid c) - \log q(c) + \log r(c \mid \phi)\big]

where r is normal around the coefficients that least squares finds in phi.
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
    """q(theta) q(phi | support), amortised, with weights of all sites correlated and not normal.

    Args:
        model: as in :class:`bayes_lora.guides.GuideNetwork`.
        theta_guide: as there.
        num_flows: how many autoregressive maps f is made of.
        num_components: draws of c that stand for its distribution once a task is adapted to.
        start: s, the size of c's effect at the start; learnt for each coefficient.
        settings: the others of :class:`bayes_lora.guides.GuideNetwork`.

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
                "expected num_flows and num_components of at least 1 and positive start; got "
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
            # A factor of a guide is taken from the ELBO; log r belongs to it.
            pyro.factor("phi.reverse", -self.log_reverse_density(drawn, phi, priors, code), has_rsample=True)
        return phi

    def posterior(self, support: Episode, theta: Sites) -> Components:
        """Normals given draws of the coefficients: batch ``(K, T, 1)``, event ``(layers, out, in)``."""
        code = self.code(support)
        added = self.split(self.flow(code).rsample((self.num_components,))[..., 0, :])
        priors = self.prior(theta)
        return Components({site: self.normal(site, prior, code, added[site]) for site, prior in priors.items()})

    def flow(self, code: Code) -> dist.TorchDistribution:
        """q(c | S), a batch ``(T, 1)`` of vectors."""
        context = code.pooled[:, None]
        count = len(self.log_size)
        base = dist.Normal(context.new_zeros(()), 1.0).expand([*context.shape[:-1], count]).to_event(1)
        maps: list[Any] = []
        for flow in self.flows:
            maps += [flow.condition(context), transforms.Permute(torch.arange(count).flip(0).to(context.device))]
        made: dist.TorchDistribution = dist.TransformedDistribution(base, maps)
        return made

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector's effect on the coefficients of each site, ``(..., layers, m)``."""
        sizes = [layers * m for layers, m in self.splits.values()]
        parts = (vector * self.log_size.exp()).split(sizes, -1)
        return {site: part.unflatten(-1, self.splits[site]) for part, site in zip(parts, self.splits, strict=True)}

    def log_reverse_density(self, drawn: Tensor, phi: Sites, priors: dict[str, Any], code: Code) -> Tensor:
        """Log r(c | phi), ``(..., T, 1)`` nats."""
        found = []
        for site, prior in priors.items():
            normal, basis = moment_matched(prior), self._get("directions", site).flatten(-2)
            # Of phi in the prior's units what directions and coefficients have to explain.
            rest = ((phi[site] - normal.loc) / normal.scale).squeeze(-4) - self.residual_write(site, code)
            gram = basis @ basis.mT + 1e-6 * torch.eye(basis.shape[-2], dtype=basis.dtype, device=basis.device)
            projected = torch.einsum("lmw,...lw->...lm", basis, rest.flatten(-2))
            solved = torch.linalg.solve(gram, projected[..., None])[..., 0]
            found.append((solved - self.coefficients(site, code)[..., :-1]).flatten(-2))
        guess = torch.cat(found, -1) / self.log_size.exp()
        density: Tensor = dist.Normal(guess, self.log_reverse.exp()).log_prob(drawn[..., 0, :])
        return density.sum(-1, keepdim=True)

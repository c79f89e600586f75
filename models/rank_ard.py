r"""Automatic relevance determination over ranks (MacKay 1995; for factorisations, Bishop, NeurIPS 1998).

.. math::
    \tau_{l,k} &\sim \mathrm{Gamma}(a_0, b_0) \qquad\text{for rank k of layer l} \\
    \mu_{B,\cdot k} &\sim \mathcal N(0, 1 / \tau_{l,k}), \qquad
    B_{i,\cdot k} \mid \theta \sim \mathcal N(\mu_{B,\cdot k}, 1 / \tau_{l,k})

for the columns of B, and in the same way for the rows of A if they are random. If a rank helps no task, only the prior
acts on its precision, which then grows; the mean of the rank and its variance between tasks go to zero together.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from bayes_lora.lm.sites import delta_site, factor_sites
from bayes_lora.models.hierarchical_normal import HierarchicalNormal
from bayes_lora.types import Sites

__all__ = ["RankARD"]


class RankARD(HierarchicalNormal):
    """p(theta) p(phi_i | theta) p(y | x, phi_i), precisions ``(layers, 1, r)`` for B and ``(layers, r, 1)`` for A.

    Sites and arguments are those of :class:`bayes_lora.models.HierarchicalNormal`; ``loc_scale`` applies to the
    factor that is not random.
    """

    def initial_theta(self) -> Sites:
        """Return the value at which guides start each theta site, in the order of :meth:`theta`."""
        theta = super().initial_theta()
        return dict(sorted(theta.items(), key=lambda item: not item[0].startswith("theta.precision.")))

    def precision_shape(self, site: str) -> tuple[int, ...]:
        """Return the event shape of the precisions: one per layer and rank."""
        layers, rows, columns = self.initial[site].shape
        return (layers, 1, columns) if ".lora_B" in site else (layers, rows, 1)

    def theta(self) -> Sites:
        """Sample p(theta): precisions first, because locations depend on them."""
        theta: Sites = {}
        for site in self.random_sites:
            gamma = dist.Gamma(self.concentration, self.rate).expand(self.precision_shape(site)).to_event(3)
            theta[f"theta.precision.{site}"] = pyro.sample(f"theta.precision.{site}", gamma)
        for site, value in self.initial.items():
            scale = self.loc_scale
            if site in self.random_sites:
                scale = theta[f"theta.precision.{site}"].rsqrt()
            prior = dist.Normal(torch.zeros_like(value), scale).to_event(3)
            theta[f"theta.loc.{site}"] = pyro.sample(f"theta.loc.{site}", prior)
        return theta

    def energies(self, theta: Sites) -> dict[str, Tensor]:
        r"""Return the expected squared norm of each rank's part of the update, ``(layers, r)`` per module kind.

        .. math:: \mathbb E \lVert B_{\cdot k} \rVert^2\; \mathbb E \lVert A_{k \cdot} \rVert^2

        under p(phi | theta).
        """
        found: dict[str, Tensor] = {}
        for site in self.initial:
            size = theta[f"theta.loc.{site}"].square()
            if site in self.random_sites:
                size = size + 1.0 / theta[f"theta.precision.{site}"]
            size = size.sum(-2 if ".lora_B" in site else -1)
            update = delta_site(site)
            found[update] = found[update] * size if update in found else size
        return found

    def effective_rank(self, theta: Sites) -> dict[str, Tensor]:
        r"""Return the number of ranks that each layer uses, between 1 and r, ``(layers,)`` per module kind.

        .. math:: \exp\big(-\textstyle\sum_k p_k \log p_k\big), \qquad p_k = e_k / \textstyle\sum_k e_k

        where e are the energies (Roy and Vetterli, EUSIPCO 2007).
        """
        shares = {update: e / e.sum(-1, keepdim=True) for update, e in self.energies(theta).items()}
        return {update: torch.special.entr(share).sum(-1).exp() for update, share in shares.items()}

    def prune(self, phi: Sites, theta: Sites, share: float = 0.01) -> Sites:
        """Return phi with ranks set to zero whose energy under theta is below ``share`` of the largest in the layer."""
        pruned = dict(phi)
        for update, energies in self.energies(theta).items():
            keep = energies >= share * energies.amax(-1, keepdim=True)
            a, b = factor_sites(update)
            pruned[a], pruned[b] = phi[a] * keep[:, :, None], phi[b] * keep[:, None, :]
        return pruned

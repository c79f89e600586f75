r"""Guide network: one forward pass from a support set to q(phi | support) (method of ABMLL's title: amortization).

A permutation-invariant set encoder reads the frozen LM's features of each support example *with its label*; a
hypernetwork mixes a few learned directions per site:

.. math::
    z &= \tfrac1n \sum_j \left[ f(h_j),\; (U h_j) \otimes (V e_j) \right] \\
    q(\phi_i \mid S_i) &= \mathcal N(\mu_\theta + \sigma_\theta \textstyle\sum_m c_m(z) D_m,\;
        (\sigma_\theta e^{\rho + r(z)})^2)

h_j are features, e_j the part of them that depends on the label; the outer product is what one gradient step on a
linear head would see. c and r start at zero and rho at zero: at the start q(phi | S) = p(phi | theta), and the
Kullback-Leibler divergence is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn import functional as F

from bayes_lora.guides.theta import PointTheta, attribute
from bayes_lora.tasks.episode import Episode
from bayes_lora.types import Sites

__all__ = ["GuideNetwork"]

Linear = PyroModule[nn.Linear]


class GuideNetwork(PyroModule):
    """q(theta) q(phi | support) with an amortized posterior.

    Args:
        model: a hierarchical model with ``random_sites``, ``initial``, ``theta()``, ``phi_prior(theta)`` and a
            likelihood that offers ``features(episode)`` and ``feature_size``.
        theta: makes q(theta) from the model: :class:`PointTheta` or :class:`NormalTheta`.
        directions: m, learned directions per site and layer.
        hidden: width of the encoder.
        bilinear: rank of U and V.
        dropout: on the code z, against over-fitting the training tasks.
    """

    def __init__(
        self,
        model: PyroModule,
        *,
        theta: Callable[[Any], PyroModule] = PointTheta,
        directions: int = 8,
        hidden: int = 128,
        bilinear: int = 12,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        # In a tuple: as an attribute the model would become a submodule, and its parameters the guide's.
        self._model = (model,)
        self.theta = theta(model)
        size = model.likelihood.feature_size
        self.block = size // 4
        self.encode = Linear(size, hidden)
        self.encode_deep = Linear(hidden, hidden)
        self.left, self.right = Linear(size // 2, bilinear, bias=False), Linear(size // 2, bilinear, bias=False)
        self.mix = Linear(hidden + bilinear**2, hidden)
        self.dropout = dropout
        for site in model.random_sites:
            shape = model.initial[site].shape
            layers = shape[0]
            head = Linear(hidden, layers * (directions + 1))
            nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
            setattr(self, attribute("head", site), head)
            value = torch.randn(layers, directions, *shape[1:]) * directions**-0.5
            setattr(self, attribute("directions", site), nn.Parameter(value))
            setattr(self, attribute("log_scale", site), nn.Parameter(torch.zeros(shape)))

    def forward(self, episode: Episode) -> Sites:
        """Sample theta and phi; reads only ``episode.support``."""
        (model,) = self._model
        theta = self.theta()
        phi: Sites = {}
        with pyro.plate("task", episode.num_tasks, subsample=episode.task_index, dim=-2):
            for site, (loc, scale) in self.posterior(episode.support, model.phi_prior(theta)).items():
                phi[site] = pyro.sample(f"phi.{site}", dist.Normal(loc, scale).to_event(3))
        return phi

    def posterior(
        self, support: Episode, prior: dict[str, tuple[Tensor, Tensor]]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Location and scale of q(phi | support), ``(T, 1, layers, out, in)``, per random site."""
        code = self.code(support)
        posterior = {}
        for site, (loc, scale) in prior.items():
            layers = loc.shape[-3]
            head = getattr(self, attribute("head", site))(code).unflatten(-1, (layers, -1))  # (T, layers, m + 1)
            directions = getattr(self, attribute("directions", site))
            shift = torch.einsum("tlm,lmoi->tloi", head[..., :-1], directions)[:, None]
            log_ratio = getattr(self, attribute("log_scale", site)) + head[..., -1][:, None, :, None, None]
            posterior[site] = (loc + scale * shift, scale * log_ratio.exp())
        return posterior

    def code(self, support: Episode) -> Tensor:
        """Encode a support set, permutation-invariantly: ``(T, hidden)``."""
        (model,) = self._model
        features = model.likelihood.features(support).to(self.encode.weight.dtype)
        blocks = F.layer_norm(features.unflatten(-1, (4, self.block)), (self.block,))
        blocks = blocks.flatten(-2) * support.mask[..., None]
        weight = support.mask / support.mask.sum(-1, keepdim=True)
        each = self.encode_deep(F.gelu(self.encode(blocks)))  # (T, S, hidden)
        state, label = blocks.split(2 * self.block, -1)
        outer = torch.einsum("tn,tnu,tnv->tuv", weight.to(each.dtype), self.left(state), self.right(label)).flatten(1)
        pooled = torch.einsum("tn,tnh->th", weight.to(each.dtype), F.gelu(each))
        return F.dropout(F.gelu(self.mix(torch.cat([pooled, outer], -1))), self.dropout, self.training)

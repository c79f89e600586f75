r"""Laplace's approximation of each task's posterior, from theta (MacKay 1992; for LoRA, arXiv 2308.13111).

.. math::
    \hat\phi_i &= \mathrm{argmax}_\phi\; \log p(S_i \mid \phi) + \beta \log p(\phi \mid \theta)
        \qquad\text{by K steps from } \mu_\theta \\
    F_i &= \textstyle\sum_j \mathbb E_{y \sim p(y \mid x_{ij}, \hat\phi_i)}
        \big(\nabla_\phi \log p(y \mid x_{ij}, \hat\phi_i)\big)^2 \\
    q(\phi_i \mid S_i) &= \mathcal N\big(\hat\phi_i,\; (\sigma_\theta^{-2} + F_i / \beta)^{-1}\big)

elementwise: F is the diagonal of the Fisher information, which for these likelihoods is that of the generalised
Gauss-Newton matrix. Scales follow from one more backward pass, where gradient steps on them need many. Every example
has weights of its own in that pass, so that all gradients come out of it at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from bayes_lora.errors import ConfigError
from bayes_lora.guides.descent import Descent, Distributions, from_point, to_point
from bayes_lora.guides.theta import PointTheta, check_normal, sample_phi, show_to_svi
from bayes_lora.tasks.episode import Episode
from bayes_lora.types import Sites

__all__ = ["Laplace"]


class Laplace(PyroModule):
    """q(theta) q(phi | support), a normal around the most probable phi.

    For theta's gradient the displacement of the steps and the Fisher information are constants.

    Args:
        model: a hierarchical model whose p(phi | theta) is normal.
        theta: makes q(theta) from the model: :class:`PointTheta` or :class:`NormalTheta`.
        steps: K.
        learning_rate: of the steps.
        optimizer: ``"sgd"`` or ``"adam"``.
        beta: tempers the likelihood by 1 / beta, as the objective's does.
        num_samples: answers drawn for every example to average the Fisher information over; a backward pass each.

    Raises:
        ConfigError: a setting is out of range, or p(phi | theta) is not normal.
    """

    def __init__(
        self,
        model: PyroModule,
        *,
        theta: Callable[[Any], PyroModule] = PointTheta,
        steps: int = 10,
        learning_rate: float = 2e-3,
        optimizer: Literal["sgd", "adam"] = "adam",
        beta: float = 1.0,
        num_samples: int = 1,
    ) -> None:
        super().__init__()
        if steps < 0 or num_samples < 1 or not learning_rate > 0 or not beta > 0:
            raise ConfigError(
                "expected steps of at least 0, num_samples of at least 1, positive learning_rate and beta; got "
                f"steps={steps}, num_samples={num_samples}, learning_rate={learning_rate}, beta={beta}."
            )
        check_normal(model, "Laplace")
        # In a tuple: as an attribute the model would become a submodule, and its parameters the guide's.
        self._model = (model,)
        self.theta = theta(model)
        self.steps, self.learning_rate, self.optimizer = steps, learning_rate, optimizer
        self.beta, self.num_samples = beta, num_samples
        show_to_svi(self)

    def forward(self, episode: Episode) -> Sites:
        """Sample theta and phi; reads only ``episode.support``."""
        theta = self.theta()
        return sample_phi(episode, self.posterior(episode.support, theta))

    def posterior(self, support: Episode, theta: Sites) -> Distributions:
        """q(phi | support) per random site: batch ``(T, 1)``, event ``(layers, out, in)``.

        Steps and curvature are those at the mean of q(theta), once for all draws of theta.
        """
        (model,) = self._model
        mean = {site: self.theta.distribution(site).mean.detach() for site in self.theta.positive}
        tasks = len(support.task_index)
        start = {site: fn.mean.expand(tasks, 1, *fn.event_shape) for site, fn in model.phi_prior(mean).items()}
        points: Distributions = {site: dist.Delta(value, event_dim=3) for site, value in start.items()}
        descent = Descent(model, lambda part, site: self.learning_rate, self.optimizer, self.beta)
        moved = descent(support, mean, points, self.steps)
        begin = to_point(points)
        end = from_point(points, {key: begin[key] + moved[key] for key in begin})
        fisher = self.fisher(support, mean, {site: fn.mean for site, fn in end.items()})
        posterior: Distributions = {}
        for site, prior in model.phi_prior(theta).items():
            loc, scale = prior.base_dist.loc, prior.base_dist.scale
            precision = scale.square().reciprocal() + fisher[site] / self.beta
            posterior[site] = dist.Normal(loc + moved["value", site], precision.rsqrt()).to_event(3)
        return posterior

    def fisher(self, support: Episode, theta: Sites, phi: Sites) -> Sites:
        """Diagonal of the Fisher information of each task's support, ``(T, 1, layers, out, in)`` per random site."""
        (model,) = self._model
        each = support.each_alone()
        tasks = torch.arange(support.mask.shape[0], device=support.mask.device)
        task = tasks.repeat_interleave(support.mask.sum(-1), output_size=len(each.mask))
        own = {site: value.detach()[task].requires_grad_() for site, value in phi.items()}
        total = {site: torch.zeros_like(value) for site, value in phi.items()}
        with torch.enable_grad():
            answers = model.answer(model.likelihood(model.shared(theta) | own, each))
            for i in range(self.num_samples):
                log_prob: Tensor = answers.log_prob(answers.sample()).sum()
                keep = i + 1 < self.num_samples
                gradients = torch.autograd.grad(log_prob, list(own.values()), retain_graph=keep)
                for site, gradient in zip(own, gradients, strict=True):
                    total[site].index_add_(0, task, gradient.square())
        return {site: value / self.num_samples for site, value in total.items()}

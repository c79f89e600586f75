r"""A point for all tasks: maximum a posteriori, the ordinary multi-task LoRA.

.. math:: q(\phi_i) = \delta_\lambda, \qquad \mathrm{KL}(q \,\|\, p) = -\log p(\lambda \mid \theta)

Steps of adaptation from there fine-tune a LoRA for each task, held near theta by the prior.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import nn

from bayes_lora.distributions.factored_normal import FactoredNormal
from bayes_lora.episodes.episode import Episode
from bayes_lora.errors import ConfigError
from bayes_lora.guides.task_guide import Mixture, Normal, attribute, show_to_svi
from bayes_lora.guides.theta import PointTheta
from bayes_lora.infer.descent import Distributions
from bayes_lora.infer.plates import sample_phi
from bayes_lora.types import Sites

__all__ = ["SharedPoint"]


class SharedPoint(PyroModule):
    """q(theta) and one value of phi for every task, whatever its support.

    Args:
        model: a hierarchical model with ``theta()``, ``initial_theta()`` and ``phi_prior(theta)``.
        theta: makes q(theta) from the model: :class:`PointTheta` or :class:`NormalTheta`.
        spread: it starts at the prior's mean, or at a draw from around it, with so many of the prior's standard
            deviations.

    Raises:
        ConfigError: phi holds whole weight updates, of which a point is no LoRA.
    """

    def __init__(
        self, model: PyroModule, *, theta: Callable[[Any], PyroModule] = PointTheta, spread: float = 0.0
    ) -> None:
        super().__init__()
        self.theta = theta(model)
        with torch.no_grad():
            prior = model.phi_prior(model.initial_theta())
        self.sites = list(prior)
        for site, fn in prior.items():
            if isinstance(getattr(fn, "base_dist", fn), FactoredNormal):
                raise ConfigError(
                    f"SharedPoint: site {site!r} of {type(model).__name__} is a whole update, of which a point is no "
                    "LoRA. Use SharedMeanField or GradientGuide, or a model of LoRA factors (HierarchicalNormal)."
                )
            value = fn.mean.clone()
            if spread and not isinstance(getattr(fn, "base_dist", fn), (Normal, Mixture)):
                raise ConfigError(
                    f"spread: expected 0 for site {site!r} of {type(model).__name__}, which has no standard deviation. "
                    "Use GradientGuide, or a model of LoRA factors (HierarchicalNormal)."
                )
            if spread:
                value += spread * fn.stddev * torch.randn_like(value)
            setattr(self, attribute("value", site), nn.Parameter(value))
        show_to_svi(self)

    def forward(self, episode: Episode) -> Sites:
        """Sample theta and phi."""
        theta = self.theta()
        return sample_phi(episode, self.posterior(episode.support, theta))

    def posterior(self, support: Episode, theta: Sites) -> Distributions:
        """A point per random site: batch ``(T, 1)``, event ``(layers, out, in)``."""
        values = {site: getattr(self, attribute("value", site)) for site in self.sites}
        batch = (len(support.task_index), 1)
        return {site: dist.Delta(value.expand(*batch, *value.shape), event_dim=3) for site, value in values.items()}

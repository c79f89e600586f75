r"""One point estimate for all tasks: maximum a posteriori, the ordinary multi-task LoRA.

.. math:: q(\phi_i) = \delta_\lambda, \qquad \mathrm{KL}(q \,\|\, p) = -\log p(\lambda \mid \theta)

Adaptation steps start there and fine-tune a LoRA for each task, with the prior as a penalty.
"""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import nn

from bayes_lora.episodes.episode import Episode
from bayes_lora.errors import ConfigError
from bayes_lora.guides.task_guide import TaskGuide, check_moments
from bayes_lora.guides.theta import PointTheta, parameter_name
from bayes_lora.types import Distributions, Model, Sites, ThetaFactory
from bayes_lora.utils.ranges import NonNegative

__all__ = ["SharedPoint"]


class SharedPoint(TaskGuide):
    """q(theta), and one value of phi for every task and support.

    Args:
        model: a hierarchical model with ``theta()``, ``initial_theta()`` and ``phi_prior(theta)``.
        theta_guide: makes q(theta) from the model: :class:`PointTheta` or :class:`NormalTheta`.
        spread: 0 starts at the prior's mean; a positive value at a normal draw around it, of ``spread`` prior standard
            deviations.

    Raises:
        ConfigError: phi holds whole weight updates; a point estimate of those is not a LoRA.
    """

    def __init__(self, model: Model, *, theta_guide: ThetaFactory = PointTheta, spread: NonNegative = 0.0) -> None:
        super().__init__(model, theta_guide=theta_guide)
        with torch.no_grad():
            prior = model.phi_prior(model.initial_theta())
        self.sites = list(prior)
        for site in self.sites:
            if ".delta_weight" in site:
                raise ConfigError(
                    f"SharedPoint: site {site!r} of {type(model).__name__} is a whole update, not a LoRA factor. "
                    "Use SharedMeanField or GradientGuide, or a model of LoRA factors (HierarchicalNormal)."
                )
        if spread:
            check_moments(model, f"SharedPoint(spread={spread})")
        for site, fn in prior.items():
            value = fn.mean.clone()
            if spread:
                value += spread * fn.stddev * torch.randn_like(value)
            setattr(self, parameter_name("value", site), nn.Parameter(value))

    def posterior(self, support: Episode, theta: Sites) -> Distributions:
        """Return a point mass per random site: batch ``(T, 1)``, event ``(layers, out, in)``."""
        values = {site: getattr(self, parameter_name("value", site)) for site in self.sites}
        batch = (len(support.task_index), 1)
        return {site: dist.Delta(value.expand(*batch, *value.shape), event_dim=3) for site, value in values.items()}

r"""Hamiltonian Monte Carlo on the model itself, by Pyro's No-U-Turn sampler (Hoffman and Gelman, JMLR 2014).

.. math:: \phi_i^{(k)} \sim p(S_i \mid \phi)^{1/\beta}\, p(\phi \mid \theta)

For small problems, and as a reference for other guides: every sample takes up to ``2^max_tree_depth`` forward and
backward passes. One chain samples all tasks of an episode jointly. Theta learns from the divergence of the samples: its
gradient is that of Monte Carlo EM.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC
from pyro.infer import NUTS as Kernel

from bayes_lora.episodes.episode import Episode
from bayes_lora.errors import ConfigError
from bayes_lora.guides.task_guide import TaskGuide, check_moments
from bayes_lora.guides.theta import PointTheta
from bayes_lora.infer.components import Components
from bayes_lora.infer.handlers import ScaleLatents, isolated
from bayes_lora.types import Model, Sites, ThetaFactory
from bayes_lora.utils.ranges import Count, Positive

__all__ = ["NUTS"]


class NUTS(TaskGuide):
    """q(theta), and posterior samples of phi given the support.

    Args:
        model: a hierarchical model over LoRA factors.
        theta_guide: makes q(theta) from the model: :class:`PointTheta` or :class:`NormalTheta`.
        num_samples: K, samples per task.
        warmup_steps: steps before the first sample, which adapt step size and mass matrix.
        max_tree_depth: maximum depth of the binary tree of a trajectory.
        beta: the likelihood is tempered by 1 / beta, as in the objective.

    Raises:
        ConfigError: a setting is out of range, or phi is not over LoRA factors.
    """

    def __init__(
        self,
        model: Model,
        *,
        theta_guide: ThetaFactory = PointTheta,
        num_samples: Count = 20,
        warmup_steps: Count = 20,
        max_tree_depth: Count = 6,
        beta: Positive = 1.0,
    ) -> None:
        super().__init__(model, theta_guide=theta_guide)
        if min(num_samples, warmup_steps, max_tree_depth) < 1 or not beta > 0:
            raise ConfigError(
                "expected num_samples, warmup_steps and max_tree_depth of at least 1 and a positive beta; got "
                f"num_samples={num_samples}, warmup_steps={warmup_steps}, max_tree_depth={max_tree_depth}, beta={beta}."
            )
        check_moments(model, "NUTS")
        self.num_samples, self.warmup_steps = num_samples, warmup_steps
        self.steps = num_samples + warmup_steps
        self.max_tree_depth, self.beta = max_tree_depth, beta

    def posterior(self, support: Episode, theta: Sites) -> Components:
        """Return the samples as point masses per random site: batch ``(K, T, 1)``, event ``(layers, out, in)``."""
        model = self.model
        mean = {site: value.detach() for site, value in self.theta_mean().items()}
        tasks = len(support.task_index)
        start = {f"phi.{s}": fn.mean.expand(tasks, 1, *fn.event_shape) for s, fn in model.phi_prior(mean).items()}

        def tempered(episode: Episode) -> None:
            # Everything is divided by beta, and the prior multiplied by it again.
            with pyro.poutine.scale(scale=1.0 / self.beta), ScaleLatents(self.beta, self.beta):
                pyro.condition(model, data=mean)(episode)

        with isolated(), torch.enable_grad(), pyro.validation_enabled(False):
            kernel = Kernel(tempered, max_tree_depth=self.max_tree_depth, max_plate_nesting=2)
            settings: Any = dict(num_samples=self.num_samples, warmup_steps=self.warmup_steps, disable_progbar=True)
            chain = MCMC(kernel, initial_params=start, **settings)
            chain.run(support.independent_tasks())
        samples = chain.get_samples()
        return Components(
            {name.removeprefix("phi."): dist.Delta(samples[name].detach(), event_dim=3) for name in start}
        )

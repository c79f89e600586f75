r"""Stochastic-gradient Langevin dynamics for each task's posterior (Welling and Teh, ICML 2011).

.. math::
    u^{k+1} = u^k - \tfrac{\epsilon}{2} \nabla_u \big\{-\tfrac1\beta \log p(S_i \mid \mu_\theta + \sigma_\theta u)
        + \tfrac12 \lVert u \rVert^2\big\} + \sqrt\epsilon\, \xi^k, \qquad \xi^k \sim \mathcal N(0, I)

in units of the prior's standard deviations, which precondition the steps. As the step size goes to zero, its samples
are distributed as :math:`p(S_i \mid \phi)^{1/\beta}\, p(\phi \mid \theta)`. The chains of all tasks run in one batch.
Theta learns from the divergence of the samples: its gradient is that of Monte Carlo EM.
"""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor

from bayes_lora.episodes.episode import Episode
from bayes_lora.errors import ConfigError
from bayes_lora.guides.task_guide import TaskGuide, check_moments
from bayes_lora.guides.theta import PointTheta
from bayes_lora.infer.components import Components
from bayes_lora.infer.descent import Descent, SiteParameters
from bayes_lora.types import Distributions, Model, Sites, ThetaFactory
from bayes_lora.utils.ranges import Count, Natural, Positive

__all__ = ["SGLD"]


class SGLD(TaskGuide):
    """q(theta), and posterior samples of phi given the support.

    Args:
        model: a hierarchical model over LoRA factors.
        theta_guide: makes q(theta) from the model: :class:`PointTheta` or :class:`NormalTheta`.
        num_samples: K, samples per task.
        burn_in: steps before the first sample.
        thinning: steps from one sample to the next.
        step_size: epsilon.
        batch_size: examples of each support set per step, taken in turn; None takes all.
        beta: the likelihood is tempered by 1 / beta, as in the objective.

    Raises:
        ConfigError: a setting is out of range, or phi is not over LoRA factors.
    """

    def __init__(
        self,
        model: Model,
        *,
        theta_guide: ThetaFactory = PointTheta,
        num_samples: Count = 10,
        burn_in: Natural = 20,
        thinning: Count = 2,
        step_size: Positive = 1e-3,
        batch_size: Count | None = None,
        beta: Positive = 1.0,
    ) -> None:
        super().__init__(model, theta_guide=theta_guide)
        if (
            min(num_samples, thinning, 1 if batch_size is None else batch_size) < 1
            or burn_in < 0
            or not step_size > 0
            or not beta > 0
        ):
            raise ConfigError(
                "expected num_samples, thinning and batch_size of at least 1, burn_in of at least 0, and positive "
                f"step_size and beta; got num_samples={num_samples}, thinning={thinning}, batch_size={batch_size}, "
                f"burn_in={burn_in}, step_size={step_size}, beta={beta}."
            )
        check_moments(model, "SGLD")
        self.num_samples, self.burn_in, self.thinning = num_samples, burn_in, thinning
        self.steps = burn_in + 1 + (num_samples - 1) * thinning
        self.step_size, self.batch_size, self.beta = step_size, batch_size, beta

    def posterior(self, support: Episode, theta: Sites) -> Components:
        """Return the samples as point masses per random site: batch ``(K, T, 1)``, event ``(layers, out, in)``."""
        model = self.model
        mean = {site: value.detach() for site, value in self.theta_mean().items()}
        tasks, prior = len(support.task_index), model.phi_prior(mean)
        start = {site: fn.mean.expand(tasks, 1, *fn.event_shape) for site, fn in prior.items()}
        points: Distributions = {site: dist.Delta(value, event_dim=3) for site, value in start.items()}
        kept: dict[str, list[Tensor]] = {site: [] for site in start}

        def shake(step: int, moved: SiteParameters) -> None:
            for (part, site), value in moved.items():
                noise = prior[site].stddev * self.step_size**0.5 * torch.randn_like(value)
                moved[part, site] = value + noise
                if step >= self.burn_in and (step - self.burn_in) % self.thinning == 0:
                    kept[site].append(moved[part, site] + start[site])

        # The rate of the gradient of -log p(S | phi) - beta log p(phi | theta), divided by beta.
        def rate(part: str, site: str) -> Tensor:
            found: Tensor = 0.5 * self.step_size * prior[site].variance / self.beta
            return found

        descent = Descent(model, rate, "sgd", self.beta, batch_size=self.batch_size)
        descent(support, mean, points, self.steps, shake)
        return Components({site: dist.Delta(torch.stack(values), event_dim=3) for site, values in kept.items()})

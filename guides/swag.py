r"""SWAG: a normal with the mean and the spread of gradient steps (Maddox et al., arXiv 1902.02476).

.. math::
    \phi^{k+1} &= \phi^k - \alpha \nabla \big\{-\log p(S_i \mid \phi) - \beta \log p(\phi \mid \theta)\big\},
        \qquad \phi^0 = \mu_\theta \\
    q(\phi_i \mid S_i) &= \mathcal N\big(\bar\phi,\; \tfrac12 \mathrm{diag}(\overline{\phi^2} - \bar\phi^2)
        + \tfrac{1}{2 (r - 1)} D D^\top\big)

where averages run over the steps after the burn-in, and the columns of D are the last r deviations from the running
average. The spread comes from minibatch noise; steps on the full support show only what has not converged yet.
"""

from __future__ import annotations

from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor

from bayes_lora.distributions.low_rank_normal import LowRankNormal
from bayes_lora.episodes.episode import Episode
from bayes_lora.errors import ConfigError
from bayes_lora.guides.task_guide import TaskGuide, check_moments
from bayes_lora.guides.theta import PointTheta
from bayes_lora.infer.descent import Descent, SiteParameters
from bayes_lora.types import Distributions, Model, Sites, ThetaFactory
from bayes_lora.utils.ranges import Count, Natural, Positive

__all__ = ["SWAG"]


class SWAG(TaskGuide):
    """q(theta) q(phi | support), low rank plus diagonal, from the path of gradient steps.

    For theta's gradient the path is a constant displacement from the prior's mean.

    Args:
        model: a hierarchical model over LoRA factors.
        theta_guide: makes q(theta) from the model: :class:`PointTheta` or :class:`NormalTheta`.
        steps: number of gradient steps, burn-in included.
        burn_in: steps before averaging starts.
        rank: r, at least 2.
        learning_rate: alpha, constant.
        optimizer: ``"sgd"`` or ``"adam"``.
        batch_size: examples of each support set per step, taken in turn; None takes all.
        beta: weight of the log-prior.
        floor: smallest standard deviation, in prior standard deviations.

    Raises:
        ConfigError: a setting is out of range, or phi is not over LoRA factors.
    """

    def __init__(
        self,
        model: Model,
        *,
        theta_guide: ThetaFactory = PointTheta,
        steps: Count = 20,
        burn_in: Natural = 10,
        rank: Count = 5,
        learning_rate: Positive = 2e-3,
        optimizer: Literal["sgd", "adam"] = "adam",
        batch_size: Count | None = 4,
        beta: Positive = 1.0,
        floor: Positive = 1e-3,
    ) -> None:
        super().__init__(model, theta_guide=theta_guide)
        if not 2 <= rank <= steps - burn_in or burn_in < 0:
            raise ConfigError(
                "expected rank of at least 2, and at least rank steps after burn_in; got "
                f"rank={rank}, steps={steps}, burn_in={burn_in}."
            )
        if optimizer not in ("sgd", "adam"):
            raise ConfigError(f"optimizer: expected 'sgd' or 'adam', got {optimizer!r}.")
        if not min(learning_rate, beta, floor, 1 if batch_size is None else batch_size) > 0:
            raise ConfigError(
                "expected positive learning_rate, beta, floor and batch_size; got "
                f"learning_rate={learning_rate}, beta={beta}, floor={floor}, batch_size={batch_size}."
            )
        check_moments(model, "SWAG")
        self.steps, self.burn_in, self.rank, self.floor = steps, burn_in, rank, floor
        self.learning_rate, self.optimizer, self.batch_size, self.beta = learning_rate, optimizer, batch_size, beta

    def posterior(self, support: Episode, theta: Sites) -> Distributions:
        """q(phi | support) per random site: batch ``(T, 1)``, event ``(layers, out, in)``."""
        model = self.model
        mean = {site: value.detach() for site, value in self.theta_mean().items()}
        moments = self.path(support, mean)
        posterior: Distributions = {}
        for site, prior in model.phi_prior(theta).items():
            first, second, deviations = moments[site]
            variance = 0.5 * (second - first.square()).clamp_min(0.0)
            least = self.floor * prior.stddev.detach()
            scale = (variance + least.square()).sqrt()
            posterior[site] = LowRankNormal(prior.mean + first, scale, deviations / (2.0 * (self.rank - 1)) ** 0.5)
        return posterior

    def path(self, support: Episode, theta: Sites) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Return per site the means of the displacements and of their squares, and the last deviations ``(..., r)``."""
        model = self.model
        tasks = len(support.task_index)
        points: Distributions = {
            site: dist.Delta(fn.mean.expand(tasks, 1, *fn.event_shape), event_dim=3)
            for site, fn in model.phi_prior(theta).items()
        }
        found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

        def collect(step: int, moved: SiteParameters) -> None:
            count = step - self.burn_in
            for (_, site), value in moved.items() if count >= 0 else ():
                zero = torch.zeros_like(value)
                first, second, last = found.get(site, (zero, zero, value.new_zeros(*value.shape, 0)))
                first, second = first + (value - first) / (count + 1), second + (value**2 - second) / (count + 1)
                found[site] = first, second, torch.cat([last, (value - first)[..., None]], -1)[..., -self.rank :]

        rate: Any = lambda part, site: self.learning_rate  # noqa: E731
        Descent(model, rate, self.optimizer, self.beta, batch_size=self.batch_size)(
            support, theta, points, self.steps, collect
        )
        return found

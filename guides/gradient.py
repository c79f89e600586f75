r"""Gradient guide: q(phi | support) by K steps of descent from theta (ABML, Ravi and Beatson, ICLR 2019).

As in arXiv 2508.14285:

.. math::
    \lambda_i^0 &= (\mu_\theta, \log \sigma_\theta) \\
    \lambda_i^{k+1} &= \lambda_i^k - \alpha \nabla_\lambda \big\{ -\mathbb E_{q_\lambda}[\log p(S_i \mid \phi)]
        + \beta\, \mathrm{KL}(q_\lambda(\phi) \,\|\, p(\phi \mid \theta)) \big\} \\
    q(\phi_i \mid S_i) &= \mathcal N\big(\mathrm{loc}(\lambda_i^K), \mathrm{scale}(\lambda_i^K)^2\big)

in nats, with the log-likelihood summed over the support. All tasks of an episode take their steps in one batched
forward and backward pass. For theta's gradient the displacement :math:`\lambda^K - \lambda^0` is a constant (first
order), or is differentiated through (second order). With K = 0, q is the prior. :math:`\lambda^0` may also come from
another guide.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from bayes_lora.episodes.episode import Episode
from bayes_lora.errors import ConfigError
from bayes_lora.guides.family import Family, Point, same_as_prior
from bayes_lora.guides.point import SharedPoint
from bayes_lora.guides.task_guide import TaskGuide
from bayes_lora.guides.theta import PointTheta, parameter_name
from bayes_lora.infer.components import Components
from bayes_lora.infer.descent import Descent, SiteParameters, constrained_sites, unconstrained_sites
from bayes_lora.types import Distributions, Model, Sites, ThetaFactory
from bayes_lora.utils.ranges import Count, Natural, Positive

__all__ = ["GradientGuide"]


class GradientGuide(TaskGuide):
    """q(theta) q(phi | support), amortised by gradient steps on the support's negative beta-ELBO.

    Args:
        model: a hierarchical model with ``random_sites``, ``theta()`` and ``phi_prior(theta)``.
        start: a guide whose ``posterior(support, theta)`` the steps start from, and whose q(theta) is used; by default
            the steps start from p(phi | theta).
        theta_guide: makes q(theta) from the model if ``start`` is None: :class:`PointTheta` or :class:`NormalTheta`.
        steps: K.
        learning_rate: alpha; one value, or one per parameter of the family: ``{"loc": 2e-3, "log_scale": 0.1}``. A few
            steps change a scale only if its rate is large.
        optimizer: ``"sgd"`` or ``"adam"``. Adam's moments are elementwise per task, and start at zero in every episode.
        beta: weight of the divergence in the steps; independent of the objective's beta.
        num_particles: draws of phi per step, in one forward pass.
        batch_size: examples of each support set per step, taken in turn, with their log-likelihood scaled to the whole
            set. None takes all.
        second_order: whether theta's gradient flows through the steps. For small models only: the graph of every step
            is kept, and attention runs in its plain form, the only one that can be differentiated twice.
        learn_rates: whether alpha is learned, one per parameter and site.
        family: of q(phi), see :mod:`bayes_lora.guides.family`; by default the prior's own. With ``Point()`` the steps
            fine-tune a LoRA for each task, from theta (first-order MAML, arXiv 1703.03400).
        follow_theta: whether q moves with theta, so that theta gets a gradient from the likelihood too. If False, theta
            learns from the divergence alone and moves towards the end points of the tasks' steps (Reptile,
            arXiv 1803.02999).

    Raises:
        ConfigError: a setting is out of range.
    """

    def __init__(
        self,
        model: Model,
        *,
        start: TaskGuide | None = None,
        theta_guide: ThetaFactory = PointTheta,
        steps: Natural = 5,
        learning_rate: Positive | Mapping[str, Positive] = 2e-3,
        optimizer: Literal["sgd", "adam"] = "adam",
        beta: Positive = 1.0,
        num_particles: Count = 1,
        batch_size: Count | None = None,
        second_order: bool = False,
        learn_rates: bool = False,
        family: Family = same_as_prior,
        follow_theta: bool = True,
    ) -> None:
        super().__init__(model, theta_guide=theta_guide if start is None else None)
        counts = (num_particles, 1 if batch_size is None else batch_size)
        rates = learning_rate.values() if isinstance(learning_rate, Mapping) else (learning_rate,)
        if steps < 0 or min(counts) < 1 or not all(rate > 0 for rate in rates) or not beta > 0:
            raise ConfigError(
                "expected steps of at least 0, num_particles and batch_size of at least 1, positive learning_rate and "
                f"beta; got steps={steps}, num_particles={num_particles}, batch_size={batch_size}, "
                f"learning_rate={learning_rate}, beta={beta}."
            )
        if optimizer not in ("sgd", "adam"):
            raise ConfigError(f"optimizer: expected 'sgd' or 'adam', got {optimizer!r}.")
        if isinstance(start, SharedPoint) and not isinstance(family, Point):
            raise ConfigError(
                "start: SharedPoint has no scale for the steps to start from. Use SharedMeanField, or family=Point()."
            )
        if start is not None and start.num_members > 1:
            raise ConfigError(
                f"start: {type(start).__name__} has one q(theta) per member. Start from one of its members."
            )
        if (second_order or learn_rates) and not follow_theta:
            raise ConfigError("second_order, learn_rates: no gradient flows through the steps with follow_theta=False.")
        self.start, self.family, self.follow_theta = start, family, follow_theta
        if start is not None:
            # Not registered as a submodule: start registers its parameters already.
            object.__setattr__(self, "theta", start.theta)
        self.steps, self.learning_rate, self.optimizer = steps, learning_rate, optimizer
        self.beta, self.num_particles, self.second_order = beta, num_particles, second_order
        self.batch_size = batch_size
        with torch.no_grad():
            moved = unconstrained_sites(self._family(model.phi_prior(model.initial_theta())))
        parts = {part for part, _ in moved}
        if isinstance(learning_rate, Mapping) and learning_rate.keys() != parts:
            raise ConfigError(f"learning_rate: expected one for each of {sorted(parts)}, got {dict(learning_rate)}.")
        for part, site in moved if learn_rates else ():
            self._set(part, site, nn.Parameter(torch.tensor(self._first_rate(part)).log()))

    def _set(self, part: str, site: str, value: nn.Parameter) -> None:
        setattr(self, parameter_name(f"log_rate_{part}", site), value)

    def _rate(self, part: str, site: str) -> Tensor | float:
        log_rate = getattr(self, parameter_name(f"log_rate_{part}", site), None)
        return self._first_rate(part) if log_rate is None else log_rate.exp()

    def _first_rate(self, part: str) -> float:
        return self.learning_rate[part] if isinstance(self.learning_rate, Mapping) else self.learning_rate

    def posterior(self, support: Episode, theta: Sites) -> Distributions:
        """q(phi | support) per random site: batch ``(T, 1)``, event ``(layers, out, in)``.

        The steps are taken once, at the mean of q(theta). A draw of theta shifts their end point by as much as it
        shifts p(phi | theta).
        """
        tasks = len(support.task_index)
        mean = self.theta_mean()
        start = self._begin(support, mean)
        if not self.steps and self.start is None:
            start = self._begin(support, theta)  # at the draw of theta, not at the mean
            return constrained_sites(start, unconstrained_sites(start, tasks))
        moved = self.displacement(support, mean, start) if self.steps else {}
        end = {key: value + moved.get(key, 0.0) for key, value in unconstrained_sites(start, tasks).items()}
        if not self.follow_theta:
            return constrained_sites(start, {key: value.detach() for key, value in end.items()})
        here, there = (unconstrained_sites(self._family(self.prior(one))) for one in (theta, mean))
        return constrained_sites(start, {key: value + (here[key] - there[key]) for key, value in end.items()})

    def _begin(self, support: Episode, theta: Sites) -> Distributions:
        begin = self.prior(theta) if self.start is None else self.start.posterior(support, theta)
        if isinstance(begin, Components):
            raise ConfigError(
                f"start: expected a guide with one component, but {type(self.start).__name__} has several. Use "
                "SharedMeanField, MeanField or GuideNetwork."
            )
        begin = self._family(begin)
        expected, got = (unconstrained_sites(one).keys() for one in (self._family(self.prior(theta)), begin))
        if expected != got:
            parts = [sorted({part for part, _ in one}) for one in (expected, got)]
            raise ConfigError(
                f"start: expected a guide of the family of p(phi | theta), with parameters {parts[0]}; "
                f"{type(self.start).__name__} has {parts[1]}. Use SharedMeanField, MeanField or GuideNetwork."
            )
        return begin

    def _family(self, fns: Distributions) -> Distributions:
        return {site: self.family(site, fn) for site, fn in fns.items()}

    def displacement(self, support: Episode, theta: Sites, start: Distributions) -> SiteParameters:
        """Return the change of each ``(part, site)`` after K steps from ``start``, at one value of theta."""
        second = self.second_order and torch.is_grad_enabled()
        descent = Descent(
            self.model, self._rate, self.optimizer, self.beta, self.num_particles, second, self.batch_size
        )
        return descent(support, theta, start, self.steps)

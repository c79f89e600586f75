r"""The posterior in the tangent space of theta: closed form, from one forward and one backward pass for each option.

.. math::
    f(\phi) &\approx f(\phi_0) + J (\phi - \phi_0), \qquad J = \nabla_\phi f(\phi_0), \qquad \phi_0 = \mu_\theta \\
    q(\phi_i \mid S_i) &= \mathcal N\big(\mu_\theta + \sigma_\theta^2 J^\top a,\;
        \sigma_\theta (I - \sigma_\theta J^\top R J \sigma_\theta) \sigma_\theta\big)

for option scores f in nats, whose posterior under the kernel :math:`C = J \sigma_\theta^2 J^\top` has the mode
:math:`m + C a` and the covariance :math:`C - C R C`, see :mod:`bayes_lora.infer.score_posterior`. If the scores are
linear in phi, the answers normal and the prior normal, this is the exact posterior. Otherwise it is the generalised
Gauss-Newton Laplace approximation at the mode of the linear model. The covariance has full rank and correlates all
sites: in directions that the support does not determine, q is the prior.

A guide network learns to infer; here inference is exact up to the linearisation, and what is learned is the prior. The
closest relatives are UNLIMITED and LUMA (arXiv 2210.01881), which meta-learn linearised networks for regression, and
Laplace-LoRA (arXiv 2308.13111).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from bayes_lora.distributions.joint_normal import JointNormal, SiteNormal
from bayes_lora.episodes.episode import Episode
from bayes_lora.errors import ConfigError
from bayes_lora.guides.task_guide import TaskGuide
from bayes_lora.guides.theta import PointTheta
from bayes_lora.infer.components import Components, draws_around
from bayes_lora.infer.plates import task_plate
from bayes_lora.infer.score_posterior import (
    Answers,
    CategoricalAnswers,
    NormalAnswers,
    ScorePosterior,
    score_posterior,
)
from bayes_lora.infer.tangent import Tangent, tangent
from bayes_lora.types import Distributions, Model, Predictive, Sites, ThetaFactory
from bayes_lora.utils.ranges import Count, Natural, Positive

__all__ = ["TangentGuide"]

HALVINGS = 4
"""Number of times that a step is tried, each time with half the length."""


class Linearised(NamedTuple):
    """The linear model of one episode around a point.

    Attributes:
        origin: the point, ``(T, 1, layers, out, in)`` per random site.
        tangent: scores and their derivatives there.
        posterior: of the scores.
    """

    origin: Sites
    tangent: Tangent
    posterior: ScorePosterior


class TangentGuide(TaskGuide):
    """q(theta) q(phi | support) in closed form.

    For theta's gradient the derivatives J are constants: they are computed at the mean of q(theta).

    Args:
        model: a hierarchical model over LoRA factors with normal p(phi | theta), and categorical or normal answers.
        theta_guide: makes q(theta) from the model: :class:`PointTheta` or :class:`NormalTheta`.
        steps: number of times that the scores are linearised again, at the last mode (Gauss-Newton). A step that
            lowers the joint density of answers and weights is halved.
        beta: the likelihood is tempered by 1 / beta, as in the objective.
        batch_size: examples per pass; bounds the memory.
        theta_objective: what ``fit_posterior`` maximises over theta. ``"predictive"`` and ``"evidence"`` fit the scales
            of a prior with one scale per layer to Gram matrices of the training tasks, without the language model in
            the loop (:mod:`bayes_lora.infer.empirical_bayes`). ``"elbo"`` is stochastic variational inference, as for
            other guides, which trains the locations too.

    Raises:
        ConfigError: a setting is out of range, or p(phi | theta) is not normal.
    """

    predictive: Predictive = "linear"

    def __init__(
        self,
        model: Model,
        *,
        theta_guide: ThetaFactory = PointTheta,
        steps: Natural = 0,
        beta: Positive = 1.0,
        batch_size: Count = 8,
        theta_objective: Literal["predictive", "evidence", "elbo"] = "predictive",
    ) -> None:
        super().__init__(model, theta_guide=theta_guide)
        if steps < 0 or batch_size < 1 or not beta > 0:
            raise ConfigError(
                "expected steps of at least 0, batch_size of at least 1 and a positive beta; got "
                f"steps={steps}, batch_size={batch_size}, beta={beta}."
            )
        if theta_objective not in ("predictive", "evidence", "elbo"):
            raise ConfigError(f"theta_objective: expected 'predictive', 'evidence' or 'elbo', got {theta_objective!r}.")
        check_normal(model)
        self.theta_objective = theta_objective
        self.steps, self.beta, self.batch_size = steps, beta, batch_size

    def forward(self, episode: Episode) -> Sites:
        """Sample theta and phi, and return phi. Reads only ``episode.support``.

        All sites of a task are drawn together, so that each ``phi.<site>`` is a point here, and the factor
        ``phi.divergence`` makes the ELBO's divergence that of the joint normal, in closed form.
        """
        theta, particles = self.theta(), draws_around()
        draws = self._draws(theta)
        if all(type(self.theta.distribution(site)) is dist.Delta for site in theta):
            draws = draws[:1]  # all are the same
        prior, joint = self.prior(theta), self._posterior(episode.support, draws)
        drawn = joint.rsample(() if particles is None or len(draws) > 1 else (particles,))
        with task_plate(episode):
            phi = {site: pyro.sample(f"phi.{site}", dist.Delta(value, event_dim=3)) for site, value in drawn.items()}
            # The ELBO subtracts the log-density of each point under the prior, and a guide's factors.
            density: Any = sum(prior[site].log_prob(value) for site, value in phi.items())
            pyro.factor("phi.divergence", joint.divergence(prior) + density, has_rsample=True)
        return phi

    def posterior(self, support: Episode, theta: Sites) -> JointNormal:
        """Return q(phi | support), a joint normal over the sites: batch ``(T, 1)``, event ``(layers, out, in)``.

        For several draws of theta, of batch ``(S, 1, 1)``, the batch is ``(S, T, 1)``.
        """
        return self._posterior(support, self._draws(theta))

    def _posterior(self, support: Episode, draws: Sequence[Sites]) -> JointNormal:
        found = self.linearised(support, draws[0])
        parts = [self._joint(found, self.prior(draws[0]))]
        for one in draws[1:]:
            scores = self._scores(found.origin, found.tangent, support, one)
            parts.append(self._joint(found._replace(posterior=scores), self.prior(one)))
        return parts[0] if len(parts) == 1 else JointNormal(Components.stack(parts))

    def _draws(self, theta: Sites) -> list[Sites]:
        """Split theta into the draws of the enclosing plate of draws; without a plate it is one."""
        dims = {name: value.ndim - self.theta.distribution(name).event_dim for name, value in theta.items()}
        count = max((len(theta[name]) for name, batch in dims.items() if batch), default=1)
        return [
            {name: value[min(i, len(value) - 1), 0, 0] if dims[name] else value for name, value in theta.items()}
            for i in range(count)
        ]

    def _joint(self, found: Linearised, prior: Distributions) -> JointNormal:
        scale = {site: fn.stddev.expand_as(found.origin[site]) for site, fn in prior.items()}
        moved = found.tangent.combined(found.posterior.weights[..., None])
        factor = found.tangent.combined(found.posterior.factor)
        inner = found.posterior.inner[:, None]
        return JointNormal(
            {
                site: SiteNormal(
                    fn.mean + scale[site].square() * moved[site][..., 0],
                    scale[site],
                    scale[site][..., None] * factor[site],
                    inner,
                    found.origin[site],
                )
                for site, fn in prior.items()
            }
        )

    def log_evidence(self, support: Episode, theta: Sites) -> Tensor:
        """Return Laplace's approximation of log p(support | theta) of each task, ``(T,)`` nats.

        It is the evidence of the linear model with categorical or normal answers, tempered by 1 / beta.
        """
        return self.linearised(support, theta).posterior.log_evidence

    def linearised(self, support: Episode, theta: Sites) -> Linearised:
        """Return the linear model of each task at theta's mean, or where ``steps`` steps arrive."""
        mean = {site: value.detach() for site, value in self.theta_mean().items()}
        tasks = len(support.mask)
        origin = {site: fn.mean.expand(tasks, 1, *fn.event_shape).contiguous() for site, fn in self.prior(mean).items()}
        found = self._tangent(origin, support, mean)
        for _ in range(self.steps):
            origin, found = self._step(origin, found, support, mean)
        return Linearised(origin, found, self._scores(origin, found, support, theta))

    def _tangent(self, origin: Sites, support: Episode, theta: Sites) -> Tangent:
        one = {site: value.new_ones(()) for site, value in origin.items()}
        model = self.model
        return tangent(model.likelihood, support, model.shared(theta), origin, one, self.batch_size)

    def _scores(self, origin: Sites, found: Tangent, support: Episode, theta: Sites) -> ScorePosterior:
        """Return the posterior of the linear model's scores, under the prior of this theta."""
        mean, kernel = found.scores, None
        for site, prior in self.prior(theta).items():
            rows = found.gradients[site].flatten(1, 2)  # (T, N * K, layers, out, in)
            shift = ((prior.mean - origin[site]) * rows).sum((-3, -2, -1))
            scaled = (prior.stddev * rows).flatten(2)
            own = scaled @ scaled.mT
            mean, kernel = mean + shift.view(mean.shape), own if kernel is None else kernel + own
        return score_posterior(mean, kernel, self._answers(support, found.scores))  # type: ignore[arg-type]

    def _answers(self, support: Episode, scores: Tensor) -> Answers:
        options = scores.shape[-1] == support.option_mask.shape[-1]
        model = self.model
        answer = model.answer(scores if options else scores[..., 0])
        if type(answer) is dist.Categorical:
            return CategoricalAnswers(support.answer, support.option_mask, self.beta)
        if type(answer) is dist.Normal:
            observed: Any = model
            return NormalAnswers(observed.answered(support), answer.scale, support.mask, self.beta)
        raise ConfigError(f"TangentGuide: expected categorical or normal answers, got {answer}. Use GradientGuide.")

    def _step(self, origin: Sites, found: Tangent, support: Episode, theta: Sites) -> tuple[Sites, Tangent]:
        """Move each task's origin to the mode of its linear model, or a part of the way if that is not better."""
        prior = self.prior(theta)
        with torch.no_grad():
            weights = self._scores(origin, found, support, theta).weights
            moved = found.combined(weights[..., None])
            mode = {site: fn.mean + fn.variance * moved[site][..., 0] for site, fn in prior.items()}
            before = self._log_joint(origin, found, support, prior)
            size = torch.ones_like(before)
            better = torch.zeros_like(before, dtype=torch.bool)
            for _ in range(HALVINGS):
                there = {site: torch.lerp(origin[site], mode[site], _per_task(size, mode[site])) for site in mode}
                trial = self._tangent(there, support, theta)
                better = self._log_joint(there, trial, support, prior) >= before
                if better.all():
                    break
                size = torch.where(better, size, size / 2)
            kept = {site: torch.where(_per_task(better, there[site]), there[site], origin[site]) for site in mode}
            scores = torch.where(better[:, None, None], trial.scores, found.scores)
            gradients = {
                site: torch.where(_per_task(better, value), value, found.gradients[site])
                for site, value in trial.gradients.items()
            }
        return kept, Tangent(scores, gradients)

    def _log_joint(self, phi: Sites, found: Tangent, support: Episode, prior: Distributions) -> Tensor:
        """Return log p(answers, phi) of each task up to a constant, ``(T,)`` nats; the likelihood is the network's."""
        density: Any = sum(fn.log_prob(phi[site])[:, 0] for site, fn in prior.items())
        return self._answers(support, found.scores).log_prob(found.scores) + density  # type: ignore[no-any-return]


def _per_task(value: Tensor, like: Tensor) -> Tensor:
    """Reshape ``(T,)`` to broadcast to ``(T, ...)``."""
    return value.view(-1, *[1] * (like.ndim - 1))


def check_normal(model: Model) -> None:
    """Check that p(phi | theta) is an independent normal for each LoRA factor.

    Raises:
        ConfigError: the prior of a site is another distribution, or of a whole weight update.
    """
    with torch.no_grad():
        prior = model.phi_prior(model.initial_theta())
    for site, fn in prior.items():
        base = fn.base_dist if isinstance(fn, torch.distributions.Independent) else fn
        if site not in model.initial or not isinstance(base, torch.distributions.Normal):
            raise ConfigError(
                f"TangentGuide: expected a normal p(phi | theta) of LoRA factors; site {site!r} of "
                f"{type(model).__name__} has {fn}. Use GradientGuide, or a model of LoRA factors with a normal prior "
                "(HierarchicalNormal, LayerwiseScale)."
            )

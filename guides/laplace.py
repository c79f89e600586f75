r"""Laplace's approximation of each task's posterior, from theta (MacKay 1992; for LoRA, arXiv 2308.13111).

.. math::
    \hat\phi_i &= \mathrm{argmax}_\phi\; \log p(S_i \mid \phi) + \beta \log p(\phi \mid \theta)
        \qquad\text{by K steps from } \mu_\theta \\
    q(\phi_i \mid S_i) &= \mathcal N\big(\hat\phi_i,\; (\lambda_i \sigma_\theta^{-2} + F_i / \beta)^{-1}\big)

F is the Fisher information of the support (see :mod:`bayes_lora.infer.curvature`): its diagonal, or a Kronecker product
for each layer, in units of the prior's standard deviations, where the prior's precision is :math:`\lambda I` and the
sum is exact. :math:`\lambda_i` is 1, or for each layer what maximises the marginal likelihood at the mode (the fixed
point :math:`\lambda = \sum_k f_k / (f_k + \lambda) / \lVert u \rVert^2`, with u the mode and f the eigenvalues of F /
beta in these units). The scales take one more backward pass, whereas gradient steps need many to fit them.
"""

from __future__ import annotations

from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor

from bayes_lora.distributions.kronecker_normal import KroneckerNormal
from bayes_lora.episodes.episode import Episode
from bayes_lora.errors import ConfigError
from bayes_lora.guides.task_guide import TaskGuide, check_moments
from bayes_lora.guides.theta import PointTheta
from bayes_lora.infer.curvature import diagonal, gradients_of_examples, kronecker
from bayes_lora.infer.descent import Descent, unconstrained_sites
from bayes_lora.types import Distributions, Model, Sites, ThetaFactory
from bayes_lora.utils.ranges import Count, Natural, Positive

__all__ = ["Laplace"]


class Laplace(TaskGuide):
    """q(theta) q(phi | support), a normal around the most probable phi.

    For theta's gradient the displacement of the steps and the Fisher information are constants. With
    ``curvature="kronecker"`` so are the prior's standard deviations, in whose units the Fisher information is measured.

    Args:
        model: a hierarchical model over LoRA factors whose p(phi | theta) has a finite mean and standard deviation; the
            mode is the model's own, and scales combine the curvature with the precision of a normal of these moments.
        theta_guide: makes q(theta) from the model: :class:`PointTheta` or :class:`NormalTheta`.
        steps: K, gradient steps towards the mode.
        learning_rate: step size.
        optimizer: ``"sgd"`` or ``"adam"``.
        beta: the likelihood is tempered by 1 / beta, as in the objective.
        num_fisher_samples: answers sampled per example to estimate the Fisher information; one backward pass each.
        curvature: ``"diagonal"``, or ``"kronecker"``, which correlates the weights of a layer.
        prior_precision: ``"prior"`` sets lambda to 1; ``"marginal-likelihood"`` maximises the evidence over lambda.
        largest: with ``curvature="kronecker"``, sides longer than this have a diagonal factor.
        batch_size: examples per pass for the Fisher information; bounds its memory.

    Raises:
        ConfigError: a setting is out of range, or p(phi | theta) is not over LoRA factors with finite moments.
    """

    def __init__(
        self,
        model: Model,
        *,
        theta_guide: ThetaFactory = PointTheta,
        steps: Natural = 10,
        learning_rate: Positive = 2e-3,
        optimizer: Literal["sgd", "adam"] = "adam",
        beta: Positive = 1.0,
        num_fisher_samples: Count = 1,
        curvature: Literal["diagonal", "kronecker"] = "diagonal",
        prior_precision: Literal["prior", "marginal-likelihood"] = "prior",
        largest: Count = 64,
        batch_size: Count = 4,
    ) -> None:
        super().__init__(model, theta_guide=theta_guide)
        if steps < 0 or min(num_fisher_samples, batch_size) < 1 or not learning_rate > 0 or not beta > 0:
            raise ConfigError(
                "expected steps of at least 0, num_fisher_samples and batch_size of at least 1, positive learning_rate "
                f"and beta; got steps={steps}, num_fisher_samples={num_fisher_samples}, batch_size={batch_size}, "
                f"learning_rate={learning_rate}, beta={beta}."
            )
        if optimizer not in ("sgd", "adam"):
            raise ConfigError(f"optimizer: expected 'sgd' or 'adam', got {optimizer!r}.")
        if curvature not in ("diagonal", "kronecker"):
            raise ConfigError(f"curvature: expected 'diagonal' or 'kronecker', got {curvature!r}.")
        if prior_precision not in ("prior", "marginal-likelihood"):
            raise ConfigError(f"prior_precision: expected 'prior' or 'marginal-likelihood', got {prior_precision!r}.")
        check_moments(model, "Laplace")
        self.steps, self.learning_rate, self.optimizer = steps, learning_rate, optimizer
        self.beta, self.num_fisher_samples, self.curvature = beta, num_fisher_samples, curvature
        self.prior_precision, self.largest, self.batch_size = prior_precision, largest, batch_size

    def posterior(self, support: Episode, theta: Sites) -> Distributions:
        """q(phi | support) per random site: batch ``(T, 1)``, event ``(layers, out, in)``.

        Steps and curvature are computed once, at the mean of q(theta), for all draws of theta.
        """
        model = self.model
        mean = {site: value.detach() for site, value in self.theta_mean().items()}
        tasks, there = len(support.task_index), model.phi_prior(mean)
        loc = {site: fn.mean.expand(tasks, 1, *fn.event_shape) for site, fn in there.items()}
        unit = {site: fn.stddev.expand(tasks, 1, *fn.event_shape) for site, fn in there.items()}
        moved = self.displacement(support, mean, loc)
        mode = {site: loc[site] + moved[site] for site in loc}
        widths: Any = self._kronecker if self.curvature == "kronecker" else self._diagonal
        return widths(support, mean, mode, moved, unit, model.phi_prior(theta))  # type: ignore[no-any-return]

    def displacement(self, support: Episode, theta: Sites, loc: Sites) -> Sites:
        """Return the change of phi after K steps from the prior's mean."""
        model = self.model
        points: Distributions = {site: dist.Delta(value, event_dim=3) for site, value in loc.items()}
        descent = Descent(model, lambda part, site: self.learning_rate, self.optimizer, self.beta)
        moved = descent(support, theta, points, self.steps) if self.steps else unconstrained_sites(points)
        return {site: v if self.steps else torch.zeros_like(v) for (_, site), v in moved.items()}

    def fisher(self, support: Episode, theta: Sites, phi: Sites) -> Sites:
        """Return the diagonal Fisher information of each support per random site, ``(T, 1, layers, out, in)``."""
        return diagonal(self._passes(support, theta, phi), phi, self.num_fisher_samples)

    def _passes(self, support: Episode, theta: Sites, phi: Sites) -> Any:
        model = self.model
        return gradients_of_examples(model, support, theta, phi, self.num_fisher_samples, self.batch_size)

    def _diagonal(self, support: Any, mean: Any, mode: Any, moved: Any, unit: Any, here: Any) -> Distributions:
        fisher = self.fisher(support, mean, mode)
        posterior: Distributions = {}
        for site, prior in here.items():
            precision = self._precision(fisher[site] * unit[site].square() / self.beta, moved[site] / unit[site])
            total = precision / prior.stddev.square() + fisher[site] / self.beta
            posterior[site] = dist.Normal(prior.mean + moved[site], total.rsqrt()).to_event(3)
        return posterior

    def _kronecker(self, support: Any, mean: Any, mode: Any, moved: Any, unit: Any, here: Any) -> Distributions:
        sides = kronecker(self._passes(support, mean, mode), unit, self.num_fisher_samples, self.largest)
        posterior: Distributions = {}
        for site, prior in here.items():
            left, right, values = sides[site].eigen()
            precision = self._precision(values / self.beta, moved[site] / unit[site])
            spectrum = (precision + values / self.beta).rsqrt()
            # The units stay those at the mean of q(theta), where the curvature is: a draw of theta moves the mode only.
            posterior[site] = KroneckerNormal(prior.mean + moved[site], unit[site], left, right, spectrum)
        return posterior

    def _precision(self, values: Tensor, mode: Tensor) -> Tensor:
        """Return lambda per layer, ``(T, 1, layers, 1, 1)``, given eigenvalues and mode in the prior's units."""
        precision = torch.ones_like(values[..., :1, :1])
        if self.prior_precision == "prior":
            return precision
        size = mode.square().sum((-2, -1), keepdim=True)
        for _ in range(60):
            determined = (values / (values + precision)).sum((-2, -1), keepdim=True)
            # If the data carry no information, or the mode has not moved, lambda is arbitrary: keep it within bounds.
            target = (determined / size).clamp(1e-3, 1e3).nan_to_num(1.0)
            # Half a step in the logarithm, because a full step oscillates if the data are weaker than the prior.
            precision = (precision * target).sqrt()
        return precision

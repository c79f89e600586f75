r"""Laplace's approximation of the posterior of option scores under a normal prior, in closed form but for the mode.

.. math::
    f &\sim \mathcal N(m, C), \qquad y_j \sim \mathrm{softmax}(f_j)^{1/\beta} \text{ for each example } j \\
    \hat f &= m + C a, \qquad a = (y - p) / \beta \text{ at } \hat f, \qquad
        W = \mathrm{blockdiag}(\mathrm{diag}(p_j) - p_j p_j^\top) / \beta \\
    q(f) &= \mathcal N(\hat f,\; C - C R C), \qquad R = W (I + C W)^{-1} \\
    \mathrm{KL}(q \,\|\, p) &= \tfrac12 \big[a^\top C a - \mathrm{tr}(R C) + \log\det(I + C W)\big] \\
    \log p(y) &\approx \tfrac1\beta \log p(y \mid \hat f) - \tfrac12 a^\top C a - \tfrac12 \log\det(I + C W)

If the scores are linear in normal weights, :math:`f = m + J u` with :math:`u \sim \mathcal N(0, I)`, then
:math:`C = J J^\top`, and the posterior of the weights is :math:`\mathcal N(J^\top a,\; I - J^\top R J)`, whose
divergence and evidence are the same: a :class:`bayes_lora.distributions.joint_normal.JointNormal` with
:math:`G = J^\top A` (Rasmussen and Williams, Gaussian Processes for Machine Learning, section 3.5).
The number of weights does not matter: only C is needed.

With :math:`W = A A^\top`, :math:`A_j = (\mathrm{diag}(\sqrt{p_j}) - p_j \sqrt{p_j}^\top) / \sqrt\beta`, all of this
follows from the Cholesky factor of :math:`I + A^\top C A`, whose eigenvalues are at least one.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bayes_lora.errors import ConfigError

__all__ = ["Answers", "CategoricalAnswers", "NormalAnswers", "ScorePosterior", "score_posterior"]

STEPS, HALVINGS, JITTERS = 100, 40, 12


class Answers(Protocol):
    """Observed answers of T tasks with n examples of K scores each, as a log-concave likelihood of the scores."""

    def log_prob(self, scores: Tensor) -> Tensor:
        """Return ``log p(y | f) / beta`` of scores ``(T, n, K)``, ``(T,)`` nats."""
        ...

    def residual(self, scores: Tensor) -> Tensor:
        """Return its gradient, ``(T, n, K)``."""
        ...

    def factor(self, scores: Tensor) -> Tensor:
        """Return ``A_j`` of each example, ``(T, n, K, K)``: minus the Hessian is ``A_j A_j^T``."""
        ...


class CategoricalAnswers(NamedTuple):
    """Options chosen with probability ``softmax(f_j)``.

    Attributes:
        answer: ``(T, n)`` index of the gold option.
        option_mask: ``(T, n, K)``, whether an option is present; an example without options has no effect.
        beta: the likelihood is tempered by 1 / beta.
    """

    answer: Tensor
    option_mask: Tensor
    beta: float = 1.0

    def log_prob(self, scores: Tensor) -> Tensor:
        """Return ``log p(y | f) / beta``, ``(T,)`` nats."""
        chosen = self._log_probs(scores).gather(-1, self.answer.clamp(min=0)[..., None])[..., 0]
        return chosen.masked_fill(~self.option_mask.any(-1), 0.0).sum(-1) / self.beta

    def residual(self, scores: Tensor) -> Tensor:
        """Return ``(y - p) / beta``, ``(T, n, K)``."""
        gold = torch.nn.functional.one_hot(self.answer.clamp(min=0), scores.shape[-1])
        return (gold - self._log_probs(scores).exp()) * self.option_mask / self.beta

    def factor(self, scores: Tensor) -> Tensor:
        """Return ``(diag(sqrt p) - p sqrt(p)^T) / sqrt(beta)``, ``(T, n, K, K)``."""
        log_p, present = self._log_probs(scores), self.option_mask.to(scores.dtype)
        root, p = (0.5 * log_p).exp() * present, log_p.exp() * present
        return (torch.diag_embed(root) - p[..., :, None] * root[..., None, :]) / math.sqrt(self.beta)

    def _log_probs(self, scores: Tensor) -> Tensor:
        """Log-probabilities, large and negative at absent options."""
        return scores.masked_fill(~self.option_mask, -1e30).log_softmax(-1)


class NormalAnswers(NamedTuple):
    """Real answers ``y_j ~ N(f_j, scale^2)`` with one score each, K = 1.

    Attributes:
        value: y, ``(T, n)``.
        scale: standard deviation of the noise, ``(T, n)``.
        mask: ``(T, n)``, whether an example is present.
        beta: the likelihood is tempered by 1 / beta.
    """

    value: Tensor
    scale: Tensor
    mask: Tensor
    beta: float = 1.0

    def log_prob(self, scores: Tensor) -> Tensor:
        """Return ``log p(y | f) / beta``, ``(T,)`` nats."""
        each: Tensor = torch.distributions.Normal(scores[..., 0], self.scale).log_prob(self.value)
        return each.masked_fill(~self.mask, 0.0).sum(-1) / self.beta

    def residual(self, scores: Tensor) -> Tensor:
        """Return ``(y - f) / scale^2 / beta``, ``(T, n, 1)``."""
        each = (self.value - scores[..., 0]) / self.scale.square() * self.mask / self.beta
        return each[..., None]

    def factor(self, scores: Tensor) -> Tensor:
        """Return ``1 / scale / sqrt(beta)``, ``(T, n, 1, 1)``."""
        return (self.mask / self.scale / math.sqrt(self.beta))[..., None, None]


class ScorePosterior(NamedTuple):
    """The approximate posterior of the scores of n examples with K options each, of T tasks.

    Attributes:
        mode: f, ``(T, n * K)``; the prior's mean at absent options.
        weights: a, ``(T, n * K)``: the mode is ``m + C a``, and a query's mean ``m_q + C_q a``.
        factor: A, ``(T, n * K, n * K)``, with ``W = A A^T``.
        inner: S, ``(T, n * K, n * K)``, the inverse of ``I + A^T C A``.
        divergence: from the prior, ``(T,)`` nats.
        log_evidence: log p(y), ``(T,)`` nats.
    """

    mode: Tensor
    weights: Tensor
    factor: Tensor
    inner: Tensor
    divergence: Tensor
    log_evidence: Tensor

    @property
    def removed(self) -> Tensor:
        """R, ``A S A^T``: the covariance is ``C - C R C``, and a query's ``C_qq - C_q R C_q^T``."""
        return self.factor @ self.inner @ self.factor.mT


def score_posterior(mean: Tensor, kernel: Tensor, answers: Answers) -> ScorePosterior:
    """Return the posterior of scores, differentiable with respect to ``mean`` and ``kernel``.

    The mode is found by Newton's method with halved steps, which converges because the posterior is log-concave. Then
    one more step is taken from it, with gradients: the derivative of Newton's step by its start is zero at the mode, so
    that this is the derivative of the mode.

    Args:
        mean: m, ``(T, n, K)`` nats.
        kernel: C, ``(T, n * K, n * K)``, positive semi-definite.
        answers: the observed answers, such as :class:`CategoricalAnswers`.
    """
    shape = mean.shape
    with torch.no_grad():
        weights = _mode(mean, kernel, answers)
        scores = mean + _times(kernel, weights).view(shape)
    weights, factor, lower = _newton(scores.detach(), mean, kernel, answers)
    scores = mean + _times(kernel, weights).view(shape)
    # At the mode itself: the factor of the step belongs to its start, which has no gradient.
    factor, lower = _factors(scores, kernel, answers)
    inner = torch.cholesky_inverse(lower)
    log_det = 2 * lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    squared = (weights * _times(kernel, weights)).sum(-1)
    removed = (inner * (factor.mT @ kernel @ factor)).sum((-2, -1))
    divergence = 0.5 * (squared - removed + log_det)
    evidence = answers.log_prob(scores) - 0.5 * squared - 0.5 * log_det
    return ScorePosterior(scores.flatten(1), weights, factor, inner, divergence, evidence)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _factors(scores: Tensor, kernel: Tensor, answers: Answers) -> tuple[Tensor, Tensor]:
    """Return A, block diagonal ``(T, n * K, n * K)``, and the Cholesky factor of ``I + A^T C A``."""
    tasks, count, options = scores.shape
    places = torch.arange(count, device=scores.device)
    factor = scores.new_zeros(tasks, count, options, count, options)
    factor[:, places, :, places] = answers.factor(scores).transpose(0, 1)
    factor = factor.flatten(3).flatten(1, 2)
    identity = torch.eye(count * options, dtype=scores.dtype, device=scores.device)
    return factor, _cholesky(identity + factor.mT @ kernel @ factor)


def _cholesky(matrix: Tensor) -> Tensor:
    """Return the Cholesky factor of ``I + A^T C A``.

    Rounding errors of a C that is large and nearly singular, as of a prior that is wide in a few directions, may be
    larger than I. Then a multiple of the identity is added, the smallest of a series that suffices.
    """
    lower: Tensor
    lower, info = torch.linalg.cholesky_ex(matrix)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    added = torch.finfo(matrix.dtype).eps * diagonal.detach().amax(-1)
    for _ in range(JITTERS):
        if not info.any():
            return lower
        more = torch.where(info > 0, added, 0.0)
        lower, info = torch.linalg.cholesky_ex(matrix + torch.diag_embed(more[..., None].expand_as(diagonal)))
        added = 10.0 * added
    if not info.any():
        return lower
    raise ConfigError(
        f"the prior variance of scores, up to {float(diagonal.detach().amax()):.3g} nats squared, is too large or not "
        "a number: the posterior of scores cannot be computed. Give the prior smaller scales, or fit it to more tasks."
    )


def _newton(scores: Tensor, prior: Tensor, kernel: Tensor, answers: Answers) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights a after a step of Newton's method, and the factors at the start."""
    factor, lower = _factors(scores, kernel, answers)
    moved = (scores - prior).flatten(1)
    target = _times(factor, _times(factor.mT, moved)) + answers.residual(scores).flatten(1)
    inner = _times(factor.mT, _times(kernel, target))
    solved = torch.cholesky_solve(inner[..., None], lower)[..., 0]
    return target - _times(factor, solved), factor, lower


def _mode(prior: Tensor, kernel: Tensor, answers: Answers) -> Tensor:
    def objective(weights: Tensor) -> Tensor:
        moved = _times(kernel, weights)
        return answers.log_prob(prior + moved.view(prior.shape)) - 0.5 * (weights * moved).sum(-1)

    weights = torch.zeros_like(prior).flatten(1)
    value = objective(weights)
    for _ in range(STEPS):
        scores = prior + _times(kernel, weights).view(prior.shape)
        direction = _newton(scores, prior, kernel, answers)[0] - weights
        step = torch.ones_like(value)
        for _ in range(HALVINGS):
            moved = objective(weights + step[:, None] * direction)
            worse = moved < value - 1e-12 * value.abs()
            if not worse.any():
                break
            step = torch.where(worse, 0.5 * step, step)
        weights = weights + step[:, None] * direction
        value = objective(weights)
        change = _times(kernel, direction).abs().amax(-1)
        if (change <= torch.finfo(change.dtype).eps ** 0.5 * (1.0 + scores.abs().amax((-2, -1)))).all():
            break  # the next step would square the error
    return weights

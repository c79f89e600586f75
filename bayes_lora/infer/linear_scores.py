"""Normal distributions of option scores, and the probabilities of options under them."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_lora.infer.predictive import mean_over_draws
from bayes_lora.types import absent_score

__all__ = ["LinearScores"]

NUM_POINTS = 256
"""Points of the average over scores."""
ABSENT = -1e30
"""Score of absent options."""
JITTERS = 8
"""Multiples of the identity that are tried, each ten times the one before."""


class LinearScores(NamedTuple):
    """The posterior of the option scores of n queries with up to K options.

    Attributes:
        mean: ``(n, K)`` nats; 0 at absent options.
        covariance: ``(n, K, K)``; 0 at absent options.
        option_mask: ``(n, K)``, whether an option is present.
        free_form: ``(n,)``, whether the answer is free text.
    """

    mean: Tensor
    covariance: Tensor
    option_mask: Tensor
    free_form: Tensor

    def draws(self) -> Tensor:
        """Return scores ``(NUM_POINTS, n, K)`` that represent their distribution: always the same, of equal weight."""
        if self.covariance.requires_grad:
            # The derivative of eigenvectors is infinite where eigenvalues are equal, as those of absent options are.
            root = _cholesky(self.covariance)
        else:
            # The symmetric root is unique. Eigenvectors are not, and depend on the machine.
            values, vectors = torch.linalg.eigh(self.covariance)
            root = (vectors * values.clamp_min(0.0).sqrt()[..., None, :]) @ vectors.mT
        points = _points(max(1, self.mean.shape[-1]))[:, : self.mean.shape[-1]].to(self.mean)
        return self.mean + torch.einsum("nkj,sj->snk", root, points)

    def log_probs(self, temperature: float = 1.0, *, averaged: bool = True) -> Tensor:
        """Return predictive log-probabilities ``(n, K)`` nats, with :func:`absent_score` for absent options.

        They are differentiable by mean and covariance, which must then be in float64.

        Args:
            temperature: divides the scores, except those of free text.
            averaged: average probabilities over the distribution of scores; otherwise at their mean.
        """
        found = mean_over_draws(self.draw_log_probs(temperature, averaged=averaged))
        return found.masked_fill(~self.option_mask, absent_score(found.dtype))

    def draw_log_probs(self, temperature: float = 1.0, *, averaged: bool = True) -> Tensor:
        """Return log-probabilities under each of :meth:`draws`, ``(NUM_POINTS, n, K)`` nats; arguments as above.

        Without averaging there is one draw, the mean of the scores.
        """
        scores = self.draws() if averaged else self.mean[None]
        scores = torch.where(self.free_form[:, None], scores, scores / temperature)
        # Not infinite, because the derivative of logsumexp of infinities is not a number.
        return scores.masked_fill(~self.option_mask, ABSENT).log_softmax(-1)

    def entropies(self) -> tuple[Tensor, Tensor]:
        """Return the entropy of the predictive distribution and its epistemic part, ``(n,)`` nats each.

        The epistemic part is the mutual information of answer and scores: the entropy minus the expected entropy of the
        options given the scores.
        """
        log_probs, draws = self.log_probs(), self.draw_log_probs()
        total, rest = (-(one.exp() * one.clamp_min(-1e4)).sum(-1) for one in (log_probs, draws))
        return total, total - rest.mean(0)


def _cholesky(covariance: Tensor) -> Tensor:
    """Return the Cholesky factor of matrices plus a small multiple of the identity.

    Rounding errors of a wide prior's covariance minus what the support determines may exceed the smallest multiple;
    those matrices get a larger one.
    """
    size = 1.0 + covariance.diagonal(dim1=-2, dim2=-1).abs().amax(-1)
    eye = torch.eye(covariance.shape[-1], dtype=size.dtype, device=size.device)
    factor = torch.full_like(size, 1e-6, requires_grad=False)
    root: Tensor = covariance
    for _ in range(JITTERS):
        root, info = torch.linalg.cholesky_ex(covariance + (factor * size)[:, None, None] * eye)
        if not info.any():
            break
        factor = torch.where(info > 0, 10.0 * factor, factor)
    return root


@lru_cache(maxsize=64)
def _points(options: int) -> Tensor:
    """Return points of a standard normal in K dimensions from a scrambled Sobol sequence, in pairs of opposites."""
    uniform = torch.quasirandom.SobolEngine(options, scramble=True, seed=0).draw(NUM_POINTS // 2, dtype=torch.float64)
    half = torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9))
    return torch.cat([half, -half])

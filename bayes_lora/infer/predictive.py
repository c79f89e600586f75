"""Posterior predictive probabilities of option scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor

from bayes_lora.episodes.episode import Episode
from bayes_lora.infer.handlers import ModuleParameters, Widened
from bayes_lora.infer.objective import BetaELBO, evaluating
from bayes_lora.types import Sites
from bayes_lora.utils.processes import share
from bayes_lora.utils.seeding import seeded

__all__ = ["draw_phi", "held_out_nll", "mean_over_draws", "predictive", "tempered"]


def predictive(log_lik: Tensor) -> Tensor:
    r"""Posterior predictive log-probabilities: :math:`\log \frac1S \sum_s \mathrm{softmax}(\ell_s)`.

    Args:
        log_lik: option scores ``(S, ..., K)``, nats.

    Returns:
        ``(..., K)``, nats.
    """
    return mean_over_draws(log_lik.log_softmax(-1))


def mean_over_draws(log_probs: Tensor) -> Tensor:
    """Return the logarithm of the mean probability over the first dimension."""
    return torch.logsumexp(log_probs, 0) - torch.tensor(float(len(log_probs))).log()


def tempered(scores: Tensor, episode: Episode, temperature: float | Tensor) -> Tensor:
    """Divide option scores ``(..., T, N, K)`` by a temperature.

    Scores of free-form answers are unchanged: their second option is any other text, and dividing both
    log-probabilities would raise the probability of whichever text is scored.
    """
    return torch.where(episode.free_form[..., None], scores, scores / temperature)


def draw_phi(model: Any, guide: Callable[..., Any], episode: Episode, num_draws: int) -> Sites:
    """Draw phi from q(theta) q(phi | support) of any guide: ``(num_draws, T, 1, layers, out, in)`` per site."""
    with ModuleParameters(), torch.no_grad(), pyro.plate("draws", num_draws, dim=-3):
        trace = pyro.poutine.trace(guide).get_trace(episode)
        phi: Sites = pyro.poutine.replay(model.sample_phi, trace=trace)(episode)
    return phi


def held_out_nll(
    objective: BetaELBO, episodes: Sequence[Episode], num_draws: int, width: float = 1.0, *, shared: bool = False
) -> float:
    """Return the mean predictive NLL (nats) of the scored examples given the support, averaged over tasks.

    The draws of an episode depend on torch's random state and on the index of the episode, not on the episodes before.

    Args:
        objective: model and guide.
        episodes: episodes of held-out tasks.
        num_draws: number of posterior draws, S.
        width: factor on the standard deviations of the posterior.
        shared: whether the processes of a fit divide the episodes, see :mod:`bayes_lora.utils.processes`.
    """
    model: Any = objective.model
    seed = int(torch.randint(2**62, ()))

    def total(index: int) -> tuple[float, int]:
        episode = episodes[index]
        with seeded(seed + index, episode.mask.device), torch.no_grad():
            with objective.running(), evaluating(objective), Widened(width):
                phi = draw_phi(model, objective.guide, episode, num_draws)
            log_probs: Tensor = predictive(model.likelihood(phi, episode))
        nll = -log_probs.gather(-1, episode.answer[..., None])[..., 0]
        return float(((nll * episode.mask).sum(-1) / episode.mask.sum(-1)).sum()), len(nll)

    found = share(total, range(len(episodes))) if shared else [total(index) for index in range(len(episodes))]
    return sum(nll for nll, _ in found) / sum(count for _, count in found)
